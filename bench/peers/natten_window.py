"""NATTEN's neighborhood attention, for window canvases; an optional package with kernels for CUDA devices."""

from __future__ import annotations

import importlib
import importlib.util
import time
from typing import Any

from torch import Tensor

from bench.canvases import Declared
from bench.roofline import Phase
from bench.variant import Absent, TorchVariant

NATTEN = "NATTEN"


def attention(
    declared: Declared, leaves: dict[str, Tensor], grad_out: Tensor, phase: Phase, device: str
) -> TorchVariant:
    """``na1d``, ``na2d`` or ``na3d`` over the grid of the canvas."""
    mask = declared.topology.connections[0].mask
    if len(declared.topology.connections) != 1 or mask is None or mask.window_shape is None:
        raise Absent("has only window masks")
    if importlib.util.find_spec("natten") is None:
        raise Absent("not installed")
    start = time.perf_counter()
    natten: Any = importlib.import_module("natten")
    grid = (declared.layout.T, *declared.layout.spatial_shape)
    window = tuple(min(size, wide) for size, wide in zip(grid, mask.window_shape, strict=True))
    function = getattr(natten, f"na{len(grid)}d", None)
    if function is None:
        raise Absent(f"this version has no na{len(grid)}d")

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        # Heads stand last but one there: (B, *grid, H, D).
        operands = [x.transpose(1, 2).unflatten(1, grid) for x in (q, k, v)]
        out: Tensor = function(*operands, kernel_size=window)
        return out.flatten(1, len(grid)).transpose(1, 2)

    variant = TorchVariant(NATTEN, call, leaves, grad_out, phase, device)
    try:
        variant.sample()
    except (RuntimeError, ValueError, NotImplementedError) as error:
        raise Absent(" ".join(str(error).split())[:200]) from None
    variant.setup["first call"] = time.perf_counter() - start
    return variant
