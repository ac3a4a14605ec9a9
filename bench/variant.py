"""One way to compute a case: what is timed, and what is compared with the reference."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.machine import synchronize
from bench.roofline import Phase

#: Seconds of untimed calls before a timed one.
WARM_UP = 0.02

Arrays = dict[str, NDArray[np.float64]]


#: What other people's code may raise: it ends one peer, not the run. Errors of torch's compiler and of its
#: allocators are RuntimeErrors.
FAILURES = (
    RuntimeError,
    ValueError,
    TypeError,
    ArithmeticError,
    LookupError,
    AttributeError,
    ImportError,
    MemoryError,
    OSError,
    AssertionError,
    subprocess.SubprocessError,
)


class Absent(Exception):
    """A peer that cannot run here; the message is the reason that the report gives."""


def told(error: BaseException) -> str:
    """An error in one line of bearable length."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__


def probe(sample: Callable[[], float], device: str = "cpu") -> tuple[float, int | None]:
    """Seconds that ``sample`` returns, and the memory it took."""
    from bench.memory import peak_bytes

    taken: list[float] = []
    peak = peak_bytes(lambda: taken.append(sample()), device)
    return taken[0], peak


class Variant:
    """Base of everything that is timed.

    Attributes:
        name: As in the tables.
        setup: Seconds of what happens before the first call, by kind ("plan", "mask", "compile").
    """

    name = ""
    setup: dict[str, float]

    def prepare(self) -> Any:
        """What has to exist before the timed part; not timed."""
        return None

    def timed(self, prepared: Any) -> float | None:
        """The timed part; returns when the result is there.

        Returns:
            Seconds by the device's own clock; None where the caller's clock is the right one.
        """
        raise NotImplementedError

    def sample(self) -> float:
        """Seconds of one timed part."""
        prepared = self.prepare()
        start = time.perf_counter()
        by_device = self.timed(prepared)
        return time.perf_counter() - start if by_device is None else by_device

    def warm_up(self) -> None:
        """Untimed calls, so that the next one meets its own caches and threads that are awake, as in a loop."""
        stop = time.perf_counter() + WARM_UP
        self.sample()
        while time.perf_counter() < stop:
            self.sample()

    def warm_sample(self) -> float:
        """:meth:`sample` after :meth:`warm_up`."""
        self.warm_up()
        return self.sample()

    def outputs(self, cotangent: NDArray[Any] | None) -> Arrays:
        """``out`` and, where a cotangent is given, the gradients, all as float64."""
        raise NotImplementedError

    def probe(self) -> tuple[float, int | None]:
        """Seconds that a round will take, and the memory that one timed part takes on top of its inputs."""
        return probe(self.sample)

    def close(self) -> None:
        """Give back what the variant holds."""


#: Seconds that one sample on a GPU should take, and how many calls it may hold.
GPU_SAMPLE, GPU_CALLS = 0.005, 50


def calls_within(seconds: float) -> int:
    """How many calls of that length one sample on a GPU holds."""
    return max(1, min(GPU_CALLS, int(GPU_SAMPLE / max(seconds, 1e-9))))


class TorchVariant(Variant):
    """A differentiable torch function of some leaves.

    On a GPU a sample is the time between two CUDA events around several calls, over their number: a call alone
    would mostly be the time of its launch.

    Args:
        name: As in the tables.
        call: From the leaves to ``out``.
        leaves: Tensors by name; gradients are taken for all of them.
        grad_out: Cotangent of the timed backward pass.
        phase: What is timed.
        device: Where it runs.
        setup: Seconds spent before.
    """

    def __init__(
        self,
        name: str,
        call: Callable[..., Any],
        leaves: dict[str, Any],
        grad_out: Any,
        phase: Phase,
        device: str = "cpu",
        setup: dict[str, float] | None = None,
    ) -> None:
        self.name = name
        self.setup = {} if setup is None else setup
        self._call = call
        self._phase: Phase = phase
        self._device = device
        self._leaves = {key: leaf.detach().requires_grad_(phase != "forward") for key, leaf in leaves.items()}
        self._grad_out = grad_out
        self._calls = 1  # in one sample

    def _forward(self) -> Any:
        return self._call(*self._leaves.values())

    def _backward(self, out: Any, grad_out: Any) -> Sequence[Any]:
        import torch

        return torch.autograd.grad(out, list(self._leaves.values()), grad_out)

    def prepare(self) -> Any:
        prepared = self._forward() if self._phase == "backward" else None
        synchronize(self._device)
        return prepared

    def timed(self, prepared: Any) -> float | None:
        if self._device == "cpu":
            self._once(prepared)
            return None
        import torch

        with torch.cuda.device(self._device):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(self._calls):
                self._once(prepared)
            end.record()
            end.synchronize()
        return float(start.elapsed_time(end)) / 1e3 / self._calls

    def _once(self, prepared: Any) -> None:
        import torch

        match self._phase:
            case "forward":
                with torch.no_grad():
                    self._forward()
            case "backward":
                self._backward(prepared, self._grad_out)
            case "step":
                self._backward(self._forward(), self._grad_out)

    def outputs(self, cotangent: NDArray[Any] | None) -> Arrays:
        import torch

        def array(tensor: Any) -> NDArray[np.float64]:
            result: NDArray[np.float64] = tensor.detach().double().cpu().numpy()
            return result

        if self._phase == "forward" or cotangent is None:
            with torch.no_grad():
                return {"out": array(self._forward())}
        out = self._forward()
        grads = self._backward(out, torch.from_numpy(cotangent).to(out))
        named = zip(self._leaves, grads, strict=True)
        return {"out": array(out)} | {f"d{name}": array(grad) for name, grad in named}

    def probe(self) -> tuple[float, int | None]:
        self._calls = 1
        seconds, peak = probe(self.sample, self._device)
        if self._device == "cpu":
            return seconds, peak
        for _ in range(3):  # the clock of an idle GPU takes a while to rise
            seconds = self.sample()
        if self._phase != "backward":  # its graph is gone after one call
            self._calls = calls_within(seconds)
        return self.sample() * self._calls, peak
