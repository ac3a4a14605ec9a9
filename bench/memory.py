"""Peak memory of one call."""

from __future__ import annotations

import ctypes
import ctypes.util
import sys
import threading
from collections.abc import Callable
from pathlib import Path

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")


class Counter:
    """Memory that was needed between :meth:`start` and :meth:`stop`, on top of what was held before.

    On a GPU this is what torch's allocator handed out. On the CPU it is the growth of the process' resident set:
    its high-water mark where Linux lets it be reset, else a sample every two milliseconds. Memory that the C
    library keeps from earlier calls is given back first; what it cannot give back makes the number smaller.
    """

    def __init__(self, device: str = "cpu") -> None:
        self._device = device
        self._before = 0
        self._watcher: _Watcher | None = None

    def start(self) -> None:
        if self._device != "cpu":
            import torch

            torch.cuda.reset_peak_memory_stats(self._device)
            self._before = torch.cuda.memory_allocated(self._device)
        elif sys.platform == "linux":
            _trim()
            self._before = _status("VmRSS")
            try:
                _CLEAR_REFS.write_text("5")
            except OSError:
                self._watcher = _Watcher()

    def stop(self) -> int | None:
        """Bytes; None where the system does not tell."""
        if self._device != "cpu":
            import torch

            torch.cuda.synchronize(self._device)
            return int(torch.cuda.max_memory_allocated(self._device)) - self._before
        if sys.platform != "linux":
            return None
        peak = _status("VmHWM") if self._watcher is None else self._watcher.stop()
        self._watcher = None
        return max(0, peak - self._before)


def peak_bytes(call: Callable[[], object], device: str = "cpu") -> int | None:
    """What a :class:`Counter` says about one call."""
    counter = Counter(device)
    counter.start()
    call()
    return counter.stop()


def too_large(needed: float, device: str = "cpu") -> str:
    """Why something of ``needed`` bytes is not tried: it takes more than half of the memory; else empty."""
    total = total_bytes(device)
    if total is None or needed <= total / 2:
        return ""
    return f"would take about {needed / 2**30:,.0f} GiB, more than half of the {total / 2**30:,.0f} GiB of this device"


def total_bytes(device: str = "cpu") -> int | None:
    """Memory of this machine or GPU; None where the system does not tell."""
    if device != "cpu":
        import torch

        return int(torch.cuda.get_device_properties(device).total_memory)
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


class _Watcher:
    """A thread that looks at the resident set every two milliseconds."""

    def __init__(self) -> None:
        self._peak = _status("VmRSS")
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._done.wait(0.002):
            self._peak = max(self._peak, _status("VmRSS"))

    def stop(self) -> int:
        self._done.set()
        self._thread.join()
        return max(self._peak, _status("VmRSS"))
