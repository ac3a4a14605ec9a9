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
        All states, (B, M, X). Differentiable once; the backward pass is a scan in the other direction.
    """
    if initial is None:
        initial = b.new_zeros(b.shape[0], b.shape[2])
    if b.shape[1] == 0:
        return b
    return _linear_scan(a.expand_as(b), b, initial)


def linear_scan_gradients(a: Tensor, initial: Tensor, h: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``a``, ``b`` and ``initial``, given the states ``h`` and their gradient, without autograd.

    ``grad_b[t] = grad[t] + a[t+1] * grad_b[t+1]``, a scan backward in time.
    """
    grad_b = torch.empty(h.shape, dtype=h.dtype, device=h.device)
    grad_b[:, -1] = grad[:, -1]
    scan_into(grad_b[:, :-1], a[:, 1:], grad[:, :-1], grad_b[:, -1], reverse=True)
    grad_a = torch.empty_like(grad_b)
    torch.mul(grad_b[:, 0], initial, out=grad_a[:, 0])
    torch.mul(grad_b[:, 1:], h[:, :-1], out=grad_a[:, 1:])
    return grad_a, grad_b, a[:, 0] * grad_b[:, 0]


# Operators of their own, so that torch.compile takes a scan as one node instead of unrolling its loops.
@torch.library.custom_op("canvas_engineering::linear_scan", mutates_args=())
def _linear_scan(a: Tensor, b: Tensor, initial: Tensor) -> Tensor:
    h = torch.empty(b.shape, dtype=b.dtype, device=b.device)
    scan_into(h, a, b, initial)
    return h


@torch.library.custom_op("canvas_engineering::linear_scan_backward", mutates_args=())
def _linear_scan_backward(a: Tensor, initial: Tensor, h: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return linear_scan_gradients(a, initial, h, grad)


@_linear_scan.register_fake
def _(a: Tensor, b: Tensor, initial: Tensor) -> Tensor:
    return b.new_empty(b.shape)


@_linear_scan_backward.register_fake
def _(a: Tensor, initial: Tensor, h: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return h.new_empty(h.shape), h.new_empty(h.shape), initial.new_empty(initial.shape)


def _save_for_backward(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    a, _, initial = inputs
    ctx.save_for_backward(a, initial, output)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    grads: tuple[Tensor, Tensor, Tensor] = _linear_scan_backward(*ctx.saved_tensors, grad)
    return grads


_linear_scan.register_autograd(_backward, setup_context=_save_for_backward)


def scan_into(h: Tensor, a: Tensor, b: Tensor, initial: Tensor, *, reverse: bool = False) -> None:
    """Write the scan to ``h`` (B, M, X), without autograd; with ``reverse``, ``h[t] = a[t] * h[t+1] + b[t]``."""
    n_steps = b.shape[1]
    length = math.isqrt(n_steps) if n_steps > SHORT else 1
    n_chunks = n_steps // length if length > 1 else 0
    chunked = n_chunks * length
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
