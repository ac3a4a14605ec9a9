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
class LoweredPlan:
    """What the forward and the dQ kernel read: the plan seen from the queries.

    Attributes:
        rows: int32, the packed lists of ``layout.ROWS_*``.
        tokens: int32 token table: query tiles first, then kv tiles; one unused element for contiguous plans.
        masks: int32, the masks in words of 32 keys, see :func:`mask_words`.
        row_weight: ``(num_sets, block_q)`` float32, the plan's own weights.
        contiguous: Whether every tile is a slice of the tokens.
        many_sets: Whether a q tile may have more than one softmax set.
    """

    rows: torch.Tensor
    tokens: torch.Tensor
    masks: torch.Tensor
    row_weight: torch.Tensor
    block_q: int
    block_kv: int
    q_tiles: int
    kv_tiles: int
    contiguous: bool
    many_sets: bool


def _pack(lists: dict[int, NDArray[np.integer]]) -> NDArray[np.int32]:
    """One int32 array: a header of offsets, then the lists in the order of their field numbers."""
    ordered = [lists[i].ravel() for i in range(len(lists))]
    offsets = np.cumsum([len(lists), *(a.size for a in ordered)])
    if offsets[-1] >= _INT32_MAX - layout.ENTRY_SIZE.value:
        raise PlanError(f"the triton backend needs a plan of fewer than {_INT32_MAX} list elements, got {offsets[-1]}")
    # The kernels load one entry past the last, ahead of the loop's end.
    return np.concatenate([offsets[:-1], *ordered, np.zeros(layout.ENTRY_SIZE.value)]).astype(np.int32)


def _positions(plan: BlockSparsePlan) -> tuple[NDArray[np.integer], NDArray[np.integer]]:
    """Per q tile and per kv tile: its first token (contiguous plans), or its place in the token table."""
    if plan.is_contiguous:
        return plan.q_tokens[:, 0], plan.kv_tokens[:, 0]
    kv_start = plan.q_tokens.size
    return (
        np.arange(plan.num_q_tiles) * plan.block_q,
        kv_start + np.arange(plan.num_kv_tiles) * plan.block_kv,
    )


def _padding(plan: BlockSparsePlan) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """The distinct (rows, keys) of the visited tiles, and which of them each entry has."""
    rows = plan.q_count.astype(np.int64)[plan.set_tile[plan.entry_set]]
    keys = plan.kv_count.astype(np.int64)[plan.entry_kv]
    pairs, which = np.unique(rows * (plan.block_kv + 1) + keys, return_inverse=True)
    return pairs // (plan.block_kv + 1), pairs % (plan.block_kv + 1), which


def _entry_masks(plan: BlockSparsePlan) -> NDArray[np.int64]:
    """The mask of each entry; a full tile with padding gets one that leaves the padding out."""
    rows, keys, which = _padding(plan)
    unpadded = (rows == plan.block_q) & (keys == plan.block_kv)
    of_full_tile = np.where(unpadded, -1, plan.num_masks + np.arange(rows.size))[which]
    return np.where(plan.entry_mask < 0, of_full_tile, plan.entry_mask)


def mask_words(plan: BlockSparsePlan) -> NDArray[np.int32]:
    """Masks as ``(masks, block_q, ceil(block_kv / 32))`` int32 words, flat: key ``j`` of a row is bit ``j % 32`` of
    its word ``j // 32``.

    First the plan's own, then one for every number of rows and keys that a tile has. A few unused words end the
    array, because the last block of a padded tile reads them.
    """
    rows, keys, _ = _padding(plan)
    inside_rows = np.arange(plan.block_q) < rows[:, None]
    inside_keys = np.arange(plan.block_kv) < keys[:, None]
    masks = np.concatenate([plan.masks, pack_masks(inside_rows[:, :, None] & inside_keys[:, None, :])])
    words = -(-plan.block_kv // 32)
    packed = np.zeros((masks.shape[0], plan.block_q, 4 * words), np.uint8)
    packed[:, :, : plan.block_kv // 8] = masks
    return np.concatenate([packed.view("<i4").astype(np.int32).ravel(), np.zeros(_MAX_BLOCK // 32, np.int32)])


def pack_rows(plan: BlockSparsePlan) -> NDArray[np.int32]:
    """The ``rows`` array; see ``layout``."""
    q_position, kv_position = _positions(plan)
    return _pack(
        {
            layout.ROWS_WORK.value: plan.q_work,
            layout.ROWS_POSITION.value: q_position,
            layout.ROWS_COUNT.value: plan.q_count,
            layout.ROWS_SET_PTR.value: plan.set_ptr,
            layout.ROWS_SET_TILE.value: plan.set_tile,
            layout.ROWS_BEGIN.value: plan.entry_ptr[:-1],
            layout.ROWS_END.value: plan.entry_ptr[1:],
            layout.ROWS_ENTRY.value: _entries(
                kv_position[plan.entry_kv], plan.kv_count[plan.entry_kv], _entry_masks(plan), plan.entry_set
            ),
        }
    )


def pack_columns(plan: BlockSparsePlan) -> NDArray[np.int32]:
    """The ``columns`` array; see ``layout``."""
    q_position, kv_position = _positions(plan)
    seen = plan.transpose
    return _pack(
        {
            layout.COLUMNS_WORK.value: plan.kv_work,
            layout.COLUMNS_POSITION.value: kv_position,
            layout.COLUMNS_COUNT.value: plan.kv_count,
            layout.COLUMNS_BEGIN.value: seen.entry_ptr[:-1],
            layout.COLUMNS_END.value: seen.entry_ptr[1:],
            layout.COLUMNS_ENTRY.value: _entries(
                q_position[seen.entry_q], plan.q_count[seen.entry_q], _entry_masks(plan)[seen.entry], seen.entry_set
            ),
        }
    )


def _entries(
    position: NDArray[np.integer],
    count: NDArray[np.integer],
    mask: NDArray[np.integer],
    softmax_set: NDArray[np.integer],
) -> NDArray[np.integer]:
    """``(entries, ENTRY_SIZE)``."""
    columns = {
        layout.ENTRY_POSITION.value: position,
        layout.ENTRY_COUNT.value: count,
        layout.ENTRY_MASK.value: mask,
        layout.ENTRY_SET.value: softmax_set,
    }
    return np.stack([columns[i] for i in range(layout.ENTRY_SIZE.value)], axis=1)


def lower_plan(plan: BlockSparsePlan, device: torch.device) -> LoweredPlan:
    """The plan's tensors on ``device``, made once per plan and device.

    Raises:
        PlanError: The plan has more list elements or weights than 32-bit indices reach.
    """

    def lower(plan: BlockSparsePlan) -> LoweredPlan:
        if plan.row_weight.size > _INT32_MAX:
            raise PlanError(
                f"the triton backend needs a plan of at most {_INT32_MAX} row weights, got {plan.row_weight.size}"
            )
        tokens = np.zeros(1, np.int32)
        if not plan.is_contiguous:
            # Padding becomes token 0: safe to load, and left out by counts and masks.
            tokens = np.maximum(np.concatenate([plan.q_tokens.ravel(), plan.kv_tokens.ravel()]), 0)
        return LoweredPlan(
            rows=_to(pack_rows(plan), device),
            tokens=_to(tokens, device),
            masks=_to(mask_words(plan), device),
            row_weight=_to(plan.row_weight, device),
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
