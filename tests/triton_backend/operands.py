"""Small plans and operands for calls of the backend."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from equivalence.build import plan_from_dense

from canvas_engineering import block_sparse_attention
from canvas_engineering.plan import BlockSparsePlan

Operands = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def two_sets() -> BlockSparsePlan:
    """21 queries, 27 keys: two weighted softmax sets, full and partial tiles, padding, rows without keys."""
    masks = np.zeros((2, 21, 27), np.bool_)
    masks[0, :16, :20] = True
    masks[1, 6:19, 5::2] = True
    weights = np.random.default_rng(0).uniform(0.2, 1.0, masks.shape[:2])
    return plan_from_dense(masks, weights, block_q=16, block_kv=16)


def one_set() -> BlockSparsePlan:
    """A band of 21 queries and 27 keys, whose last rows have no keys."""
    mask = np.abs(np.arange(21)[:, None] - np.arange(27)) < 7
    mask[19:] = False
    return plan_from_dense(mask[None], block_q=16, block_kv=16)


def operands(
    plan: BlockSparsePlan,
    device: str,
    *,
    batch: int = 2,
    heads: tuple[int, int] = (2, 1),
    head_dim: int = 8,
    dtype: torch.dtype = torch.float32,
    requires_grad: bool = False,
) -> Operands:
    """Standard normal q, k and v, the same on every call."""
    rng = np.random.default_rng(1)

    def tensor(count: int, tokens: int) -> torch.Tensor:
        values = torch.from_numpy(rng.standard_normal((batch, count, tokens, head_dim)))
        return values.to(device=device, dtype=dtype).requires_grad_(requires_grad)

    return tensor(heads[0], plan.num_q), tensor(heads[1], plan.num_kv), tensor(heads[1], plan.num_kv)


def weights(plan: BlockSparsePlan, device: str, *, requires_grad: bool = False) -> torch.Tensor:
    """Other row weights than the plan's."""
    return torch.from_numpy(plan.row_weight * 2 + 0.25).to(device).requires_grad_(requires_grad)


def triton(*arguments: Any, **options: Any) -> Any:
    """``block_sparse_attention(q, k, v, plan)`` by the backend under test."""
    return block_sparse_attention(*arguments, backend="triton", **options)


def portable(*arguments: Any, **options: Any) -> Any:
    """The same by the backend that it is compared with."""
    return block_sparse_attention(*arguments, backend="portable", **options)
