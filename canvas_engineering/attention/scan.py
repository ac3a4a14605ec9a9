"""The linear recurrence ``h[t] = a[t] * h[t-1] + b[t]`` along time, for all channels at once.

Time is cut into about sqrt(M) chunks. The same step of all chunks is one operation, so the number of
operations is about 3 sqrt(M) instead of M. First every chunk is reduced to its product and its last value
with no memory of the past, then the chunks are chained, then every chunk runs again from its true start
(the work-efficient scan of Blelloch, CMU-CS-90-190, with chunks for levels). There is no division and no
exponential of a sum, so long sequences lose no range.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

#: Below this length a chunked scan has more operations than a plain one.
SHORT = 16


def linear_scan(a: Tensor, b: Tensor, initial: Tensor | None = None) -> Tensor:
    """``h[:, t] = a[:, t] * h[:, t-1] + b[:, t]`` with ``h[:, -1] = initial`` (zeros when None).

    Args:
        a: factors, broadcastable to ``b``.
        b: inputs, (B, M, X).
        initial: state before the first step, (B, X).

    Returns:
        All states, (B, M, X). Differentiable, also twice; the backward pass is a scan in the other direction.
    """
    if initial is None:
        initial = b.new_zeros(b.shape[0], b.shape[2])
    if b.shape[1] == 0:
        return b
    return _linear_scan(a.expand_as(b), b, initial, False)


# An operator of its own, so that torch.compile takes the scan as one node instead of unrolling its loops.
@torch.library.custom_op("canvas_engineering::linear_scan", mutates_args=())
def _linear_scan(a: Tensor, b: Tensor, initial: Tensor, reverse: bool) -> Tensor:
    """The scan, forward in time or, with ``reverse``, backward: ``h[t] = a[t] * h[t+1] + b[t]``."""
    return _scan(a, b, initial, reverse)


@_linear_scan.register_fake
def _(a: Tensor, b: Tensor, initial: Tensor, reverse: bool) -> Tensor:
    return b.new_empty(b.shape)


def _save_for_backward(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, bool], output: Tensor) -> None:
    a, _, initial, ctx.reverse = inputs
    ctx.save_for_backward(a, initial, output)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
    a, initial, h = ctx.saved_tensors
    reverse = ctx.reverse
    first = -1 if reverse else 0
    # grad_b[t] = grad[t] + a[t+1] * grad_b[t+1]; the factor that roll() wraps around meets a zero state.
    a_next = a.roll(1 if reverse else -1, dims=1)
    grad_b = _linear_scan(a_next, grad, torch.zeros_like(initial), not reverse)
    h_before = torch.cat((h[:, 1:], initial.unsqueeze(1)) if reverse else (initial.unsqueeze(1), h[:, :-1]), dim=1)
    return grad_b * h_before, grad_b, a[:, first] * grad_b[:, first], None


_linear_scan.register_autograd(_backward, setup_context=_save_for_backward)


def _scan(a: Tensor, b: Tensor, initial: Tensor, reverse: bool) -> Tensor:
    n_steps = b.shape[1]
    length = math.isqrt(n_steps) if n_steps > SHORT else 1
    n_chunks = n_steps // length if length > 1 else 0
    chunked = n_chunks * length
    h = torch.empty(b.shape, dtype=b.dtype, device=b.device)
    state = initial

    def ordered(count: int) -> range:
        return range(count - 1, -1, -1) if reverse else range(count)

    if n_chunks:
        # The steps that fill whole chunks come first in the direction of the scan.
        part = slice(n_steps - chunked, None) if reverse else slice(0, chunked)
        a_part, b_part, h_part = (x[:, part].unflatten(1, (n_chunks, length)) for x in (a, b, h))
        head, *rest = ordered(length)
        product, local = a_part[:, :, head].clone(), b_part[:, :, head].clone()  # (B, chunks, X)
        for t in rest:
            torch.addcmul(b_part[:, :, t], a_part[:, :, t], local, out=local)
            product.mul_(a_part[:, :, t])
        before = torch.empty_like(local)
        for c in ordered(n_chunks):
            before[:, c] = state
            state = torch.addcmul(local[:, c], product[:, c], state)
        previous = before
        for t in ordered(length):
            previous = torch.addcmul(b_part[:, :, t], a_part[:, :, t], previous, out=h_part[:, :, t])
    leftover = slice(0, n_steps - chunked) if reverse else slice(chunked, None)
    a_rest, b_rest, h_rest = a[:, leftover], b[:, leftover], h[:, leftover]
    for t in ordered(n_steps - chunked):
        state = torch.addcmul(b_rest[:, t], a_rest[:, t], state, out=h_rest[:, t])
    return h
