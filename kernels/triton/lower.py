"""Lowering: a plan's arrays as the few device tensors that the kernels read."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
import triton.language as tl
from numpy.typing import NDArray

from canvas_engineering.errors import PlanError
from canvas_engineering.kernels.triton import layout
from canvas_engineering.plan import BlockSparsePlan
from canvas_engineering.plan.bits import pack_masks

Lowered = TypeVar("Lowered")

_INT32_MAX = 2**31 - 1
_MAX_BLOCK = 256  # keys of the largest block
_MIN_BLOCK = 32  # of tiles that are more than one block


@dataclass(frozen=True)
class LoweredPlan:
    """What a call needs of its plan; the backward pass also needs :func:`lower_columns`.

    Attributes:
        rows: int32, the plan seen from the queries, packed as in ``layout``.
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


def _records(size: tl.constexpr, fields: dict[tl.constexpr, NDArray[np.integer]]) -> NDArray[np.int64]:
    """Records of ``size`` words, flat; fields that are not given are 0."""
    (count,) = {array.size for array in fields.values()}
    records = np.zeros((count, size.value), np.int64)
    for field, array in fields.items():
        records[:, field.value] = array
    return records.ravel()


def _packed(*parts: NDArray[np.int64]) -> NDArray[np.int32]:
    """The parts of an array one after the other, and one unused entry: kernels read ahead of a loop's end."""
    array = np.concatenate([*parts, np.zeros(layout.ENTRY_SIZE.value, np.int64)])
    if array.size > _INT32_MAX:
        raise PlanError(f"the triton backend needs a plan of at most {_INT32_MAX} list elements, got {array.size}")
    return array.astype(np.int32)


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
    work = plan.q_work
    return _packed(
        _records(
            layout.Q_TILE_SIZE,
            {
                layout.Q_TILE_POSITION: q_position[work],
                layout.Q_TILE_COUNT: plan.q_count[work],
                layout.Q_TILE_FIRST_SET: plan.set_ptr[:-1][work],
                layout.Q_TILE_LAST_SET: plan.set_ptr[1:][work],
                layout.Q_TILE_FIRST_ENTRY: plan.entry_ptr[plan.set_ptr[:-1][work]],
            },
        ),
        _records(
            layout.SET_SIZE,
            {
                layout.SET_LAST_ENTRY: plan.entry_ptr[1:],
                layout.SET_POSITION: q_position[plan.set_tile],
                layout.SET_COUNT: plan.q_count[plan.set_tile],
            },
        ),
        _entries(kv_position[plan.entry_kv], plan.kv_count[plan.entry_kv], _entry_masks(plan), plan.entry_set),
    )


def pack_columns(plan: BlockSparsePlan) -> NDArray[np.int32]:
    """The ``columns`` array; see ``layout``."""
    q_position, kv_position = _positions(plan)
    seen = plan.transpose
    work = plan.kv_work
    return _packed(
        _records(
            layout.KV_TILE_SIZE,
            {
                layout.KV_TILE_POSITION: kv_position[work],
                layout.KV_TILE_COUNT: plan.kv_count[work],
                layout.KV_TILE_FIRST_ENTRY: seen.entry_ptr[:-1][work],
                layout.KV_TILE_LAST_ENTRY: seen.entry_ptr[1:][work],
            },
        ),
        _entries(q_position[seen.entry_q], plan.q_count[seen.entry_q], _entry_masks(plan)[seen.entry], seen.entry_set),
    )


def _entries(
    position: NDArray[np.integer],
    count: NDArray[np.integer],
    mask: NDArray[np.integer],
    softmax_set: NDArray[np.integer],
) -> NDArray[np.int64]:
    return _records(
        layout.ENTRY_SIZE,
        {
            layout.ENTRY_POSITION: position,
            layout.ENTRY_COUNT: count,
            layout.ENTRY_MASK: mask,
            layout.ENTRY_SET: softmax_set,
        },
    )


def lower_plan(plan: BlockSparsePlan, device: torch.device) -> LoweredPlan:
    """The plan's tensors on ``device``, made once per plan and device.

    Raises:
        PlanError: The plan has more list elements, weights or steps than 32-bit indices reach.
    """

    def lower(plan: BlockSparsePlan) -> LoweredPlan:
        blocks = -(-max(plan.block_q, plan.block_kv) // _MIN_BLOCK)
        for what, count in (("row weights", plan.row_weight.size), ("blocks of tiles", plan.num_entries * blocks)):
            if count > _INT32_MAX:
                raise PlanError(f"the triton backend needs a plan of at most {_INT32_MAX} {what}, got {count}")
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

    return _kept(plan, ("triton", "rows", str(device)), lower)


def lower_columns(plan: BlockSparsePlan, device: torch.device) -> torch.Tensor:
    """The plan seen from the keys, packed as in ``layout``, on ``device``; only the backward pass needs it."""
    return _kept(plan, ("triton", "columns", str(device)), lambda plan: _to(pack_columns(plan), device))


def _kept(plan: BlockSparsePlan, key: Hashable, lower: Callable[[BlockSparsePlan], Lowered]) -> Lowered:
    """``lower(plan)``, made once and kept with the plan.

    In a thread of its own, where no transform of ``torch.func`` is active: what is kept must be plain tensors.
    """

    def apart(plan: BlockSparsePlan) -> Lowered:
        with ThreadPoolExecutor(1) as thread:
            return thread.submit(lower, plan).result()

    if type(torch.empty(0)) is torch.Tensor:
        return plan.lowered(key, apart)
    return lower(plan)  # fake tensors: for this call only


def _to(array: NDArray[np.generic], device: torch.device) -> torch.Tensor:
    # Copied: the plan's arrays may be read-only, and torch tensors cannot be.
    return torch.from_numpy(np.array(array)).to(device)
