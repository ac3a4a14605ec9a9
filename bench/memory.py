"""Peak memory of one call."""

from __future__ import annotations

import ctypes
import ctypes.util
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")


def peak_bytes(call: Callable[[], object], device: str = "cpu") -> int | None:
    """Memory that ``call`` needed on top of what was held before it; None where the system does not tell.

    On a GPU this is what torch's allocator handed out. On the CPU it is the growth of the process' resident set:
    its high-water mark where Linux lets it be reset, else a sample every two milliseconds. Memory that the C
    library keeps from earlier calls is given back first; what it cannot give back makes the number smaller.
    """
    if device != "cpu":
        import torch

        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return int(torch.cuda.max_memory_allocated(device)) - before
    if sys.platform != "linux":
        return None
    _trim()
    before = _status("VmRSS")
    try:
        _CLEAR_REFS.write_text("5")
    except OSError:
        return max(0, _sampled(call) - before)
    call()
    return max(0, _status("VmHWM") - before)


def total_bytes() -> int | None:
    """Memory of this machine; None where the system does not tell."""
    if sys.platform != "linux":
        return None
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemTotal:"):
            return int(line.split()[1]) * 1024
    return None


def _status(field: str) -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    return 0


def _trim() -> None:
    """Give freed memory back to the system, so that the next call has to ask for its own."""
    library = ctypes.CDLL(ctypes.util.find_library("c") or None)
    trim = getattr(library, "malloc_trim", None)  # glibc only
    if trim is not None:
        trim(0)


def _sampled(call: Callable[[], object]) -> int:
    """Largest resident set seen by a thread that looks every two milliseconds."""
    peak, done = _status("VmRSS"), threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.is_set():
            peak = max(peak, _status("VmRSS"))
            time.sleep(0.002)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        call()
    finally:
        done.set()
        watcher.join()
    return max(peak, _status("VmRSS"))
