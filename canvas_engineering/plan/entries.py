"""Which tiles the parts visit, and with what masks.

Three kinds of parts produce the same thing, :class:`Entries`: rectangles (every row reads every column), boxes
(a row reads a box of the columns' grid: windows, tiles, local bands) and pairs (anything else). None looks at a
pair of tokens unless a partial tile's mask needs it, and masks are told apart before they are made.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from canvas_engineering.groups import BoxPattern, PairPattern
from canvas_engineering.plan.atoms import Tokens
from canvas_engineering.plan.bits import pack_masks, unique_rows
from canvas_engineering.plan.parts import Part, Parts
from canvas_engineering.plan.tiling import Tiling

_CHUNK = 1 << 24  # elements of temporary boolean arrays


@dataclass(frozen=True, eq=False)
class Entries:
    """Visited tiles of some parts.

    Attributes:
        key: ``(q tile * num_slots + slot) * num_kv_tiles + kv tile``; a key may repeat across parts.
        mask: Index into ``pool``, or -1 where the parts fill the tile.
        pool: ``(masks, block_q, block_kv // 8)`` uint8, packed.
    """

    key: NDArray[np.int64]
    mask: NDArray[np.int64]
    pool: NDArray[np.uint8]


@dataclass(frozen=True, eq=False)
class Cover:
    """The tiles that an index set touches.

    Attributes:
        tile: ``(n,)`` touched tiles, ascending.
        bits: ``(n, block // 8)`` uint8, which tokens of each tile are in the set.
        full: ``(n,)`` bool, all tokens of the tile are (padding aside).
    """

    tile: NDArray[np.int64]
    bits: NDArray[np.uint8]
    full: NDArray[np.bool_]


def cover(tokens: Tokens, tiling: Tiling) -> Cover:
    """Touched tiles of an index set; cost is the size of the set."""
    place = tiling.place[tokens]
    count = np.bincount(place // tiling.block, minlength=tiling.count.size)
    tile = np.flatnonzero(count)
    slot_of_tile = np.empty(tiling.count.size, np.int64)
    slot_of_tile[tile] = np.arange(tile.size)
    present = np.zeros((tile.size, tiling.block), np.bool_)
    present[slot_of_tile[place // tiling.block], place % tiling.block] = True
    return Cover(tile, pack_masks(present), count[tile] == tiling.count[tile])


class Covers:
    """Covers of index sets under one tiling, each made once."""

    def __init__(self, tiling: Tiling) -> None:
        self.tiling = tiling
        self._made: dict[int, Cover] = {}

    def of(self, tokens: Tokens) -> Cover:
        if id(tokens) not in self._made:
            self._made[id(tokens)] = cover(tokens, self.tiling)
        return self._made[id(tokens)]


def _outer_masks(row_bits: NDArray[np.uint8], col_bits: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """``(n, block_q // 8)`` and ``(n, block_kv // 8)`` to masks ``(n, block_q, block_kv // 8)``."""
    rows = np.unpackbits(row_bits, axis=1, bitorder="little")
    return rows[:, :, None] * col_bits[:, None, :]


def _distinct_bits(covers: Iterable[Cover], width: int) -> tuple[list[NDArray[np.int64]], NDArray[np.uint8]]:
    """Number the distinct bit patterns of several covers; returns each cover's numbers and the patterns."""
    covers = list(covers)
    stacked = np.concatenate([c.bits for c in covers]) if covers else np.zeros((0, width), np.uint8)
    first, inverse = unique_rows(stacked)
    return np.split(inverse, np.cumsum([c.tile.size for c in covers])[:-1]), stacked[first]


def rectangle_entries(parts: list[Part], num_slots: int, rows: Covers, cols: Covers) -> Entries:
    """Entries of parts without a pattern: row tiles times column tiles, masks as outer products."""
    block_q, kv_bytes = rows.tiling.block, cols.tiling.block // 8
    num_kv_tiles = cols.tiling.count.size
    if not parts:
        return Entries(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros((0, block_q, kv_bytes), np.uint8))
    row_sets = {id(part.rows): rows.of(part.rows) for part in parts}
    col_sets = {id(part.cols): cols.of(part.cols) for part in parts}
    row_ids, row_patterns = _distinct_bits(row_sets.values(), block_q // 8)
    col_ids, col_patterns = _distinct_bits(col_sets.values(), kv_bytes)
    row_pattern_of = dict(zip(row_sets, row_ids, strict=True))
    col_pattern_of = dict(zip(col_sets, col_ids, strict=True))
    num_col_patterns = col_patterns.shape[0]
    keys, codes = [], []
    for part in parts:
        r, c = row_sets[id(part.rows)], col_sets[id(part.cols)]
        key = ((r.tile * num_slots + part.slot) * num_kv_tiles)[:, None] + c.tile
        code = (row_pattern_of[id(part.rows)] * num_col_patterns)[:, None] + col_pattern_of[id(part.cols)]
        code = np.where(r.full[:, None] & c.full, -1, code)
        keys.append(key.ravel())
        codes.append(code.ravel())
    key, code = np.concatenate(keys), np.concatenate(codes)
    partial = code >= 0
    distinct, inverse = np.unique(code[partial], return_inverse=True)
    mask = np.full(code.size, -1, np.int64)
    mask[partial] = inverse
    pool = _outer_masks(row_patterns[distinct // num_col_patterns], col_patterns[distinct % num_col_patterns])
    return Entries(key, mask, pool)


def pair_entries(part: Part, num_slots: int, rows: Tiling, cols: Tiling) -> Entries:
    """Entries of a part given pair by pair."""
    if not isinstance(part.pattern, PairPattern):
        raise TypeError(f"pair_entries needs a PairPattern, got {type(part.pattern).__name__}")
    q_place, kv_place = rows.place[part.rows[part.pattern.row]], cols.place[part.cols[part.pattern.col]]
    num_kv_tiles = cols.count.size
    tile_pair = (q_place // rows.block) * num_kv_tiles + kv_place // cols.block
    entry_pair, entry = np.unique(tile_pair, return_inverse=True)
    block_q, kv_bytes = rows.block, cols.block // 8
    pool = np.zeros(entry_pair.size * block_q * kv_bytes, np.uint8)
    byte = (entry * block_q + q_place % block_q) * kv_bytes + kv_place % cols.block // 8
    bit = kv_place % 8  # tiles are multiples of 8, so this is the bit within the byte
    for b in range(8):  # within one bit position every byte occurs at most once, so |= needs no ufunc.at
        pool[byte[bit == b]] |= np.uint8(1 << b)
    key = (entry_pair // num_kv_tiles * num_slots + part.slot) * num_kv_tiles + entry_pair % num_kv_tiles
    return Entries(key, np.arange(entry_pair.size), pool.reshape(-1, block_q, kv_bytes))


@dataclass(frozen=True, eq=False)
class _BoxSide:
    """Rows or columns of a box part, sorted by their place, with the stretches of each touched tile."""

    tile: NDArray[np.int64]  # (n,) touched tiles
    start: NDArray[np.int64]  # (n,) first element of each tile
    row: NDArray[np.int64]  # (elements,) row or column within the tile
    owner: NDArray[np.int64]  # (elements,) index into tile
    order: NDArray[np.int64]  # (elements,) the sort
    full: NDArray[np.bool_]  # (n,)

    @classmethod
    def of(cls, tokens: Tokens, tiling: Tiling) -> _BoxSide:
        place = tiling.place[tokens]
        order = np.argsort(place, kind="stable")
        tile, start, count = np.unique(place[order] // tiling.block, return_index=True, return_counts=True)
        owner = np.repeat(np.arange(tile.size), count)
        return cls(tile, start, place[order] % tiling.block, owner, order, count == tiling.count[tile])

    def fill(self, values: NDArray[np.int32], block: int, empty: int) -> NDArray[np.int32]:
        """``(elements, n)`` values to ``(tiles, block, n)``, absent rows set to ``empty``."""
        dense = np.full((self.tile.size, block, values.shape[1]), empty, np.int32)
        dense[self.owner, self.row] = values
        return dense


_FAR = np.int32(1 << 28)  # a coordinate no grid reaches


def _box_overlaps(
    part: Part, rows: Tiling, cols: Tiling
) -> tuple[_BoxSide, _BoxSide, NDArray[np.intp], NDArray[np.bool_]]:
    """Tile pairs of a box part that may be visited: flat indices into (row tiles, column tiles), and which are full."""
    pattern = part.pattern
    if not isinstance(pattern, BoxPattern):
        raise TypeError(f"box entries need a BoxPattern, got {type(pattern).__name__}")
    r, c = _BoxSide.of(part.rows, rows), _BoxSide.of(part.cols, cols)
    lo, hi, coords = pattern.lo[r.order], pattern.hi[r.order], pattern.coords[c.order]
    lo_min, lo_max = np.minimum.reduceat(lo, r.start), np.maximum.reduceat(lo, r.start)
    hi_min, hi_max = np.minimum.reduceat(hi, r.start), np.maximum.reduceat(hi, r.start)
    c_min, c_max = np.minimum.reduceat(coords, c.start), np.maximum.reduceat(coords, c.start)
    found, filled = [], []
    step = max(1, _CHUNK // max(1, c.tile.size))
    for i in range(0, r.tile.size, step):
        j = slice(i, i + step)
        overlap = np.ones((lo_min[j].shape[0], c.tile.size), np.bool_)
        full = r.full[j, None] & c.full
        for d in range(lo.shape[1]):
            overlap &= (lo_min[j, None, d] <= c_max[:, d]) & (c_min[:, d] < hi_max[j, None, d])
            # Exact: every row's box holds every column if it holds the tile's extremes in each dimension.
            full &= (lo_max[j, None, d] <= c_min[:, d]) & (c_max[:, d] < hi_min[j, None, d])
        hits = np.flatnonzero(overlap)
        found.append(hits + i * c.tile.size)
        filled.append(full.ravel()[hits])
    return r, c, np.concatenate(found), np.concatenate(filled)


def box_visits(part: Part, rows: Tiling, cols: Tiling) -> int:
    """Upper bound of the tiles a box part visits, without making masks; for choosing an order."""
    return int(_box_overlaps(part, rows, cols)[2].size)


def box_entries(part: Part, num_slots: int, rows: Tiling, cols: Tiling) -> Entries:
    """Entries of a box part.

    Masks are made once per distinct (shape of the rows' boxes, shape of the columns, offset between them): on a
    regular grid there are few of those however many tiles there are.
    """
    pattern = part.pattern
    if not isinstance(pattern, BoxPattern):
        raise TypeError(f"box entries need a BoxPattern, got {type(pattern).__name__}")
    r, c, found, full = _box_overlaps(part, rows, cols)
    num_kv_tiles = cols.count.size
    row, col = np.divmod(found, c.tile.size)
    key = (r.tile[row] * num_slots + part.slot) * num_kv_tiles + c.tile[col]

    lo, hi, coords = pattern.lo[r.order], pattern.hi[r.order], pattern.coords[c.order]
    row_base, col_base = np.minimum.reduceat(lo, r.start), np.minimum.reduceat(coords, c.start)
    # Absent rows get an empty box, absent columns a coordinate outside every box.
    lo_tile = r.fill(lo - row_base[r.owner], rows.block, int(_FAR))
    hi_tile = r.fill(hi - row_base[r.owner], rows.block, -int(_FAR))
    col_tile = c.fill(coords - col_base[c.owner], cols.block, int(_FAR))
    n = lo.shape[1]
    row_first, row_class = unique_rows(np.concatenate([lo_tile, hi_tile], axis=2).reshape(r.tile.size, -1))
    col_first, col_class = unique_rows(col_tile.reshape(c.tile.size, -1))

    partial = np.flatnonzero(~full)
    offset = (col_base[col[partial]] - row_base[row[partial]]).astype(np.int64)
    code = row_class[row[partial]] * col_first.size + col_class[col[partial]]
    for d in range(n):
        span = offset[:, d] - offset[:, d].min(initial=0)
        code = code * (int(span.max(initial=0)) + 1) + span
    _, sample, inverse = np.unique(code, return_index=True, return_inverse=True)

    kv_bytes = cols.block // 8
    pool = np.empty((sample.size, rows.block, kv_bytes), np.uint8)
    step = max(1, _CHUNK // (rows.block * cols.block))
    for i in range(0, sample.size, step):
        some = partial[sample[i : i + step]]
        allowed = np.ones((some.size, rows.block, cols.block), np.bool_)
        for d in range(n):
            x = (col_tile[col[some], :, d] + (col_base[col[some], d] - row_base[row[some], d])[:, None])[:, None, :]
            allowed &= (lo_tile[row[some], :, d, None] <= x) & (x < hi_tile[row[some], :, d, None])
        pool[i : i + step] = pack_masks(allowed)
    mask = np.full(found.size, -1, np.int64)
    mask[partial] = inverse
    # A bounding box may overlap where no row's own box does.
    occupied = np.concatenate([pool.any(axis=(1, 2)), [True]])[mask]
    return Entries(key[occupied], mask[occupied], pool)


def all_entries(parts: Parts, rows: Tiling, cols: Tiling) -> Entries:
    """Entries of all parts, one mask pool; keys of different parts may coincide."""
    slots = parts.num_slots
    pieces = [
        rectangle_entries([p for p in parts.parts if p.pattern is None], slots, Covers(rows), Covers(cols)),
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
