"""Plans made directly from dense masks, tile by tile: slow, plain, and independent of the compiler."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from canvas_engineering.plan import BlockSparsePlan, Softmax
from canvas_engineering.plan.bits import pack_masks


def plan_from_dense(
    masks: NDArray[np.bool_],  # (S, num_q, num_kv), one mask per softmax set
    weights: NDArray[np.floating] | None = None,  # (S, num_q); ones where omitted
    *,
    block_q: int = 8,
    block_kv: int = 8,
    q_order: NDArray[np.integer] | None = None,
    kv_order: NDArray[np.integer] | None = None,
    softmax: Softmax = "connection",
) -> BlockSparsePlan:
    """The plan whose ``to_dense()`` is ``(masks, weights)``, except that empty masks of a tile make no set."""
    _, num_q, num_kv = masks.shape
    weights = np.ones(masks.shape[:2], np.float32) if weights is None else weights.astype(np.float32)
    q_tokens = _tiles(np.arange(num_q) if q_order is None else q_order, block_q)
    kv_tokens = _tiles(np.arange(num_kv) if kv_order is None else kv_order, block_kv)

    set_ptr, entry_ptr, entry_kv, entry_mask = [0], [0], [], []
    stored: dict[bytes, int] = {}
    packed: list[NDArray[np.uint8]] = []
    row_weight: list[NDArray[np.float32]] = []
    for rows in q_tokens:
        for mask, weight in zip(masks, weights, strict=True):
            has_key = mask.any(axis=1)
            entries = 0
            for kv_tile, keys in enumerate(kv_tokens):
                tile = np.zeros((block_q, block_kv), np.bool_)
                valid = np.ix_(rows >= 0, keys >= 0)
                tile[valid] = mask[np.ix_(rows[rows >= 0], keys[keys >= 0])]
                if not tile.any():
                    continue
                entries += 1
                entry_kv.append(kv_tile)
                if tile[valid].all():
                    entry_mask.append(-1)
                    continue
                bits = pack_masks(tile)
                if bits.tobytes() not in stored:
                    stored[bits.tobytes()] = len(packed)
                    packed.append(bits)
                entry_mask.append(stored[bits.tobytes()])
            if entries:
                entry_ptr.append(entry_ptr[-1] + entries)
                row_weight.append(np.where(rows >= 0, weight[rows] * has_key[rows], 0).astype(np.float32))
        set_ptr.append(len(row_weight))

    weight_array = np.array(row_weight, np.float32).reshape(-1, block_q)
    plan = BlockSparsePlan(
        num_q=num_q,
        num_kv=num_kv,
        block_q=block_q,
        block_kv=block_kv,
        softmax=softmax,
        q_tokens=q_tokens,
        kv_tokens=kv_tokens,
        set_ptr=np.array(set_ptr, np.int32),
        entry_ptr=np.array(entry_ptr, np.int64),
        entry_kv=np.array(entry_kv, np.int32),
        entry_mask=np.array(entry_mask, np.int32),
        masks=np.array(packed, np.uint8).reshape(-1, block_q, block_kv // 8),
        row_weight=weight_array,
        row_connection=np.where(weight_array > 0, 0, -1).astype(np.int32),
        source="plan_from_dense",
    )
    return plan


def _tiles(order: NDArray[np.integer], block: int) -> NDArray[np.int32]:
    """``order`` cut into tiles, the last one padded with -1."""
    count = -(-order.size // block)
    tiles = np.full(count * block, -1, np.int32)
    tiles[: order.size] = order
    return tiles.reshape(count, block)
