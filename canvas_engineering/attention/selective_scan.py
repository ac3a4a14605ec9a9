"""The selective scan of Mamba: a linear recurrence whose factors depend on the input.

The states, ``s`` numbers per channel and step, are by far the largest thing here. They live for one block of batch
elements and steps only, small enough for a cache; the backward pass computes them again from the state that the
block began with. So memory is that of the inputs, plus one state per segment of time.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from canvas_engineering.attention.scan import linear_scan_gradients, scan_into

#: State elements (batch * steps * channels * state) of one block on a CPU.
BLOCK_ELEMENTS = 1 << 18
#: The same on a device, where starting an operation costs more than leaving the cache.
DEVICE_BLOCK_ELEMENTS = 1 << 24
#: Steps of one block at least, where there are as many; each segment of time costs memory for its first state.
BLOCK_STEPS = 32


def selective_scan(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """``h[t] = exp(a dt[t]) h[t-1] + dt[t] b[t] x[t]``, ``y[t] = c[t] · h[t]`` (arXiv:2312.00752, section 3).

    Args:
        x, dt: inputs and step sizes, (B, M, d).
        a: decay rates, (d, s), negative.
        b, c: input and output maps, (B, M, s).

    Returns:
        y, (B, M, d). Differentiable once.
    """
    y: Tensor = _selective_scan(x, dt, a, b, c)[0]
    return y


def _block_size(x: Tensor, a: Tensor) -> tuple[int, int]:
    """Batch elements and steps of one block."""
    batch, n_steps, _ = x.shape
    elements = BLOCK_ELEMENTS if x.device.type == "cpu" else DEVICE_BLOCK_ELEMENTS
    steps = min(n_steps, max(BLOCK_STEPS, elements // max(1, batch * a.numel())))
    return max(1, elements // max(1, steps * a.numel())), max(1, steps)


def _blocks(x: Tensor, a: Tensor, *, reverse: bool = False) -> Iterator[tuple[int, slice, slice]]:
    """Number of the segment of time, batch elements and steps of every block, in order of time (or against it)."""
    batch, n_steps, _ = x.shape
    size, length = _block_size(x, a)
    segments = list(enumerate(range(0, n_steps, length)))
    for first in range(0, batch, size):
        for number, start in reversed(segments) if reverse else segments:
            yield number, slice(first, first + size), slice(start, start + length)


def _states(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
    """The factors and the states of one segment that begins at ``start`` (B, d * s): (B, m, d, s) both."""
    decay = (dt.unsqueeze(-1) * a).exp_()
    inputs = (dt * x).unsqueeze(-1) * b.unsqueeze(2)
    h = torch.empty_like(inputs)
    scan_into(h.flatten(2), decay.flatten(2), inputs.flatten(2), start)
    return decay, h


# Operators of their own, so that torch.compile takes a scan as one node instead of unrolling its loops.
@torch.library.custom_op("canvas_engineering::selective_scan", mutates_args=())
def _selective_scan(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """y, and the state at the start of every segment of time, (segments, B, d * s)."""
    y, starts = _empty_outputs(x, a)
    for number, rows, steps in _blocks(x, a):
        if number == 0:
            starts[0, rows] = 0.0
        _, h = _states(x[rows, steps], dt[rows, steps], a, b[rows, steps], starts[number, rows])
        if number + 1 < starts.shape[0]:
            starts[number + 1, rows] = h[:, -1].flatten(1)
        y[rows, steps] = h.mul_(c[rows, steps].unsqueeze(2)).sum(-1)
    return y, starts


@torch.library.custom_op("canvas_engineering::selective_scan_backward", mutates_args=())
def _selective_scan_backward(
    grad: Tensor, x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, starts: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, dt, a, b and c."""
    grad_x, grad_dt, grad_b, grad_c = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (x, dt, b, c))
    grad_a = torch.zeros_like(a)
    grad_after = starts[:0]  # gradient of the state that a block hands to the next in time
    for number, rows, steps in _blocks(x, a, reverse=True):
        start, x_part, dt_part, b_part, grad_part = starts[number, rows], *(t[rows, steps] for t in (x, dt, b, grad))
        decay, h = _states(x_part, dt_part, a, b_part, start)
        grad_h = grad_part.unsqueeze(-1) * c[rows, steps].unsqueeze(2)  # (B, m, d, s), as all that follow
        if number + 1 < starts.shape[0]:
            grad_h[:, -1] += grad_after.view_as(grad_h[:, -1])
        grad_decay, grad_inputs, grad_after = (
            t.unflatten(-1, a.shape)
            for t in linear_scan_gradients(decay.flatten(2), start, h.flatten(2), grad_h.flatten(2))
        )
        # Products go to tensors that are no longer needed; sums of products beat matrix products at these sizes.
        grad_c[rows, steps] = torch.mul(h, grad_part.unsqueeze(-1), out=h).sum(2)
        grad_product = torch.mul(grad_inputs, b_part.unsqueeze(2), out=grad_h).sum(-1)  # gradient of dt * x
        grad_b[rows, steps] = grad_inputs.mul_((dt_part * x_part).unsqueeze(-1)).sum(2)
        grad_exponent = decay.mul_(grad_decay)  # gradient of a * dt
        grad_a += torch.mul(grad_exponent, dt_part.unsqueeze(-1), out=grad_h).sum((0, 1))
        grad_dt[rows, steps] = grad_exponent.mul_(a).sum(-1).addcmul_(grad_product, x_part)
        grad_x[rows, steps] = grad_product.mul_(dt_part)
    return grad_x, grad_dt, grad_a, grad_b, grad_c


def _empty_outputs(x: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    n_segments = -(-x.shape[1] // _block_size(x, a)[1])
    return x.new_empty(x.shape), x.new_empty(n_segments, x.shape[0], a.numel())


@_selective_scan.register_fake
def _(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    return _empty_outputs(x, a)


@_selective_scan_backward.register_fake
def _(
    grad: Tensor, x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, starts: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), dt.new_empty(dt.shape), torch.empty_like(a), b.new_empty(b.shape), c.new_empty(c.shape)


def _save_for_backward(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)  # the starts have no gradient, and may be large
    ctx.save_for_backward(*inputs, output[1])


def _backward(ctx: Any, grad: Tensor | None, _grad_starts: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 5
    grads: tuple[Tensor, ...] = _selective_scan_backward(grad, *ctx.saved_tensors)
    return grads


_selective_scan.register_autograd(_backward, setup_context=_save_for_backward)
