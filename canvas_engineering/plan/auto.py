"""Choosing token order, tile sizes and padding: count the visited tiles of each candidate, keep the cheapest."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from canvas_engineering.groups import BoxPattern
from canvas_engineering.plan.bits import unique_rows
from canvas_engineering.plan.boxes import box_visits
from canvas_engineering.plan.entries import pair_visits
from canvas_engineering.plan.parts import IndexSets, Part, Parts
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
#: A candidate that computes more than this many pairs per true pair loses to any that computes fewer; so that
#: small canvases, whose time is all overhead, are not computed many times over. It does not bind canvases where
#: windows cut their tiles at any size: there predicted time alone decides.
WASTE_LIMIT = 1.25
#: Pairs that one visited tile costs beside its arithmetic (index loads, rescaling): favours fewer, larger tiles.
ENTRY_OVERHEAD = 512
#: Runs of tokens of at least this many tiles may be padded to tile boundaries (see ``tile_order``).
ALIGNMENTS = (math.inf, 1.0, 0.5)
#: Tiles with which token orders are compared, and how many orders go on to the full comparison.
PROBE_TILES = ((32, 32), (128, 128))
FINALISTS = 3


@dataclass(frozen=True, eq=False)
class Candidate:
    """One way to lay out the tokens, with what it costs."""

    rows: Tiling
    cols: Tiling
    visited: int
    true_pairs: int
    windowed: bool
    speed: float

    @property
    def computed_pairs(self) -> int:
        return self.visited * self.rows.block * self.cols.block

    def rank(self) -> tuple[bool, float]:
        """Sort key: within the waste limit first, then predicted time."""
        wasteful = not self.windowed and self.computed_pairs > WASTE_LIMIT * self.true_pairs
        time = self.computed_pairs / self.speed + ENTRY_OVERHEAD * self.visited
        # Padding tiles that nothing visits still have to be written and carried.
        return wasteful, time + (self.rows.tiles.size + self.cols.tiles.size)


@dataclass(frozen=True, eq=False)
class _Touched:
    """The tiles that each of several index sets touches under one tiling.

    Attributes:
        set_id, tile: ``(n,)`` each, the touched (set, tile) pairs.
        count: ``(sets,)`` touched tiles of each set.
        bits: ``(sets, words)`` uint64, the same as bit sets.
    """

    set_id: NDArray[np.int64]
    tile: NDArray[np.int64]
    count: NDArray[np.int64]
    bits: NDArray[np.uint64]

    @classmethod
    def of(cls, sets: IndexSets, tiling: Tiling) -> _Touched:
        table = np.zeros((sets.count, -(-tiling.count.size // 64) * 64), np.bool_)
        table[sets.number, tiling.place[sets.tokens] // tiling.block] = True
        set_id, tile = np.nonzero(table)
        return cls(set_id, tile, table.sum(axis=1), np.packbits(table, axis=1, bitorder="little").view(np.uint64))


class _Rectangles:
    """Counts the distinct (q tile, slot, kv tile) that the parts without a pattern visit, without listing them.

    A q tile that one part has to itself is visited once per column tile of that part. The few tiles that several
    parts share are counted by uniting the parts' column tiles as bit sets.
    """

    def __init__(self, parts: Parts, rows: Tiling) -> None:
        rectangles = [part for part in parts.parts if part.pattern is None]
        touched = _Touched.of(parts.flat_rows, rows)
        slot = np.array([part.slot for part in rectangles], np.int64)
        self.col_set = np.array([part.col_set for part in rectangles], np.int64)
        row_set = np.array([part.row_set for part in rectangles], np.int64)
        # All (part, touched q tile) pairs, from the touched tiles of the parts' row sets.
        ptr = np.concatenate([[0], np.cumsum(touched.count)])
        length = touched.count[row_set]
        part = np.repeat(np.arange(row_set.size), length)
        within = np.arange(part.size) - np.repeat(np.cumsum(length) - length, length)
        key = touched.tile[ptr[row_set][part] + within] * parts.num_slots + slot[part]
        alone = np.bincount(key, minlength=rows.count.size * parts.num_slots)[key] == 1
        self.alone = np.bincount(part[alone], minlength=row_set.size)
        order = np.argsort(key[~alone], kind="stable")
        self.shared = self._shared(key[~alone][order], self.col_set[part[~alone][order]])

    @staticmethod
    def _shared(key: NDArray[np.int64], cols: NDArray[np.int64]) -> list[tuple[NDArray[np.int64], NDArray[np.int64]]]:
        """What shared tiles unite: ``(lists, length)`` distinct lists of column sets, and the tiles that have each.

        The tiles of a frame, and frames alike, have the same list, so there are far fewer lists than tiles.
        """
        starts = np.flatnonzero(np.diff(key, prepend=-1))
        lengths = np.diff(starts, append=key.size)
        found = []
        for length in np.unique(lengths):
            lists = cols[starts[lengths == length][:, None] + np.arange(length)]
            first, inverse = unique_rows(lists)
            found.append((lists[first], np.bincount(inverse)))
        return found

    def visits(self, cols: _Touched) -> int:
        total = int(self.alone @ cols.count[self.col_set])
        for lists, tiles in self.shared:
            step = max(1, (1 << 22) // max(1, lists.shape[1] * cols.bits.shape[1]))  # bounds the bit sets to 32 MiB
            for lo in range(0, tiles.size, step):
                united = np.bitwise_or.reduce(cols.bits[lists[lo : lo + step]], axis=1)
                total += int(np.bitwise_count(united).sum(axis=1, dtype=np.int64) @ tiles[lo : lo + step])
        return total


def part_pairs(part: Part) -> int:
    """Pairs that a part allows."""
    if part.pattern is None:
        return part.rows.size * part.cols.size
    if isinstance(part.pattern, BoxPattern):
        first, stop = part.pattern.coords.min(axis=0), part.pattern.coords.max(axis=0) + 1
        extent = np.minimum(part.pattern.hi, stop) - np.maximum(part.pattern.lo, first)
        return int(np.prod(np.maximum(extent, 0), axis=1, dtype=np.int64).sum())
    return part.pattern.row.size


def true_pairs(parts: Parts) -> int:
    """Pairs that all parts allow; for a joint softmax an upper bound where groups overlap."""
    return sum(part_pairs(part) for part in parts.parts)


def pattern_visits(parts: Parts, rows: Tiling, cols: Tiling) -> int:
    """Tiles that the parts with a pattern visit (those that several of them share are counted repeatedly)."""
    visits = 0
    for part in parts.parts:
        if isinstance(part.pattern, BoxPattern):
            visits += box_visits(part, rows, cols)
        elif part.pattern is not None:
            visits += pair_visits(part, rows, cols)
    return visits


TileTable = Mapping[tuple[int, int], float]


def tile_table(block_q: int | str, block_kv: int | str, tiles: TileTable = AUTO_TILES) -> TileTable:
    """Tile sizes to try, with their relative speed: those of ``tiles`` that agree with a fixed size."""
    q_sizes = sorted({q for q, _ in tiles}) if block_q == "auto" else [int(block_q)]
    kv_sizes = sorted({kv for _, kv in tiles}) if block_kv == "auto" else [int(block_kv)]
    pairs = list(itertools.product(q_sizes, kv_sizes))
    # A fixed size that the table lacks goes with every size of the other side.
    return {pair: tiles[pair] for pair in pairs if pair in tiles} or dict.fromkeys(pairs, 1.0)


class _Tilings:
    """Tilings of one order, each made and analysed once; alignments that come to the same tiling are one."""

    def __init__(self, order: Order) -> None:
        self.order = order
        self._tilings: dict[int, list[Tiling]] = {}
        self._rectangles: dict[int, _Rectangles] = {}
        self._touched: dict[int, _Touched] = {}

    def tilings(self, block: int, alignments: Sequence[float]) -> list[Tiling]:
        if block not in self._tilings:
            distinct: list[Tiling] = []
            for align in alignments:
                tiling = tile_order(self.order, block, align)
                if not any(np.array_equal(tiling.place, known.place) for known in distinct):
                    distinct.append(tiling)
            self._tilings[block] = distinct
        return self._tilings[block]

    def rectangles(self, parts: Parts, tiling: Tiling) -> _Rectangles:
        if id(tiling) not in self._rectangles:
            self._rectangles[id(tiling)] = _Rectangles(parts, tiling)
        return self._rectangles[id(tiling)]

    def touched(self, parts: Parts, tiling: Tiling) -> _Touched:
        if id(tiling) not in self._touched:
            self._touched[id(tiling)] = _Touched.of(parts.flat_cols, tiling)
        return self._touched[id(tiling)]


def _candidates(
    parts: Parts,
    rows: _Tilings,
    cols: _Tilings,
    tiles: TileTable,
    alignments: Sequence[float],
    pairs_needed: int,
    windowed: bool,
) -> Iterator[Candidate]:
    for (block_q, block_kv), speed in tiles.items():
        for q_tiling in rows.tilings(block_q, alignments):
            for kv_tiling in cols.tilings(block_kv, alignments):
                visited = rows.rectangles(parts, q_tiling).visits(cols.touched(parts, kv_tiling))
                visited += pattern_visits(parts, q_tiling, kv_tiling)
                yield Candidate(q_tiling, kv_tiling, visited, pairs_needed, windowed, speed)


def choose(parts: Parts, orders: Sequence[tuple[Order, Order]], tiles: TileTable, *, same_tokens: bool) -> Candidate:
    """The cheapest candidate; ties go to the earlier one.

    Orders are compared first, with a small and a large tile and everything packed; the best few then meet all
    tile sizes and alignments.
    """
    needed = true_pairs(parts)
    windowed = 2 * sum(part_pairs(part) for part in parts.parts if isinstance(part.pattern, BoxPattern)) > needed
    probes = {pair: tiles[pair] for pair in PROBE_TILES if pair in tiles} or dict(list(tiles.items())[:1])

    def least(order: tuple[Order, Order], table: TileTable, alignments: Sequence[float]) -> Candidate:
        rows = _Tilings(order[0])
        cols = rows if same_tokens else _Tilings(order[1])
        return min(_candidates(parts, rows, cols, table, alignments, needed, windowed), key=Candidate.rank)

    finalists = list(orders)
    if len(orders) > FINALISTS:
        finalists.sort(key=lambda order: least(order, probes, ALIGNMENTS[:1]).rank())
    return min((least(order, tiles, ALIGNMENTS) for order in finalists[:FINALISTS]), key=Candidate.rank)
