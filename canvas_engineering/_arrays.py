"""Which framework an array belongs to, found without importing any framework."""

from __future__ import annotations

import sys
from typing import Any, Literal

import numpy as np

Framework = Literal["numpy", "torch", "jax"]
#: The floating-point types that attention is defined for; other types are refused by name.
FLOAT_DTYPES = ("float16", "bfloat16", "float32", "float64")


def is_torch(value: object) -> bool:
    """Whether ``value`` is a torch tensor. A framework that was never imported has made no array."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def is_jax(value: object) -> bool:
    """Whether ``value`` is a JAX array; tracers are JAX arrays."""
    jax = sys.modules.get("jax")
    return jax is not None and isinstance(value, jax.Array)


def framework_of(value: object) -> Framework | None:
    """``"numpy"``, ``"torch"`` or ``"jax"``; None for anything else (lists, scalars, other libraries)."""
    if isinstance(value, np.ndarray):
        return "numpy"
    if is_torch(value):
        return "torch"
    if is_jax(value):
        return "jax"
    return None


def dtype_name(array: Any) -> str:
    """``"float32"`` for the float32 of every framework."""
    return str(array.dtype).removeprefix("torch.")
