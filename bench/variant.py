"""One way to compute a case: what is timed, and what is compared with the reference."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.roofline import Phase

Arrays = dict[str, NDArray[np.float64]]


class Absent(Exception):
    """A peer that cannot run here; the message is the reason that the report gives."""


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

    def timed(self, prepared: Any) -> None:
        """The timed part; returns when the result is there."""
        raise NotImplementedError

    def sample(self) -> float:
        """Seconds of one timed part."""
        prepared = self.prepare()
        start = time.perf_counter()
        self.timed(prepared)
        return time.perf_counter() - start

    def outputs(self, cotangent: NDArray[Any] | None) -> Arrays:
        """``out`` and, where a cotangent is given, the gradients, all as float64."""
        raise NotImplementedError

    def probe(self) -> tuple[float, int | None]:
        """Seconds of one timed part, and the memory that it took on top of its inputs."""
        return probe(self.sample)

    def close(self) -> None:
        """Give back what the variant holds."""


class TorchVariant(Variant):
    """A differentiable torch function of some leaves.

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

    def _forward(self) -> Any:
        return self._call(*self._leaves.values())

    def _backward(self, out: Any, grad_out: Any) -> Sequence[Any]:
        import torch

        return torch.autograd.grad(out, list(self._leaves.values()), grad_out)

    def prepare(self) -> Any:
        from bench.timing import synchronize

        prepared = self._forward() if self._phase == "backward" else None
        synchronize(self._device)
        return prepared

    def timed(self, prepared: Any) -> None:
        import torch

        from bench.timing import synchronize

        match self._phase:
            case "forward":
                with torch.no_grad():
                    self._forward()
            case "backward":
                self._backward(prepared, self._grad_out)
            case "step":
                self._backward(self._forward(), self._grad_out)
        synchronize(self._device)

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
        return probe(self.sample, self._device)
