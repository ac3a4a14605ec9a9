"""``F.scaled_dot_product_attention``: once with a dense mask, or once per group."""

from __future__ import annotations

import time

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.memory import too_large
from bench.pairs import Pairs
from bench.roofline import Phase
from bench.variant import Absent, TorchVariant

MASKED = "masked SDPA"
PER_GROUP = "SDPA per group"


def masked(pairs: Pairs, leaves: dict[str, Tensor], grad_out: Tensor, phase: Phase, device: str) -> TorchVariant:
    """One call with a boolean mask ``(N, N)``; joint softmax."""
    # The mask, and what torch makes of it: numbers to add to the scores.
    why = too_large(pairs.num_tokens**2 * (1 + 2 * leaves["q"].element_size()), device)
    if why:
        raise Absent(f"its mask of {pairs.num_tokens:,} x {pairs.num_tokens:,} {why}")
    start = time.perf_counter()
    mask = torch.from_numpy(pairs.dense()).to(device)
    took = time.perf_counter() - start
    return TorchVariant(
        MASKED,
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=mask),
        leaves,
        grad_out,
        phase,
        device,
        {"mask": took},
    )


def per_group(pairs: Pairs, leaves: dict[str, Tensor], grad_out: Tensor, phase: Phase, device: str) -> TorchVariant:
    """One call per group, outputs summed with the groups' weights; a softmax per connection."""
    start = time.perf_counter()
    steps = [
        (
            torch.from_numpy(group.rows).to(device),
            torch.from_numpy(group.cols).to(device),
            torch.from_numpy(weight).to(device, leaves["q"].dtype)[:, None],
            None if group.pattern is None else torch.from_numpy(group.pattern.dense()).to(device),
        )
        for group, weight in zip(pairs.groups, pairs.weights, strict=True)
    ]
    took = time.perf_counter() - start

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = torch.zeros_like(q)
        for rows, cols, weight, mask in steps:
            mine = F.scaled_dot_product_attention(q[:, :, rows], k[:, :, cols], v[:, :, cols], attn_mask=mask)
            # In place: the sum itself saves nothing for the backward pass.
            out.index_add_(2, rows, mine * weight)
        return out

    return TorchVariant(PER_GROUP, call, leaves, grad_out, phase, device, {"mask": took})
