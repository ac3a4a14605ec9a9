"""Checks that a plan must pass before a kernel may see it, whoever made it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from canvas_engineering.errors import PlanError

if TYPE_CHECKING:
    from canvas_engineering.plan.plan import BlockSparsePlan


def _require(ok: bool | np.bool_, message: str) -> None:
    if not ok:
        raise PlanError(f"invalid plan: {message}")


def _check_shape(name: str, array: NDArray[np.generic], shape: tuple[int, ...]) -> None:
    _require(array.shape == shape, f"{name} must have shape {shape}, got {array.shape}")


def _check_range(name: str, array: NDArray[np.integer], low: int, high: int) -> None:
    """All values in ``low..high-1``."""
    if array.size:
        worst = int(array.min()) if array.min() < low else int(array.max())
        _require(low <= worst < high, f"{name} must lie in [{low}, {high}), got {worst}")


def _check_pointers(name: str, pointers: NDArray[np.integer], count: int) -> None:
    _require(pointers.size > 0 and pointers[0] == 0, f"{name} must start with 0")
    _require((np.diff(pointers) >= 0).all(), f"{name} must not decrease")
    _require(pointers[-1] == count, f"{name} must end with {count}, got {int(pointers[-1])}")


def _check_tokens(name: str, tokens: NDArray[np.int32], num_tokens: int, block: int) -> None:
    _require(tokens.ndim == 2 and tokens.shape[1] == block, f"{name} must be (tiles, {block}), got {tokens.shape}")
    _check_range(name, tokens, -1, num_tokens)
    real = tokens >= 0
    _require((real[:, :-1] | ~real[:, 1:]).all(), f"{name} must hold padding (-1) at a tile's end only")
    counts = np.bincount(tokens[real], minlength=num_tokens)
    if not (counts == 1).all():
        token = int(np.flatnonzero(counts != 1)[0])
        raise PlanError(
            f"invalid plan: {name} must hold every token once, got token {token} {int(counts[token])} times"
        )


def validate_plan(plan: BlockSparsePlan) -> None:
    """See :meth:`BlockSparsePlan.validate`."""
    from canvas_engineering.plan.plan import ARRAY_FIELDS

    for name in ("num_q", "num_kv", "block_q", "block_kv"):
        value = getattr(plan, name)
        _require(isinstance(value, int) and value >= 0, f"{name} must be a non-negative int, got {value!r}")
    for name in ("block_q", "block_kv"):
        value = getattr(plan, name)
        _require(value > 0 and value % 8 == 0, f"{name} must be a positive multiple of 8, got {value}")
    _require(plan.softmax in ("connection", "joint"), f'softmax must be "connection" or "joint", got {plan.softmax!r}')
    for name, dtype in ARRAY_FIELDS.items():
        array = getattr(plan, name)
        _require(array.dtype == np.dtype(dtype), f"{name} must be {np.dtype(dtype)}, got {array.dtype}")

    _check_tokens("q_tokens", plan.q_tokens, plan.num_q, plan.block_q)
    _check_tokens("kv_tokens", plan.kv_tokens, plan.num_kv, plan.block_kv)
    _check_shape("set_ptr", plan.set_ptr, (plan.num_q_tiles + 1,))
    _require(plan.row_weight.ndim == 2, f"row_weight must have two dimensions, got {plan.row_weight.ndim}")
    _check_shape("row_weight", plan.row_weight, (plan.num_sets, plan.block_q))
    _check_shape("row_connection", plan.row_connection, (plan.num_sets, plan.block_q))
    _check_shape("entry_ptr", plan.entry_ptr, (plan.num_sets + 1,))
    _check_shape("entry_mask", plan.entry_mask, (plan.num_entries,))
    _require(plan.masks.ndim == 3, f"masks must have three dimensions, got {plan.masks.ndim}")
    _check_shape("masks", plan.masks, (plan.num_masks, plan.block_q, plan.block_kv // 8))
    _check_pointers("set_ptr", plan.set_ptr, plan.num_sets)
    _check_pointers("entry_ptr", plan.entry_ptr, plan.num_entries)
    _check_range("entry_kv", plan.entry_kv, 0, plan.num_kv_tiles)
    _check_range("entry_mask", plan.entry_mask, -1, plan.num_masks)
    _check_range("row_connection", plan.row_connection, -1, np.iinfo(np.int32).max)
    if plan.num_entries:
        same_set = plan.entry_set[1:] == plan.entry_set[:-1]
        _require((~same_set | (np.diff(plan.entry_kv) > 0)).all(), "entry_kv must ascend within each softmax set")
    _require(np.isfinite(plan.row_weight).all(), "row_weight must be finite")
    _check_mask_padding(plan)


def _check_mask_padding(plan: BlockSparsePlan) -> None:
    """Mask bits at padding keys and rows are 0: kernels rely on it, and so do the statistics."""
    partial = plan.entry_mask >= 0
    if not partial.any():
        return
    q_tile = plan.set_tile[plan.entry_set[partial]]
    # Every mask must fit the least filled tiles it is used with.
    keys = np.full(plan.num_masks, plan.block_kv, np.int64)
    rows = np.full(plan.num_masks, plan.block_q, np.int64)
    np.minimum.at(keys, plan.entry_mask[partial], plan.kv_count[plan.entry_kv[partial]])
    np.minimum.at(rows, plan.entry_mask[partial], plan.q_count[q_tile])
    for i in np.flatnonzero((keys < plan.block_kv) | (rows < plan.block_q)):
        mask = plan.tile_mask(int(i))
        _require(
            not mask[:, keys[i] :].any() and not mask[rows[i] :].any(), f"masks[{i}] must be 0 at padding rows and keys"
        )
