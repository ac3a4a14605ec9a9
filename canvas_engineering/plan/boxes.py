"""Entries of parts whose rows read boxes of a grid: windows, spatial tiles, local bands.

Tile pairs are classified by comparing the extremes of their boxes, so no pair of tokens is looked at except to
make the distinct masks: 115,200 positions of windows are compiled in about a second.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from canvas_engineering.groups import BoxPattern
from canvas_engineering.plan.atoms import Tokens
from canvas_engineering.plan.bits import pack_masks, unique_rows
from canvas_engineering.plan.entries import CHUNK, Entries
from canvas_engineering.plan.parts import Part
from canvas_engineering.plan.tiling import Tiling


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


@dataclass(frozen=True, eq=False)
class _Extents:
    """What the tiles of a box part span, per dimension.

    Attributes:
        lo_min, lo_max, hi_min, hi_max: ``(row tiles, n)`` extremes of the rows' boxes.
        c_min, c_max: ``(column tiles, n)`` extremes of the columns' coordinates.
    """

    rows: _BoxSide
    cols: _BoxSide
    lo_min: NDArray[np.int32]
    lo_max: NDArray[np.int32]
    hi_min: NDArray[np.int32]
    hi_max: NDArray[np.int32]
    c_min: NDArray[np.int32]
    c_max: NDArray[np.int32]

    @classmethod
    def of(cls, part: Part, rows: Tiling, cols: Tiling) -> _Extents:
        pattern = box_pattern(part)
        r, c = _BoxSide.of(part.rows, rows), _BoxSide.of(part.cols, cols)
        lo, hi, coords = pattern.lo[r.order], pattern.hi[r.order], pattern.coords[c.order]
        return cls(
            r,
            c,
            np.minimum.reduceat(lo, r.start),
            np.maximum.reduceat(lo, r.start),
            np.minimum.reduceat(hi, r.start),
            np.maximum.reduceat(hi, r.start),
            np.minimum.reduceat(coords, c.start),
            np.maximum.reduceat(coords, c.start),
        )

    def overlaps(self) -> tuple[NDArray[np.intp], NDArray[np.bool_]]:
        """Tile pairs that may be visited, as flat indices into (row tiles, column tiles), and which are full."""
        found, filled = [], []
        num_rows, num_cols = self.rows.tile.size, self.cols.tile.size
        step = max(1, CHUNK // max(1, num_cols))
        for i in range(0, num_rows, step):
            j = slice(i, i + step)
            overlap = np.ones((self.lo_min[j].shape[0], num_cols), np.bool_)
            full = self.rows.full[j, None] & self.cols.full
            for d in range(self.lo_min.shape[1]):
                overlap &= (self.lo_min[j, None, d] <= self.c_max[:, d]) & (self.c_min[:, d] < self.hi_max[j, None, d])
                # Exact: every row's box holds every column if it holds the tile's extremes in each dimension.
                full &= (self.lo_max[j, None, d] <= self.c_min[:, d]) & (self.c_max[:, d] < self.hi_min[j, None, d])
            hits = np.flatnonzero(overlap)
            found.append(hits + i * num_cols)
            filled.append(full.ravel()[hits])
        return np.concatenate(found), np.concatenate(filled)

    def count_overlaps(self) -> int:
        """How many tile pairs overlap, from histograms of the tiles' intervals.

        Boxes overlap when they do in every dimension, and few distinct intervals occur in each, so the count is
        a product of small matrices instead of a look at every pair of tiles.
        """
        col_hist, row_hist, tables = (
            np.zeros(self.cols.tile.size, np.int64),
            np.zeros(self.rows.tile.size, np.int64),
            [],
        )
        col_shape, row_shape = [], []
        for d in range(self.lo_min.shape[1]):
            row_spans, row_id = np.unique(np.stack([self.lo_min[:, d], self.hi_max[:, d]]), axis=1, return_inverse=True)
            col_spans, col_id = np.unique(np.stack([self.c_min[:, d], self.c_max[:, d]]), axis=1, return_inverse=True)
            tables.append((row_spans[0, :, None] <= col_spans[1]) & (col_spans[0] < row_spans[1, :, None]))
            row_shape.append(row_spans.shape[1])
            col_shape.append(col_spans.shape[1])
            row_hist = row_hist * row_shape[-1] + row_id.ravel()
            col_hist = col_hist * col_shape[-1] + col_id.ravel()
        if max(math.prod(row_shape), math.prod(col_shape)) > CHUNK:
            return int(self.overlaps()[0].size)
        reached = np.bincount(col_hist, minlength=math.prod(col_shape)).astype(np.float64).reshape(col_shape)
        for table in tables:  # contract the first column axis, append the row axis: after n steps all are rows
            reached = np.tensordot(reached, table.astype(np.float64), axes=(0, 1))
        return int(np.bincount(row_hist, minlength=math.prod(row_shape)).astype(np.float64) @ reached.ravel())


def box_pattern(part: Part) -> BoxPattern:
    """The part's pattern, which must be a box pattern."""
    if not isinstance(part.pattern, BoxPattern):
        raise TypeError(f"expected a part with a BoxPattern, got {type(part.pattern).__name__}")
    return part.pattern


def box_visits(part: Part, rows: Tiling, cols: Tiling) -> int:
    """Upper bound of the tiles a box part visits, without making masks; for choosing an order."""
    return _Extents.of(part, rows, cols).count_overlaps()


def box_entries(part: Part, num_slots: int, rows: Tiling, cols: Tiling) -> Entries:
    """Entries of a box part.

    Masks are made once per distinct (shape of the rows' boxes, shape of the columns, offset between them): on a
    regular grid there are few of those however many tiles there are.
    """
    pattern, extents = box_pattern(part), _Extents.of(part, rows, cols)
    r, c = extents.rows, extents.cols
    found, full = extents.overlaps()
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
    _, row_class = unique_rows(np.concatenate([lo_tile, hi_tile], axis=2).reshape(r.tile.size, -1))
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
    step = max(1, CHUNK // (rows.block * cols.block))
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
