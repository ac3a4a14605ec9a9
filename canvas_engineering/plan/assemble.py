"""From visited tiles to a finished plan: merge, number, deduplicate, weigh."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from canvas_engineering.groups import BoxPattern
from canvas_engineering.plan.bits import unique_rows
from canvas_engineering.plan.boxes import box_entries
from canvas_engineering.plan.entries import Entries, pair_entries, rectangle_entries
from canvas_engineering.plan.parts import Parts
from canvas_engineering.plan.plan import BlockSparsePlan
from canvas_engineering.plan.tiling import Tiling


def all_entries(parts: Parts, rows: Tiling, cols: Tiling) -> Entries:
    """Entries of all parts, one mask pool; keys of different parts may coincide."""
    slots = parts.num_slots
    pieces = [
        rectangle_entries(parts, rows, cols),
        *(
            box_entries(p, slots, rows, cols)
            if isinstance(p.pattern, BoxPattern)
            else pair_entries(p, slots, rows, cols)
            for p in parts.parts
            if p.pattern is not None
        ),
    ]
    bases = np.cumsum([0, *(piece.pool.shape[0] for piece in pieces[:-1])])
    return Entries(
        np.concatenate([piece.key for piece in pieces]),
        np.concatenate(
            [np.where(piece.mask >= 0, piece.mask + base, -1) for piece, base in zip(pieces, bases, strict=True)]
        ),
        np.concatenate([piece.pool for piece in pieces]),
    )


def merge_entries(entries: Entries) -> Entries:
    """Sort by key and unite the masks of equal keys; keys are unique afterwards.

    A full tile absorbs everything. The unions are told apart by which masks they unite before any is made.
    """
    order = np.argsort(entries.key, kind="stable")
    key, mask = entries.key[order], entries.mask[order]
    if key.size == 0:
        return Entries(key, mask, entries.pool)
    starts = np.flatnonzero(np.concatenate([[True], key[1:] != key[:-1]]))
    length = np.diff(np.append(starts, key.size))
    if (length == 1).all():
        return Entries(key, mask, entries.pool)
    merged = mask[starts].copy()
    merged[np.minimum.reduceat(mask, starts) < 0] = -1
    pools, base = [entries.pool], entries.pool.shape[0]
    for n in np.unique(length[length > 1]):
        some = np.flatnonzero((length == n) & (merged >= 0))
        if some.size == 0:
            continue
        members = np.sort(mask[starts[some][:, None] + np.arange(n)], axis=1)
        first, inverse = unique_rows(members)
        union = np.zeros((first.size, *entries.pool.shape[1:]), np.uint8)
        for column in members[first].T:
            union |= entries.pool[column]
        pools.append(union)
        merged[some] = base + inverse
        base += first.size
    return Entries(key[starts], merged, np.concatenate(pools))


def _canonical_masks(
    entries: Entries, q_count: NDArray[np.int64], kv_count: NDArray[np.int64]
) -> tuple[NDArray[np.int32], NDArray[np.uint8]]:
    """Entry masks numbered by first use, without duplicates; a mask that allows its whole tile becomes -1.

    ``q_count``, ``kv_count``: tokens of each entry's q tile and kv tile.
    """
    mask = entries.mask
    allowed = (
        np.bitwise_count(entries.pool).sum(axis=(1, 2), dtype=np.int64) if entries.pool.size else np.zeros(0, np.int64)
    )
    partial = np.flatnonzero(mask >= 0)
    filled = partial[allowed[mask[partial]] == q_count[partial] * kv_count[partial]]
    mask = mask.copy()
    mask[filled] = -1
    partial = np.flatnonzero(mask >= 0)
    used, position = np.unique(mask[partial], return_inverse=True)
    pool = entries.pool[used]
    _, same = unique_rows(pool.reshape(pool.shape[0], math.prod(pool.shape[1:])))
    ids = same[position]
    # Number by first use, so that the plan does not depend on how its masks were found.
    distinct, first_use, inverse = np.unique(ids, return_index=True, return_inverse=True)
    rank = np.empty(distinct.size, np.int64)
    rank[np.argsort(first_use, kind="stable")] = np.arange(distinct.size)
    final = np.full(mask.size, -1, np.int32)
    final[partial] = rank[inverse]
    representative = np.empty(distinct.size, np.int64)
    representative[rank] = position[first_use]
    return final, np.ascontiguousarray(pool[representative])


def _row_values(
    parts: Parts, rows: Tiling, set_of: NDArray[np.int32], num_sets: int
) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
    """Weight and connection of every row of every softmax set."""
    weight = np.zeros((num_sets, rows.block), np.float32)
    connection = np.full((num_sets, rows.block), -1, np.int32)
    for part in parts.parts:
        place = rows.place[part.rows]
        softmax_set = set_of[place // rows.block, part.slot]
        weight[softmax_set, place % rows.block] = 1.0 if parts.joint else part.weight
        if not parts.joint:
            connection[softmax_set, place % rows.block] = part.connection
    return weight, connection


def assemble(parts: Parts, rows: Tiling, cols: Tiling, num_q: int, num_kv: int, source: str) -> BlockSparsePlan:
    """Lay the parts out on the two tilings."""
    num_slots, num_q_tiles, num_kv_tiles = max(parts.num_slots, 1), rows.count.size, cols.count.size
    entries = merge_entries(all_entries(parts, rows, cols))
    set_key, entry_kv = np.divmod(entries.key, max(num_kv_tiles, 1))
    set_keys, set_first, entry_set = np.unique(set_key, return_index=True, return_inverse=True)
    set_tile, set_slot = np.divmod(set_keys, num_slots)
    entry_mask, masks = _canonical_masks(entries, rows.count[set_tile[entry_set]], cols.count[entry_kv])
    set_of = np.full((num_q_tiles, num_slots), -1, np.int32)
    set_of[set_tile, set_slot] = np.arange(set_keys.size, dtype=np.int32)
    row_weight, row_connection = _row_values(parts, rows, set_of, set_keys.size)
    set_counts = np.bincount(set_tile, minlength=num_q_tiles)
    return BlockSparsePlan(
        num_q=num_q,
        num_kv=num_kv,
        block_q=rows.block,
        block_kv=cols.block,
        softmax="joint" if parts.joint else "connection",
        q_tokens=rows.tiles,
        kv_tokens=cols.tiles,
        set_ptr=np.concatenate([[0], np.cumsum(set_counts)]).astype(np.int32),
        entry_ptr=np.append(set_first, entries.key.size).astype(np.int64),
        entry_kv=entry_kv.astype(np.int32),
        entry_mask=entry_mask,
        masks=masks,
        row_weight=row_weight,
        row_connection=row_connection,
        source=source,
    )


def normalized(plan: BlockSparsePlan) -> NDArray[np.float32]:
    """``plan.row_weight`` scaled so that the weights of each row sum to 1 (rows whose weights are all 0 stay 0)."""
    total = np.zeros((plan.num_q_tiles, plan.block_q))
    np.add.at(total, plan.set_tile, plan.row_weight)
    total = total[plan.set_tile]
    scaled = np.divide(plan.row_weight, total, out=np.zeros_like(total), where=total > 0)
    return scaled.astype(np.float32)
