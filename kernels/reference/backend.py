"""The reference as a backend: NumPy arrays as they are, torch tensors and JAX arrays by way of NumPy.

It answers in the type, dtype and device of its operands, computes in float64, and never runs unless asked for
by name, except for NumPy arrays.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from canvas_engineering._arrays import FLOAT_DTYPES, dtype_name, framework_of
from canvas_engineering.kernels.reference.attention import (
    Activation,
    Gradients,
    attention_backward,
    attention_forward,
)
from canvas_engineering.plan import BlockSparsePlan


@dataclass(frozen=True)
class Call:
    """What a call holds besides its arrays; hashable, because JAX needs it static."""

    plan: BlockSparsePlan
    scale: float
    activation: Activation
    dropout_p: float
    seed: int | None

    def forward(
        self, q: NDArray[Any], k: NDArray[Any], v: NDArray[Any], row_weight: NDArray[Any]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Output and log-sum-exp, float64."""
        return attention_forward(q, k, v, self.plan, row_weight=row_weight, **self._keywords())

    def backward(
        self,
        q: NDArray[Any],
        k: NDArray[Any],
        v: NDArray[Any],
        row_weight: NDArray[Any],
        grad_out: NDArray[Any],
        grad_lse: NDArray[Any] | None,
    ) -> Gradients:
        """Gradients with respect to q, k, v and row_weight, float64."""
        return attention_backward(q, k, v, self.plan, grad_out, grad_lse, row_weight=row_weight, **self._keywords())

    def _keywords(self) -> dict[str, Any]:
        return {
            "scale": self.scale,
            "activation": self.activation,
            "dropout_p": self.dropout_p,
            "seed": self.seed,
        }


def availability() -> tuple[bool, str]:
    """Always: NumPy is the one dependency of the package."""
    return True, f"NumPy {np.__version__}, float64 inside; for comparison, not for speed"


def reasons(
    q: Any,
    k: Any,
    v: Any,
    plan: BlockSparsePlan,
    *,
    activation: str,
    return_lse: bool,
    dropout_p: float,
    row_weight: Any,
) -> list[str]:
    """Why this call cannot run here; empty if it can."""
    found = []
    if dtype_name(q) not in FLOAT_DTYPES:
        found.append(f"dtype must be one of {', '.join(FLOAT_DTYPES)}, got {dtype_name(q)}")
    return found


def attention(
    q: Any,  # (B, Hq, Nq, D)
    k: Any,  # (B, Hkv, Nkv, D)
    v: Any,  # (B, Hkv, Nkv, D)
    plan: BlockSparsePlan,
    *,
    scale: float,
    row_weight: Any,  # (num_sets, block_q) or None for the plan's
    activation: Activation,
    dropout_p: float,
    seed: Any,  # int; for torch also a tensor of one int, for JAX a uint32 array of two words
    return_lse: bool,
) -> Any:
    """Output, or output and log-sum-exp; differentiable for torch tensors and JAX arrays."""
    out: Any
    lse: Any
    framework = framework_of(q)
    if framework == "jax":
        from canvas_engineering.kernels.reference.jax_bridge import jax_attention

        out, lse = jax_attention(q, k, v, row_weight, seed, Call(plan, scale, activation, dropout_p, None))
        return (out, lse) if return_lse else out
    call = Call(plan, scale, activation, dropout_p, None if seed is None else int(seed) % 2**64)
    match framework:
        case "torch":
            from canvas_engineering.kernels.reference.torch_bridge import torch_attention

            out, lse = torch_attention(q, k, v, row_weight, call)
        case _:
            out, lse = call.forward(q, k, v, plan.row_weight if row_weight is None else row_weight)
            out = out.astype(q.dtype)
            lse = lse.astype(np.float64 if q.dtype == np.float64 else np.float32)
    return (out, lse) if return_lse else out
