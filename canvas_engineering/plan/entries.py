"""Which tiles the parts visit, and with what masks: rectangles and explicit pairs.

Three kinds of parts produce the same thing, :class:`Entries`: rectangles (every row reads every column), pairs
(one by one), and boxes (a row reads a box of the columns' grid; see ``boxes``). None looks at a pair of tokens
unless a partial tile's mask needs it, and masks are told apart before they are made.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from canvas_engineering.groups import PairPattern
from canvas_engineering.plan.atoms import Tokens
from canvas_engineering.plan.bits import pack_masks, unique_rows
from canvas_engineering.plan.parts import Part, Parts
from canvas_engineering.plan.tiling import Tiling

CHUNK = 1 << 24  # elements of temporary boolean arrays


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


def rectangle_entries(parts: Parts, rows: Tiling, cols: Tiling) -> Entries:
    """Entries of the parts without a pattern: row tiles times column tiles, masks as outer products."""
    rectangles = [part for part in parts.parts if part.pattern is None]
    num_kv_tiles, kv_bytes = cols.count.size, cols.block // 8
    if not rectangles:
        return Entries(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros((0, rows.block, kv_bytes), np.uint8))
    row_covers = {i: cover(parts.row_sets[i], rows) for i in dict.fromkeys(part.row_set for part in rectangles)}
    col_covers = {i: cover(parts.col_sets[i], cols) for i in dict.fromkeys(part.col_set for part in rectangles)}
    row_ids, row_patterns = _distinct_bits(row_covers.values(), rows.block // 8)
    col_ids, col_patterns = _distinct_bits(col_covers.values(), kv_bytes)
    row_pattern_of = dict(zip(row_covers, row_ids, strict=True))
    col_pattern_of = dict(zip(col_covers, col_ids, strict=True))
    num_col_patterns = col_patterns.shape[0]
    keys, codes = [], []
    for part in rectangles:
        r, c = row_covers[part.row_set], col_covers[part.col_set]
        key = ((r.tile * parts.num_slots + part.slot) * num_kv_tiles)[:, None] + c.tile
        code = (row_pattern_of[part.row_set] * num_col_patterns)[:, None] + col_pattern_of[part.col_set]
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


def _pair_places(part: Part, rows: Tiling, cols: Tiling) -> tuple[Tokens, Tokens]:
    if not isinstance(part.pattern, PairPattern):
        raise TypeError(f"pair entries need a PairPattern, got {type(part.pattern).__name__}")
    return rows.place[part.rows[part.pattern.row]], cols.place[part.cols[part.pattern.col]]


def pair_visits(part: Part, rows: Tiling, cols: Tiling) -> int:
    """Tiles that a part given pair by pair visits."""
    q_place, kv_place = _pair_places(part, rows, cols)
    tile_pair = (q_place // rows.block) * cols.count.size + kv_place // cols.block
    if rows.count.size * cols.count.size > CHUNK:
        return int(np.unique(tile_pair).size)
    seen = np.zeros(rows.count.size * cols.count.size, np.bool_)
    seen[tile_pair] = True
    return int(np.count_nonzero(seen))


def pair_entries(part: Part, num_slots: int, rows: Tiling, cols: Tiling) -> Entries:
    """Entries of a part given pair by pair."""
    q_place, kv_place = _pair_places(part, rows, cols)
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
