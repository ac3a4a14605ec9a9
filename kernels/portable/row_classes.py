"""Which rows of a plan read exactly the same keys.

Rows of one class and their common keys are a rectangle: dense attention without a mask. Classes are found by
hashing key sets, so that the cost follows the entries of the plan and no key set is ever written out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from canvas_engineering.plan import BlockSparsePlan
from canvas_engineering.plan.bits import unique_rows

Word = TypeVar("Word", np.int64, np.uint64)

#: Elements of temporary arrays with one element per (entry, row) or (entry, key).
CHUNK = 1 << 22


@dataclass(frozen=True)
class RowClasses:
    """The rows of all softmax sets that have a key, and their classes.

    A row is named by its slot, ``set * block_q + row in the tile``: its place in the flattened ``row_weight``.
    """

    slot: NDArray[np.int64]  # (n,) ascending
    key_count: NDArray[np.int64]  # (n,) keys of the row
    of_row: NDArray[np.intp]  # (n,) class of the row
    first: NDArray[np.intp]  # (num_classes,) index into the rows of one member of each class
    size: NDArray[np.intp]  # (num_classes,) rows of each class


def find_row_classes(plan: BlockSparsePlan) -> RowClasses:
    """Hash the key set of every row as the sum of the hashes of its parts, one part per visited kv tile."""
    pattern, pattern_count = _row_patterns(plan)
    count = per_set_row_sum(plan, plan.kv_count.astype(np.int64), lambda tile, mask: pattern_count[mask])
    has_key = (count > 0) & (np.arange(plan.block_q) < plan.q_count[plan.set_tile][:, None])
    slot = np.flatnonzero(has_key)
    hashes = []
    for lane in range(2):
        whole = _mix(np.arange(plan.num_kv_tiles, dtype=np.uint64), lane)

        def part(tile: NDArray[np.int32], mask: NDArray[np.int32], lane: int = lane) -> NDArray[np.uint64]:
            ids, whole = pattern[mask], _mix(tile.astype(np.uint64), lane)[:, None]
            mixed = _mix(whole ^ _mix(ids.astype(np.uint64), lane + 2), lane)
            # A row that reads the whole tile hashes as in a full tile; one that reads none of it adds nothing.
            everything = pattern_count[mask] == plan.kv_count[tile][:, None]
            return np.where(ids == 0, np.uint64(0), np.where(everything, whole, mixed))

        hashes.append(per_set_row_sum(plan, whole, part).ravel()[slot])
    first, of_row = _unique(*hashes)
    return RowClasses(slot, count.ravel()[slot], of_row, first, np.bincount(of_row, minlength=first.size))


def per_set_row_sum(
    plan: BlockSparsePlan,
    full: NDArray[Word],  # (num_kv_tiles,)
    partial: Callable[[NDArray[np.int32], NDArray[np.int32]], NDArray[Word]],
) -> NDArray[Word]:
    """``(num_sets, columns)``: sums over the entries of each set, of ``full[kv tile]`` for full tiles and of
    ``partial(kv tiles, mask indices)`` (one row per partial entry, ``columns`` wide) for the others.

    Integers only: sums are differences of running sums, which are exact modulo 2**64.
    """
    is_full = plan.entry_mask < 0
    running = np.zeros(plan.num_entries + 1, full.dtype)
    np.cumsum(np.where(is_full, full[plan.entry_kv], np.zeros((), full.dtype)), out=running[1:])
    base = running[plan.entry_ptr[1:]] - running[plan.entry_ptr[:-1]]
    entries = np.flatnonzero(~is_full)
    columns = partial(plan.entry_kv[:0], plan.entry_mask[:0]).shape[1]
    total = np.repeat(base[:, None], columns, axis=1)
    step = max(1, CHUNK // max(columns, 1))
    owner = plan.entry_set[entries]
    for start in range(0, entries.size, step):
        chunk = entries[start : start + step]
        values = partial(plan.entry_kv[chunk], plan.entry_mask[chunk])
        running = np.zeros((chunk.size + 1, columns), full.dtype)
        np.cumsum(values, axis=0, out=running[1:])
        # The entries of a set are consecutive; a set cut by the chunk gets the rest from the next chunk.
        begin = np.flatnonzero(np.diff(owner[start : start + step], prepend=-1))
        end = np.append(begin[1:], chunk.size)
        total[owner[start + begin]] += running[end] - running[begin]
    return total


def _row_patterns(plan: BlockSparsePlan) -> tuple[NDArray[np.intp], NDArray[np.int64]]:
    """For every row of every stored mask: an id of its bits (0 for no bits), and their number."""
    rows = plan.masks.reshape(-1, plan.masks.shape[-1])
    empty = np.zeros((1, rows.shape[1]), np.uint8)
    _, ids = unique_rows(np.concatenate([empty, rows]))  # in order of first appearance: the empty row is 0
    shape = plan.masks.shape[:2]
    return ids[1:].reshape(shape), np.bitwise_count(rows).sum(axis=1, dtype=np.int64).reshape(shape)


def _mix(value: NDArray[np.uint64], lane: int) -> NDArray[np.uint64]:
    """SplitMix64's output function (Steele, Lea, Flood, OOPSLA 2014) of a word, one of several per lane."""
    z = value + np.uint64((0x9E3779B97F4A7C15 * (lane + 1)) % 2**64)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _unique(high: NDArray[np.uint64], low: NDArray[np.uint64]) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """First index and inverse of the distinct 128-bit hashes; sorting one half is enough unless it collides."""
    _, first, inverse = np.unique(high, return_index=True, return_inverse=True)
    if np.array_equal(low, low[first[inverse]]):
        return first, inverse
    return unique_rows(np.stack([high, low], axis=1))
