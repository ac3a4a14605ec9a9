"""``canvas-engineering doctor``: what is installed here, and which backends can run."""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
from typing import Any

from canvas_engineering import __version__
from canvas_engineering._optional import installed
from canvas_engineering.cli.output import print_json, table

PACKAGES = ("numpy", "torch", "triton", "jax", "jaxlib", "libtpu", "matplotlib")


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "doctor",
        help="show versions, devices, and which backends can run here",
        description="Show versions, devices, and for each backend whether it can run here, and if not, why.",
        epilog="exit status: 0 when at least one backend can run, else 1",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(command=main)


def package_versions() -> dict[str, str | None]:
    """Installed version of every package that matters here; None where it is missing."""
    versions: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return versions


def torch_devices() -> list[str]:
    if not installed("torch"):
        return []
    import torch

    found = [f"cpu ({torch.get_num_threads()} threads)"]
    found += [f"cuda:{i} ({torch.cuda.get_device_name(i)})" for i in range(torch.cuda.device_count())]
    return found


def jax_devices() -> list[str]:
    if not installed("jax"):
        return []
    import jax

    try:
        return [f"{device.platform}:{device.id} ({device.device_kind})" for device in jax.devices()]
    except RuntimeError as error:  # JAX_PLATFORMS names a platform that is not there
        return [f"none: {' '.join(str(error).split())}"]


def kernel_tables() -> list[str]:
    """For every GPU the table that its Triton kernels take their block sizes from."""
    if not installed("torch") or not installed("triton"):
        return []
    import torch

    from canvas_engineering.errors import BackendError
    from canvas_engineering.kernels.triton.config import describe_tables
    from canvas_engineering.kernels.triton.launch import architecture

    found = []
    for i in range(torch.cuda.device_count()):
        try:
            table = describe_tables(architecture(torch.device("cuda", i)), torch.cuda.get_device_name(i))
        except BackendError as error:  # a broken file in the cache: say so, and show the rest
            table = str(error)
        found.append(f"cuda:{i}: {table}")
    return found


def report() -> dict[str, Any]:
    """Everything the command shows."""
    from canvas_engineering import available_backends

    return {
        "version": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": package_versions(),
        "devices": {"torch": torch_devices(), "jax": jax_devices()},
        "kernel_tables": kernel_tables(),
        "backends": {
            name: {"ok": availability.ok, "reason": availability.reason}
            for name, availability in available_backends().items()
        },
    }


def main(args: argparse.Namespace) -> int:
    found = report()
    status = 0 if any(backend["ok"] for backend in found["backends"].values()) else 1
    if args.json:
        print_json(found)
        return status
    print(f"canvas-engineering {found['version']}, Python {found['python']}, {found['platform']}\n")
    print(table(("package", "version"), ((name, ver or "-") for name, ver in found["packages"].items())))
    print()
    devices = [(framework, "; ".join(names) or "not installed") for framework, names in found["devices"].items()]
    print(table(("framework", "devices"), devices))
    for one in found["kernel_tables"]:
        print(f"kernel table of {one}")
    print()
    backends = [(n, "yes" if b["ok"] else "no", b["reason"] or "") for n, b in found["backends"].items()]
    print(table(("backend", "can run", "why"), backends))
    return status
