"""What a result was measured on: hardware and versions, nothing that names a person, a host or a folder."""

from __future__ import annotations

import os
import platform
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from bench.memory import total_bytes

PACKAGES = ("canvas-engineering", "numpy", "torch", "triton", "jax", "jaxlib", "natten", "pytest-benchmark")


def describe(device: str = "cpu") -> dict[str, Any]:
    """Device, processor, memory, threads, operating system and versions, ready for JSON."""
    import torch

    memory = total_bytes()
    found: dict[str, Any] = {
        "device": processor() if device == "cpu" else torch.cuda.get_device_name(device),
        "kind": kind(device),
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": None if memory is None else round(memory / 2**30, 1),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": versions(),
    }
    if device != "cpu":
        found["gpu_memory_gib"] = round(torch.cuda.get_device_properties(device).total_memory / 2**30, 1)
    return found


def kind(device: str) -> Literal["cpu", "gpu"]:
    """What a torch device is."""
    return "cpu" if device == "cpu" else "gpu"


def processor() -> str:
    """The processor's name with its instruction family, as the system gives it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return " ".join(line.split(":", 1)[1].split())
    return platform.processor() or platform.machine()


def versions() -> dict[str, str | None]:
    """Installed versions of the packages that matter; None for those that are missing."""
    found: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def slug(machine: dict[str, Any]) -> str:
    """A file name for results of this device: ``cpu-amd-epyc-2-threads``."""
    words = [machine["kind"], machine["device"]]
    if machine["kind"] == "cpu":
        words.append(f"{machine['threads']} threads")
    return re.sub(r"[^a-z0-9]+", "-", " ".join(map(str, words)).lower()).strip("-")


def synchronize(device: str) -> None:
    """Wait for the device; nothing on the CPU."""
    if device != "cpu":
        import torch

        torch.cuda.synchronize(device)
