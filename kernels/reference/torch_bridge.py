"""The reference for torch tensors: copied to NumPy, computed by hand both ways, copied back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

if TYPE_CHECKING:
    from canvas_engineering.kernels.reference.backend import Call


def torch_attention(q: Tensor, k: Tensor, v: Tensor, row_weight: Tensor | None, call: Call) -> tuple[Tensor, Tensor]:
    """Output in q's dtype and log-sum-exp in float32 (float64 for float64), on q's device."""
    if row_weight is None:
        row_weight = torch.from_numpy(call.plan.row_weight)
    out, lse = _Reference.apply(q, k, v, row_weight, call)
    return out, lse


def _array(tensor: Tensor) -> NDArray[np.float64]:
    return tensor.detach().to(device="cpu", dtype=torch.float64).numpy()


class _Reference(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, row_weight: Tensor, call: Call) -> tuple[Tensor, Tensor]:
        out, lse = call.forward(*map(_array, (q, k, v, row_weight)))
        ctx.save_for_backward(q, k, v, row_weight)
        ctx.call = call
        lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
        return torch.from_numpy(out).to(q), torch.from_numpy(lse).to(device=q.device, dtype=lse_dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        grads = ctx.call.backward(*map(_array, (*saved, grad_out, grad_lse)))
        return (*(torch.from_numpy(grad).to(like) for grad, like in zip(grads, saved, strict=True)), None)
