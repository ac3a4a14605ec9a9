"""A plan as few batches of equally shaped attention problems, for frameworks that have no block-sparse kernel.

Two shapes of problem cover every plan. **Rectangles**: all rows that read exactly the same keys, wherever they
stand, need no mask. **Strips**: a few consecutive rows of a tile against the union of their keys, with a mask,
for patterns in which every row has keys of its own (windows, random keys). Each softmax set of each tile takes
the cheaper one by counting; small canvases may be cheaper still as one dense problem with one mask.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from canvas_engineering.kernels.portable.row_classes import CHUNK, RowClasses, find_row_classes, per_set_row_sum
from canvas_engineering.plan import BlockSparsePlan
from canvas_engineering.plan.bits import unique_rows, unpack_masks

Int64 = NDArray[np.int64]

# Costs in units of one (query, key) pair at head_dim 64, measured on one core with torch's CPU kernel (3 ns).
PROBLEM_COST = 125  # one problem of a batch
KEY_COST = 72  # gathering and reading one row of k and of v
ROW_COST = 50  # the same for q and the output
BATCH_COST = 5000  # one call into the framework, with its gathers, at four heads
MASKED_PAIR_COST = 1.15
DENSE_LIMIT = 1 << 22  # pairs up to which one dense problem is considered: its mask is held in memory
#: The keys of a strip are padded to a multiple of this, so that few distinct shapes arise.
STRIP_KEYS = 16


@dataclass(frozen=True)
class Batch:
    """``G`` problems of ``R`` rows and ``K`` keys: attention of each row over its problem's keys.

    Attributes:
        rows: ``(G, R)`` query tokens.
        slots: ``(G, R)`` places of their weights in the flattened ``row_weight``.
        keys: ``(G, K)`` key tokens.
        mask_index, masks: None for rectangles. Else problem ``g`` allows the pairs ``masks[mask_index[g]]``;
            ``(G,)`` and ``(U, R, K)`` bool. Every row has at least one key.
    """

    rows: Int64
    slots: Int64
    keys: Int64
    mask_index: Int64 | None = None
    masks: NDArray[np.bool_] | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        """``(G, R, K)``."""
        return (*self.rows.shape, self.keys.shape[1])

    @property
    def cost(self) -> float:
        """Predicted time of one head, in pairs."""
        problems, rows, keys = self.shape
        pair = 1.0 if self.masks is None else MASKED_PAIR_COST
        return BATCH_COST + problems * (PROBLEM_COST + rows * keys * pair + KEY_COST * keys + ROW_COST * rows)


def lower_to_batches(plan: BlockSparsePlan) -> list[Batch]:
    """The batches of a plan; every (softmax set, row) with a key stands in exactly one problem."""
    classes = find_row_classes(plan)
    if classes.slot.size == 0:
        return []
    strip_rows, in_strip = _choose_strips(plan, classes)
    batches = _rectangles(plan, classes, ~in_strip[classes.slot // plan.block_q])
    if in_strip.any():
        batches += _strips(plan, classes, np.flatnonzero(in_strip), strip_rows)
    dense_pairs = plan.max_sets * plan.num_q * plan.num_kv
    if dense_pairs <= DENSE_LIMIT:
        dense_cost = MASKED_PAIR_COST * dense_pairs + plan.max_sets * (
            BATCH_COST + KEY_COST * plan.num_kv + ROW_COST * plan.num_q
        )
        if dense_cost < sum(batch.cost for batch in batches):
            return _dense(plan, classes)
    return batches


# -- rectangles ---------------------------------------------------------------------------------------------


def _rectangles(plan: BlockSparsePlan, classes: RowClasses, chosen: NDArray[np.bool_]) -> list[Batch]:
    """One problem per class, from its chosen rows; classes of equal shape share a batch."""
    rows = np.flatnonzero(chosen)
    if rows.size == 0:
        return []
    token = _tokens_of(plan, classes.slot[rows])
    _, first, of_row, size = np.unique(
        _once_per_row(classes.of_row[rows], token), return_index=True, return_inverse=True, return_counts=True
    )
    by_class = np.lexsort((token, of_row))
    row_start = np.concatenate([[0], np.cumsum(size)])
    keys, key_start = _keys_of(plan, classes.slot[rows[first]])
    key_count = np.diff(key_start)
    batches = []
    shapes, shape_of = np.unique(np.stack([size, key_count], axis=1), axis=0, return_inverse=True)
    for index, (num_rows, num_keys) in enumerate(shapes):
        members = np.flatnonzero(shape_of.ravel() == index)
        picked = by_class[row_start[members][:, None] + np.arange(num_rows)]
        # Problems in the order of their first row: neighbouring ones are then often one slice of the input.
        order = np.argsort(token[picked[:, 0]], kind="stable")
        picked, members = picked[order], members[order]
        batches.append(
            Batch(
                rows=token[picked],
                slots=classes.slot[rows[picked]],
                keys=np.sort(keys[key_start[members][:, None] + np.arange(num_keys)], axis=1),
            )
        )
    return batches


def _once_per_row(of_row: NDArray[np.intp], token: Int64) -> NDArray[np.intp]:
    """Classes in which no token stands twice: one that reads the same keys in several sets gets several classes."""
    order = np.lexsort((token, of_row))
    again = (np.diff(of_row[order], prepend=-1) == 0) & (np.diff(token[order], prepend=-1) == 0)
    if not again.any():
        return of_row
    position = np.arange(order.size)
    number = np.empty_like(of_row)
    number[order] = position - np.maximum.accumulate(np.where(again, 0, position))
    return of_row + number * (of_row.max() + 1)


def _tokens_of(plan: BlockSparsePlan, slot: Int64) -> Int64:
    """Query tokens of rows given by their slots."""
    return plan.q_tokens[plan.set_tile[slot // plan.block_q], slot % plan.block_q].astype(np.int64)


def _keys_of(plan: BlockSparsePlan, slot: Int64) -> tuple[Int64, Int64]:
    """Key tokens of rows given by their slots: flat, with ``(len(slot) + 1,)`` pointers."""
    entry, owner = _entries_of(plan, slot // plan.block_q)
    row = (slot % plan.block_q)[owner]
    tokens, counts = [np.zeros(0, np.int64)], np.zeros(slot.size, np.int64)
    step = max(1, CHUNK // plan.block_kv)
    for start in range(0, entry.size, step):
        e, r = entry[start : start + step], row[start : start + step]
        bits = _row_bits(plan, e, r)
        tokens.append(plan.kv_tokens[plan.entry_kv[e]][bits].astype(np.int64))
        counts += np.bincount(owner[start : start + step], weights=bits.sum(axis=1), minlength=slot.size).astype(
            np.int64
        )
    return np.concatenate(tokens), np.concatenate([[0], np.cumsum(counts)])


def _entries_of(plan: BlockSparsePlan, sets: Int64) -> tuple[Int64, NDArray[np.intp]]:
    """The entries of the given sets, one set after the other, and the position of each entry's set in ``sets``."""
    count = plan.entry_ptr[sets + 1] - plan.entry_ptr[sets]
    owner = np.repeat(np.arange(sets.size), count)
    offset = np.arange(owner.size) - np.repeat(np.cumsum(count) - count, count)
    return plan.entry_ptr[sets][owner] + offset, owner


def _row_bits(plan: BlockSparsePlan, entry: Int64, row: Int64) -> NDArray[np.bool_]:
    """``(len(entry), block_kv)``: the keys of one row of each entry."""
    mask = plan.entry_mask[entry]
    bits: NDArray[np.bool_] = np.arange(plan.block_kv) < plan.kv_count[plan.entry_kv[entry]][:, None]
    partial = mask >= 0
    bits[partial] = unpack_masks(plan.masks[mask[partial], row[partial]])
    return bits


# -- strips -------------------------------------------------------------------------------------------------


def _choose_strips(plan: BlockSparsePlan, classes: RowClasses) -> tuple[int, NDArray[np.bool_]]:
    """The strip height that is cheapest for the plan, and the sets for which strips beat rectangles."""
    of_set = classes.slot // plan.block_q
    shared = (PROBLEM_COST + KEY_COST * classes.key_count) / classes.size[classes.of_row]
    rectangle = np.bincount(of_set, weights=classes.key_count + shared + ROW_COST, minlength=plan.num_sets)
    best = (rectangle.sum(), plan.block_q, np.zeros(plan.num_sets, np.bool_))
    partial_sets = np.zeros(plan.num_sets, np.bool_)
    partial_sets[plan.entry_set[plan.entry_mask >= 0]] = True
    if not partial_sets.any():
        return best[1], best[2]
    height = 8
    while height <= plan.block_q:
        if plan.block_q % height == 0:
            keys = _strip_keys(plan, height)
            rows = np.bincount(
                of_set * (plan.block_q // height) + classes.slot % plan.block_q // height, minlength=keys.size
            ).reshape(keys.shape)
            padded = -(-keys // STRIP_KEYS) * STRIP_KEYS
            cost = rows * padded * MASKED_PAIR_COST + KEY_COST * padded + ROW_COST * rows + PROBLEM_COST
            strip = np.where(rows > 0, cost, 0).sum(axis=1)
            chosen = partial_sets & (strip < rectangle)
            total = np.where(chosen, strip, rectangle).sum()
            if total < best[0]:
                best = (total, height, chosen)
        height *= 2
    return best[1], best[2]


def _strip_union(plan: BlockSparsePlan, height: int) -> NDArray[np.uint8]:
    """``(num_masks, block_q // height, bytes)``: the keys that any row of a strip reads."""
    strips = plan.masks.reshape(plan.num_masks, plan.block_q // height, height, plan.masks.shape[-1])
    return np.bitwise_or.reduce(strips, axis=2)


def _strip_keys(plan: BlockSparsePlan, height: int) -> Int64:
    """``(num_sets, block_q // height)``: keys in the union of each strip."""
    union = np.bitwise_count(_strip_union(plan, height)).sum(axis=-1, dtype=np.int64)
    return per_set_row_sum(plan, plan.kv_count.astype(np.int64), lambda tile, mask: union[mask])


def _strips(plan: BlockSparsePlan, classes: RowClasses, sets: Int64, height: int) -> list[Batch]:
    """The problems of the given sets, cut into strips of ``height`` rows."""
    parts = plan.block_q // height
    of_slot = np.zeros(plan.num_sets * plan.block_q, np.bool_)
    of_slot[classes.slot] = True
    has_key = of_slot.reshape(-1, height)
    strips = (sets[:, None] * parts + np.arange(parts)).ravel()
    strips = strips[has_key[strips].any(axis=1)]
    keys = _strip_keys(plan, height).ravel()
    padded = -(-keys // STRIP_KEYS) * STRIP_KEYS
    num_rows = has_key.sum(axis=1)
    shape = np.stack([num_rows[strips], padded[strips]], axis=1)
    shapes, shape_of = np.unique(shape, axis=0, return_inverse=True)
    union = _strip_union(plan, height)
    batches = []
    for index, (rows, width) in enumerate(shapes):
        members = strips[shape_of.ravel() == index]
        # Rows with a key first, in their order; a strip takes the first `rows` of them.
        order = np.argsort(~has_key[members], axis=1, kind="stable")[:, :rows]
        slots = members[:, None] * height + order
        step = max(1, CHUNK // (height * plan.block_kv * max(1, width // plan.block_kv)))
        key_parts, mask_parts = [], []
        for start in range(0, members.size, step):
            chunk = slice(start, start + step)
            tokens, mask = _strip_masks(plan, union, members[chunk], height, int(width))
            key_parts.append(tokens)
            mask_parts.append(np.packbits(np.take_along_axis(mask, order[chunk][:, :, None], axis=1), axis=-1))
        packed = np.concatenate(mask_parts)
        first, mask_index = unique_rows(packed.reshape(packed.shape[0], -1))
        batches.append(
            Batch(
                rows=_tokens_of(plan, slots),
                slots=slots,
                keys=np.concatenate(key_parts),
                mask_index=mask_index.astype(np.int64),
                masks=np.unpackbits(packed[first], axis=-1).astype(np.bool_),
            )
        )
    return batches


def _strip_masks(
    plan: BlockSparsePlan, union: NDArray[np.uint8], strips: Int64, height: int, width: int
) -> tuple[Int64, NDArray[np.bool_]]:
    """Keys ``(n, width)`` and masks ``(n, height, width)`` of strips; padding repeats token 0, never allowed."""
    parts = plan.block_q // height
    entry, owner = _entries_of(plan, strips // parts)
    part = (strips % parts)[owner]
    mask = plan.entry_mask[entry]
    partial = mask >= 0
    wanted: NDArray[np.bool_] = np.arange(plan.block_kv) < plan.kv_count[plan.entry_kv[entry]][:, None]
    wanted[partial] = unpack_masks(union[mask[partial], part[partial]])
    bits: NDArray[np.bool_] = np.repeat(wanted[:, None], height, axis=1)
    stored = plan.masks.reshape(plan.num_masks, parts, height, plan.masks.shape[-1])
    bits[partial] = unpack_masks(stored[mask[partial], part[partial]])
    e, column = np.nonzero(wanted)
    place = owner[e]
    count = np.bincount(place, minlength=strips.size)
    position = np.arange(place.size) - np.repeat(np.cumsum(count) - count, count)
    tokens = np.zeros((strips.size, width), np.int64)
    tokens[place, position] = plan.kv_tokens[plan.entry_kv[entry[e]], column]
    allowed = np.zeros((strips.size, height, width), np.bool_)
    allowed[place, :, position] = bits[e, :, column]
    return tokens, allowed


# -- dense --------------------------------------------------------------------------------------------------


def _dense(plan: BlockSparsePlan, classes: RowClasses) -> list[Batch]:
    """One problem per softmax set of a row: all its rows against all keys."""
    masks, _ = plan.to_dense()
    of_set = classes.slot // plan.block_q
    which = of_set - plan.set_ptr[plan.set_tile[of_set]]
    batches = []
    for number, mask in enumerate(masks):
        slots = classes.slot[which == number]
        tokens = _tokens_of(plan, slots)
        order = np.argsort(tokens)
        keys = np.flatnonzero(mask.any(axis=0))
        allowed = mask[np.ix_(tokens[order], keys)]
        index = None if allowed.all() else np.zeros(1, np.int64)
        batches.append(
            Batch(
                rows=tokens[order][None],
                slots=slots[order][None],
                keys=keys[None].astype(np.int64),
                mask_index=index,
                masks=None if index is None else allowed[None],
            )
        )
    return batches
