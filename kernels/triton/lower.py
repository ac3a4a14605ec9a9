"""Lowering: a plan's arrays as the few device tensors that the kernels read."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from canvas_engineering.errors import PlanError
from canvas_engineering.kernels.triton import layout
from canvas_engineering.plan import BlockSparsePlan
from canvas_engineering.plan.bits import pack_masks

_INT32_MAX = 2**31 - 1
_MAX_BLOCK = 256  # keys of the largest block


@dataclass(frozen=True)
class LoweredRows:
    """What the forward and the dQ kernel read: the plan seen from the queries.

    Attributes:
        rows: int32, the packed lists of ``layout.ROWS_*``.
        tokens: int32 token table: query tiles first, then kv tiles; one unused element for contiguous plans.
        masks: int32, the plan's masks in words of 32 keys, see :func:`mask_words`.
        row_weight: ``(num_sets, block_q)`` float32, the plan's own weights.
    """

    rows: torch.Tensor
    tokens: torch.Tensor
    masks: torch.Tensor
    row_weight: torch.Tensor
    num_q: int
    num_kv: int
    block_q: int
    block_kv: int
    q_tiles: int
    kv_tiles: int
    contiguous: bool
    many_sets: bool


def _pack(fields: dict[int, NDArray[np.integer]], header: int) -> NDArray[np.int32]:
    """One int32 array: a header of offsets, then the lists in the order of their field numbers."""
    lists = [fields[i] for i in range(header)]
    sizes = np.array([header] + [a.size for a in lists], np.int64)
    offsets = np.cumsum(sizes)
    if offsets[-1] > _INT32_MAX:
        raise PlanError(
            f"the plan must have at most {_INT32_MAX} list elements to run on the triton backend, got {offsets[-1]}"
        )
    # The kernels load one element past a list, ahead of the loop's end.
    return np.concatenate([offsets[:-1], *lists, [0]]).astype(np.int32)


def _positions(plan: BlockSparsePlan) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Per q tile and per kv tile: its first token (contiguous plans), or its place in the token table."""
    if plan.is_contiguous:
        # A tile of padding alone has no token; its count of 0 keeps any position unused.
        return np.maximum(plan.q_tokens[:, 0], 0).astype(np.int64), np.maximum(plan.kv_tokens[:, 0], 0).astype(np.int64)
    kv_start = plan.q_tokens.size
    return (
        np.arange(plan.num_q_tiles, dtype=np.int64) * plan.block_q,
        kv_start + np.arange(plan.num_kv_tiles, dtype=np.int64) * plan.block_kv,
    )


def _pointers(member: NDArray[np.bool_], ptr: NDArray[np.integer]) -> NDArray[np.int64]:
    """Pointers into the sub-list of the ``member`` entries, for lists that are cut up by ``ptr``."""
    return np.concatenate([[0], np.cumsum(member, dtype=np.int64)])[ptr]


def pack_rows(plan: BlockSparsePlan) -> NDArray[np.int32]:
    """The ``rows`` array; see ``layout``."""
    q_position, kv_position = _positions(plan)
    entry_count = plan.kv_count[plan.entry_kv]
    full = (plan.entry_mask < 0) & (entry_count == plan.block_kv)
    entry_position = kv_position[plan.entry_kv]
    return _pack(
        {
            layout.ROWS_WORK.value: plan.q_work,
            layout.ROWS_POSITION.value: q_position,
            layout.ROWS_COUNT.value: plan.q_count,
            layout.ROWS_SET_PTR.value: plan.set_ptr,
            layout.ROWS_SET_TILE.value: plan.set_tile,
            layout.ROWS_FULL_PTR.value: _pointers(full, plan.entry_ptr),
            layout.ROWS_FULL_POSITION.value: entry_position[full],
            layout.ROWS_PARTIAL_PTR.value: _pointers(~full, plan.entry_ptr),
            layout.ROWS_PARTIAL_POSITION.value: entry_position[~full],
            layout.ROWS_PARTIAL_COUNT.value: entry_count[~full],
            layout.ROWS_PARTIAL_MASK.value: _entry_masks(plan)[~full],
        },
        layout.ROWS_FIELDS.value,
    )


def pack_columns(plan: BlockSparsePlan) -> NDArray[np.int32]:
    """The ``columns`` array; see ``layout``."""
    q_position, kv_position = _positions(plan)
    transpose = plan.transpose
    entry_count = plan.q_count[transpose.entry_q]
    full = (transpose.entry_mask < 0) & (entry_count == plan.block_q)
    entry_position = q_position[transpose.entry_q]
    full_ptr = _pointers(full, transpose.entry_ptr)
    partial_ptr = _pointers(~full, transpose.entry_ptr)
    return _pack(
        {
            layout.COLUMNS_WORK.value: plan.kv_work,
            layout.COLUMNS_POSITION.value: kv_position,
            layout.COLUMNS_COUNT.value: plan.kv_count,
            layout.COLUMNS_FULL_BEGIN.value: full_ptr[:-1],
            layout.COLUMNS_FULL_END.value: full_ptr[1:],
            layout.COLUMNS_FULL_POSITION.value: entry_position[full],
            layout.COLUMNS_FULL_SET.value: transpose.entry_set[full],
            layout.COLUMNS_PARTIAL_BEGIN.value: partial_ptr[:-1],
            layout.COLUMNS_PARTIAL_END.value: partial_ptr[1:],
            layout.COLUMNS_PARTIAL_POSITION.value: entry_position[~full],
            layout.COLUMNS_PARTIAL_SET.value: transpose.entry_set[~full],
            layout.COLUMNS_PARTIAL_COUNT.value: entry_count[~full],
            layout.COLUMNS_PARTIAL_MASK.value: _entry_masks(plan)[transpose.entry][~full],
        },
        layout.COLUMNS_FIELDS.value,
    )


def _padding_pairs(plan: BlockSparsePlan) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """For each entry the number of its (rows, keys) pair among the distinct ones, and these pairs."""
    rows = plan.q_count.astype(np.int64)[plan.set_tile[plan.entry_set]]
    keys = plan.kv_count.astype(np.int64)[plan.entry_kv]
    pairs, number = np.unique(rows * (plan.block_kv + 1) + keys, return_inverse=True)
    return number, pairs // (plan.block_kv + 1), pairs % (plan.block_kv + 1)


def _entry_masks(plan: BlockSparsePlan) -> NDArray[np.int64]:
    """The mask of each entry; full tiles get one that allows all but their padding (see :func:`mask_words`)."""
    number, _, _ = _padding_pairs(plan)
    return np.where(plan.entry_mask < 0, plan.num_masks + number, plan.entry_mask)


def mask_words(plan: BlockSparsePlan) -> NDArray[np.int32]:
    """Masks as ``(masks, block_q, ceil(block_kv / 32))`` int32 words, flat: key ``j`` of a row is bit ``j % 32`` of
    its word ``j // 32``. First the plan's own, then one for every number of rows and keys that a tile has: a full
    tile with padding is a partial one to the kernels. A few unused words end the array, because the last block of
    a padded tile reads them.
    """
    _, rows, keys = _padding_pairs(plan)
    inside_rows = np.arange(plan.block_q) < rows[:, None]
    inside_keys = np.arange(plan.block_kv) < keys[:, None]
    masks = np.concatenate([plan.masks, pack_masks(inside_rows[:, :, None] & inside_keys[:, None, :])])
    words = -(-plan.block_kv // 32)
    packed = np.zeros((masks.shape[0], plan.block_q, 4 * words), np.uint8)
    packed[:, :, : plan.block_kv // 8] = masks
    return np.concatenate([packed.view("<i4").astype(np.int32).ravel(), np.zeros(_MAX_BLOCK // 32, np.int32)])


def lower_rows(plan: BlockSparsePlan, device: torch.device) -> LoweredRows:
    """The plan's tensors on ``device``, made once per plan and device."""

    def lower(plan: BlockSparsePlan) -> LoweredRows:
        if plan.row_weight.size > _INT32_MAX:
            raise PlanError(
                f"the plan must have at most {_INT32_MAX} row weights to run on the triton backend, "
                f"got {plan.row_weight.size}"
            )
        tokens = np.zeros(1, np.int32)
        if not plan.is_contiguous:
            # Padding becomes token 0: safe to load, and left out by counts and masks.
            tokens = np.maximum(np.concatenate([plan.q_tokens.ravel(), plan.kv_tokens.ravel()]), 0)
        return LoweredRows(
            rows=_to(pack_rows(plan), device),
            tokens=_to(tokens, device),
            masks=_to(mask_words(plan), device),
            row_weight=_to(plan.row_weight, device),
            num_q=plan.num_q,
            num_kv=plan.num_kv,
            block_q=plan.block_q,
            block_kv=plan.block_kv,
            q_tiles=plan.num_q_tiles,
            kv_tiles=plan.num_kv_tiles,
            contiguous=plan.is_contiguous,
            many_sets=plan.max_sets > 1,
        )

    return plan.lowered(("triton", "rows", str(device)), lower)


def lower_columns(plan: BlockSparsePlan, device: torch.device) -> torch.Tensor:
    """The packed lists of ``layout.COLUMNS_*`` on ``device``; only the backward pass needs them."""
    return plan.lowered(("triton", "columns", str(device)), lambda plan: _to(pack_columns(plan), device))


def _to(array: NDArray[np.generic], device: torch.device) -> torch.Tensor:
    # Copied: the plan's arrays may be read-only, and torch tensors cannot be.
    return torch.from_numpy(np.array(array)).to(device)
