"""Choosing token order, tile sizes and padding: count the visited tiles of each candidate, keep the cheapest."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from canvas_engineering.groups import BoxPattern
from canvas_engineering.plan.entries import Cover, Covers, box_visits, pair_entries
from canvas_engineering.plan.parts import Part, Parts
from canvas_engineering.plan.tiling import Order, Tiling, tile_order

#: Tile sizes that ``auto`` considers, with the relative speed of one pair in a tile of that size. These are model
#: constants, not measurements: a tile does ``block_q * block_kv`` products per ``block_q + block_kv`` loaded rows,
#: so small tiles spend their time on loads; 16 is the least that matrix units take.
AUTO_TILES: dict[tuple[int, int], float] = {
    (128, 128): 1.0,
    (128, 64): 0.97,
    (64, 128): 0.9,
    (64, 64): 0.85,
    (32, 64): 0.6,
    (64, 32): 0.6,
    (32, 32): 0.5,
    (16, 32): 0.3,
    (16, 16): 0.2,
}
#: A candidate that computes more than this many pairs per true pair loses to any that computes fewer.
WASTE_LIMIT = 1.25
#: Pairs that one visited tile costs beside its arithmetic (index loads, rescaling): favours fewer, larger tiles.
ENTRY_OVERHEAD = 512
#: Runs of tokens of at least this many tiles may be padded to tile boundaries (see ``tile_order``).
ALIGNMENTS = (math.inf, 1.0, 0.5)


@dataclass(frozen=True, eq=False)
class Candidate:
    """One way to lay out the tokens, with what it costs."""

    rows: Tiling
    cols: Tiling
    visited: int
    true_pairs: int

    @property
    def computed_pairs(self) -> int:
        return self.visited * self.rows.block * self.cols.block

    def rank(self) -> tuple[bool, float]:
        """Sort key: within the waste limit first, then predicted time."""
        speed = AUTO_TILES.get((self.rows.block, self.cols.block), 1.0)
        wasteful = self.computed_pairs > WASTE_LIMIT * self.true_pairs
        time = self.computed_pairs / speed + ENTRY_OVERHEAD * self.visited
        # Padding tiles that nothing visits still have to be written and carried.
        return wasteful, time + (self.rows.tiles.size + self.cols.tiles.size)


def _bitset(covered: Cover, words: int) -> NDArray[np.uint64]:
    bits = np.zeros(words * 64, np.bool_)
    bits[covered.tile] = True
    return np.packbits(bits, bitorder="little").view(np.uint64)


def _rectangle_visits(parts: list[Part], num_slots: int, rows: Covers, cols: Covers) -> int:
    """Exact number of distinct (q tile, slot, kv tile) that rectangles visit, without listing them.

    A q tile that one part fills is visited once per column tile of that part. The few tiles that several parts
    share are counted by uniting the parts' column tiles as bit sets.
    """
    if not parts:
        return 0
    words = -(-cols.tiling.count.size // 64)
    total = 0
    shared_key: list[NDArray[np.int64]] = []
    shared_cols: list[NDArray[np.int64]] = []
    column_sets: dict[int, int] = {}
    bitsets: list[NDArray[np.uint64]] = []
    alone = np.zeros((rows.tiling.count.size, num_slots), np.int64)
    for part in parts:
        alone[rows.of(part.rows).tile, part.slot] += 1
    for part in parts:
        r, c = rows.of(part.rows), cols.of(part.cols)
        single = alone[r.tile, part.slot] == 1
        total += int(single.sum()) * c.tile.size
        shared = r.tile[~single]
        if shared.size:
            number = column_sets.setdefault(id(part.cols), len(bitsets))
            if number == len(bitsets):
                bitsets.append(_bitset(c, words))
            shared_key.append(shared * num_slots + part.slot)
            shared_cols.append(np.full(shared.size, number, np.int64))
    if not shared_key:
        return total
    key, column = np.concatenate(shared_key), np.concatenate(shared_cols)
    order = np.argsort(key, kind="stable")
    key, column = key[order], column[order]
    starts = np.flatnonzero(np.concatenate([[True], key[1:] != key[:-1]]))
    table = np.stack(bitsets)
    step = max(1, (1 << 22) // max(1, words))
    # Cut between keys, so that no union is split.
    for lo in range(0, starts.size, step):
        begin = starts[lo]
        end = starts[lo + step] if lo + step < starts.size else key.size
        united = np.bitwise_or.reduceat(table[column[begin:end]], starts[lo : lo + step] - begin, axis=0)
        total += int(np.bitwise_count(united).sum())
    return total


def true_pairs(parts: Parts) -> int:
    """Pairs that the parts allow; for a joint softmax an upper bound where groups overlap."""
    total = 0
    for part in parts.parts:
        if part.pattern is None:
            total += part.rows.size * part.cols.size
        elif isinstance(part.pattern, BoxPattern):
            first, stop = part.pattern.coords.min(axis=0), part.pattern.coords.max(axis=0) + 1
            extent = np.minimum(part.pattern.hi, stop) - np.maximum(part.pattern.lo, first)
            total += int(np.prod(np.maximum(extent, 0), axis=1, dtype=np.int64).sum())
        else:
            total += part.pattern.row.size
    return total


def count_visits(parts: Parts, rows: Covers, cols: Covers) -> int:
    """Visited tiles of all parts under two tilings (tiles that patterned parts share are counted twice)."""
    visits = _rectangle_visits([p for p in parts.parts if p.pattern is None], parts.num_slots, rows, cols)
    for part in parts.parts:
        if isinstance(part.pattern, BoxPattern):
            visits += box_visits(part, rows.tiling, cols.tiling)
        elif part.pattern is not None:
            visits += pair_entries(part, parts.num_slots, rows.tiling, cols.tiling).key.size
    return visits


def tile_pairs(block_q: int | str, block_kv: int | str) -> list[tuple[int, int]]:
    """Tile sizes to try: the fixed ones, or those of ``AUTO_TILES`` that agree with a fixed one."""
    if isinstance(block_q, int) and isinstance(block_kv, int):
        return [(block_q, block_kv)]
    q_sizes = sorted({q for q, _ in AUTO_TILES}) if block_q == "auto" else [int(block_q)]
    kv_sizes = sorted({kv for _, kv in AUTO_TILES}) if block_kv == "auto" else [int(block_kv)]
    pairs = list(itertools.product(q_sizes, kv_sizes))
    listed = [pair for pair in pairs if pair in AUTO_TILES]
    return listed or pairs


def _candidates(
    parts: Parts, orders: Iterable[tuple[Order, Order]], pairs: list[tuple[int, int]], same_tokens: bool
) -> Iterator[Candidate]:
    pairs_needed = true_pairs(parts)
    for q_order, kv_order in orders:
        tilings: dict[tuple[int, int, float], Covers] = {}

        def tiled(side: int, order: Order, block: int, align: float) -> Covers:
            key = (0 if same_tokens else side, block, align)
            if key not in tilings:
                tilings[key] = Covers(tile_order(order, block, align))
            return tilings[key]

        for (block_q, block_kv), align_q, align_kv in itertools.product(pairs, ALIGNMENTS, ALIGNMENTS):
            rows, cols = tiled(0, q_order, block_q, align_q), tiled(1, kv_order, block_kv, align_kv)
            yield Candidate(rows.tiling, cols.tiling, count_visits(parts, rows, cols), pairs_needed)


def choose(
    parts: Parts, orders: Iterable[tuple[Order, Order]], pairs: list[tuple[int, int]], *, same_tokens: bool
) -> Candidate:
    """The cheapest candidate; ties go to the earlier one."""
    return min(_candidates(parts, orders, pairs, same_tokens), key=Candidate.rank)
