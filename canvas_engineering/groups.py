"""From declared connections to groups: the (query rows, key columns, weight) triples that everything else runs on.

One group is one softmax (SEMANTICS: "softmax scope"). A group may carry a *pattern* that lets each of its rows
read only some of its columns; without one, every row reads every column.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from canvas_engineering.errors import CanvasError
from canvas_engineering.masks import MaskSpec, mask_to_index_pairs, sparse_mask_matrix, window_bounds

if TYPE_CHECKING:
    from canvas_engineering.canvas import CanvasLayout
    from canvas_engineering.connectivity import CanvasTopology, Connection
    from canvas_engineering.program import CanvasProgram

Tokens = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class BoxPattern:
    """Row ``i`` reads the columns whose coordinates lie in the half-open box ``lo[i] <= coords < hi[i]``.

    The coordinates of the columns must fill a box themselves (a region, a frame of it, a range of positions).

    Attributes:
        lo, hi: ``(rows, n)`` int32.
        coords: ``(columns, n)`` int32.
    """

    lo: NDArray[np.int32]
    hi: NDArray[np.int32]
    coords: NDArray[np.int32]

    def restrict(self, rows: slice | NDArray[np.intp], cols: slice) -> BoxPattern:
        """The same pattern for some of the rows and columns, given by their positions in the group."""
        return BoxPattern(self.lo[rows], self.hi[rows], self.coords[cols])

    def rows_with_keys(self) -> NDArray[np.bool_]:
        """``(rows,)`` bool: rows that read at least one column."""
        if self.coords.shape[0] == 0:
            return np.zeros(self.lo.shape[0], np.bool_)
        first, stop = self.coords.min(axis=0), self.coords.max(axis=0) + 1
        return (np.maximum(self.lo, first) < np.minimum(self.hi, stop)).all(axis=1)

    def dense(self) -> NDArray[np.bool_]:
        """``(rows, columns)`` bool."""
        inside = (self.lo[:, None] <= self.coords[None]) & (self.coords[None] < self.hi[:, None])
        return np.asarray(inside.all(axis=2))


@dataclass(frozen=True, eq=False)
class PairPattern:
    """The allowed (row, column) pairs one by one, as positions in the group; no pair twice.

    Attributes:
        row, col: ``(pairs,)`` int64.
        shape: (rows, columns) of the group.
    """

    row: Tokens
    col: Tokens
    shape: tuple[int, int]

    @classmethod
    def from_dense(cls, mask: NDArray[np.bool_]) -> PairPattern:
        row, col = np.nonzero(mask)
        return cls(row, col, (mask.shape[0], mask.shape[1]))

    def restrict(self, rows: slice | NDArray[np.intp], cols: slice) -> PairPattern:
        """The same pattern for some of the rows and columns, given by their positions in the group."""
        new_row = np.full(self.shape[0], -1, np.int64)
        kept_rows = np.arange(self.shape[0])[rows]
        new_row[kept_rows] = np.arange(kept_rows.size)
        new_col = np.full(self.shape[1], -1, np.int64)
        kept_cols = np.arange(self.shape[1])[cols]
        new_col[kept_cols] = np.arange(kept_cols.size)
        row, col = new_row[self.row], new_col[self.col]
        keep = (row >= 0) & (col >= 0)
        return PairPattern(row[keep], col[keep], (kept_rows.size, kept_cols.size))

    def rows_with_keys(self) -> NDArray[np.bool_]:
        """``(rows,)`` bool: rows that read at least one column."""
        has = np.zeros(self.shape[0], np.bool_)
        has[self.row] = True
        return has

    def dense(self) -> NDArray[np.bool_]:
        """``(rows, columns)`` bool."""
        mask = np.zeros(self.shape, np.bool_)
        mask[self.row, self.col] = True
        return mask


Pattern = BoxPattern | PairPattern


@dataclass(frozen=True, eq=False)
class Group:
    """One softmax: each of ``rows`` reads ``cols`` (or what ``pattern`` leaves of them).

    Attributes:
        rows, cols: Token ids, each without repetition. Equal index sets are the same array object, which the
            compiler uses to handle each once.
        weight: Group weight: fill weight times connection weight.
        connection: Index of the connection in ``topology.connections``.
        pattern: What a row may read, by positions in ``rows`` and ``cols``; every row reads something.
    """

    rows: Tokens
    cols: Tokens
    weight: float
    connection: int
    pattern: Pattern | None = None


def with_pattern(group: Group, pattern: Pattern) -> Group | None:
    """``group`` under ``pattern``, rows without keys left out; None when nothing is left."""
    has_keys = pattern.rows_with_keys()
    if has_keys.all():
        return Group(group.rows, group.cols, group.weight, group.connection, pattern)
    kept = np.flatnonzero(has_keys)
    if kept.size == 0:
        return None
    return Group(group.rows[kept], group.cols, group.weight, group.connection, pattern.restrict(kept, slice(None)))


class _RegionIndex:
    """Token ids of regions and of their frames, each built once and handed out as the same array."""

    def __init__(self, layout: CanvasLayout) -> None:
        self.layout = layout
        self._arrays: dict[tuple[str, int | None], Tokens] = {}
        self._coords: dict[str, NDArray[np.int32]] = {}

    def tokens(self, region: str, t: int | None = None) -> Tokens:
        key = (region, t)
        if key not in self._arrays:
            self._arrays[key] = np.asarray(self.layout.region_index_array(region, t), np.int64)
        return self._arrays[key]

    def coords(self, region: str) -> NDArray[np.int32]:
        """``(tokens, 1 + n_spatial)`` canvas coordinates of a region."""
        if region not in self._coords:
            axes = np.unravel_index(self.tokens(region), (self.layout.T, *self.layout.spatial_shape))
            self._coords[region] = np.stack(axes, axis=1).astype(np.int32)
        return self._coords[region]

    def times(self, region: str) -> range:
        t0, t1 = self.layout.bounds(region)[:2]
        return range(t0, t1)

    def frame_slice(self, region: str, t: int | None) -> slice:
        """Positions of frame ``t`` within the region's tokens (row-major, so a frame is contiguous)."""
        if t is None:
            return slice(None)
        times = self.times(region)
        per_frame = self.tokens(region).size // len(times)
        return slice((t - times.start) * per_frame, (t - times.start + 1) * per_frame)


def fill_frames(populated: NDArray[np.int64], target: int, fill: str, order: int) -> list[tuple[int, float]]:
    """Which populated times stand in for ``target``, and with what weight.

    Args:
        populated: Real times that have positions, ascending.
        target: The real time asked for.
        fill: ``"drop"``, ``"hold"`` or ``"interpolate"``.
        order: Order of the inverse-distance interpolation.

    Returns:
        (index into ``populated``, weight) pairs; weights sum to 1; empty when there is no connection.
    """
    after = int(np.searchsorted(populated, target))
    if after < populated.size and populated[after] == target:
        return [(after, 1.0)]
    if fill == "drop" or populated.size == 0:
        return []
    if fill == "hold":
        return [(after - 1, 1.0)] if after > 0 else []
    if order == 1:
        if after == 0:
            return [(0, 1.0)]
        if after == populated.size:
            return [(after - 1, 1.0)]
        past, future = target - int(populated[after - 1]), int(populated[after]) - target
        return [(after - 1, future / (past + future)), (after, past / (past + future))]
    # The order+1 nearest lie within that many places on either side.
    window = np.arange(max(0, after - order - 1), min(populated.size, after + order + 1))
    distance = np.abs(populated[window] - target)
    nearest = window[np.argsort(distance, kind="stable")[: order + 1]]  # stable: ties take the earlier time first
    # Relative to the nearest distance, so that a high order cannot underflow the weights to 0/0.
    closeness = (np.abs(populated[nearest] - target) / distance.min()) ** -float(order)
    return [(int(i), float(w)) for i, w in zip(nearest, closeness / closeness.sum(), strict=True)]


def _temporal_pairs(
    connection: Connection, index: _RegionIndex, skip_temporal: bool
) -> Iterator[tuple[int | None, int | None, float]]:
    """(src frame or None for all, dst frame or None for all, fill weight) of each group, in reference-frame order."""
    if skip_temporal or (connection.t_src is None and connection.t_dst is None):
        yield None, None, 1.0
        return
    layout = index.layout
    src_times, dst_times = index.times(connection.src), index.times(connection.dst)
    src_period = layout.region_spec(connection.src).period if connection.t_src is not None else 1
    populated = np.arange(dst_times.start, dst_times.stop, dtype=np.int64) * layout.region_spec(connection.dst).period
    for ref in range(layout.T):
        src_t = None if connection.t_src is None else ref + connection.t_src
        if src_t is not None and src_t not in src_times:
            continue
        if connection.t_dst is None:
            yield src_t, None, 1.0
            continue
        target = (ref + connection.t_dst) * src_period
        for i, weight in fill_frames(populated, target, connection.temporal_fill.value, connection.interpolation_order):
            yield src_t, dst_times[i], weight


def tile_boxes(mask_spec: MaskSpec, layout: CanvasLayout, src: str, dst: str, coords: NDArray[np.int32]) -> BoxPattern:
    """Tile mask as boxes: a query reads all frames of dst in its own spatial tile, or all of dst if none is there.

    Tiles are counted from the first position of ``src``. ``coords``: canvas coordinates of src's tokens.
    """
    src_bounds = layout.region_bounds(src)[1:]
    n = layout.n_spatial_dims
    shape = np.array(mask_spec.spatial_tile(n), np.int32)
    start = np.array([lo for lo, _ in src_bounds], np.int32)
    stop = np.array([hi for _, hi in src_bounds], np.int32)
    tile_lo = start + (coords[:, 1:] - start) // shape * shape
    tile_hi = np.minimum(tile_lo + shape, stop)
    first = np.array([b[0] for b in layout.region_bounds(dst)], np.int32)
    last = np.array([b[1] for b in layout.region_bounds(dst)], np.int32)
    lo = np.concatenate([np.full((len(coords), 1), first[0]), np.maximum(tile_lo, first[1:])], axis=1)
    hi = np.concatenate([np.full((len(coords), 1), last[0]), np.minimum(tile_hi, last[1:])], axis=1)
    empty = (lo >= hi).any(axis=1)
    lo[empty], hi[empty] = first, last
    return BoxPattern(lo.astype(np.int32), hi.astype(np.int32), np.zeros((0, n + 1), np.int32))


def mask_pattern(mask_spec: MaskSpec, layout: CanvasLayout, src: str, dst: str) -> Pattern | None:
    """The pattern of a mask between two whole regions, rows and columns in ``region_indices`` order."""
    return _mask_pattern(mask_spec, _RegionIndex(layout), src, dst)


def _mask_pattern(mask_spec: MaskSpec, index: _RegionIndex, src: str, dst: str) -> Pattern | None:
    layout = index.layout
    match mask_spec.kind:
        case "full":
            return None
        case "tile":
            boxes = tile_boxes(mask_spec, layout, src, dst, index.coords(src))
            return BoxPattern(boxes.lo, boxes.hi, index.coords(dst))
        case "window":
            lo, hi = window_bounds(mask_spec, layout, src, dst)
            first = np.array([b[0] for b in layout.region_bounds(dst)], np.int32)
            return BoxPattern((lo + first).astype(np.int32), (hi + first).astype(np.int32), index.coords(dst))
        case "sparse":
            if mask_spec.mask is None:
                return None
            return PairPattern.from_dense(sparse_mask_matrix(mask_spec, layout, src, dst))
        case _:
            raise CanvasError(f"mask kind must be one of full, tile, sparse, window, got {mask_spec.kind!r}")


def _split_groups(mask_spec: MaskSpec, index: _RegionIndex, group: Group, src: str, dst: str) -> Iterator[Group]:
    """One group per pair of ``mask_to_index_pairs``, cut to the rows and columns of ``group``."""
    for rows, cols in mask_to_index_pairs(mask_spec, index.layout, src, dst):
        row_array, col_array = np.asarray(rows, np.int64), np.asarray(cols, np.int64)
        if group.rows is not index.tokens(src):
            row_array = row_array[np.isin(row_array, group.rows)]
        if group.cols is not index.tokens(dst):
            col_array = col_array[np.isin(col_array, group.cols)]
        if row_array.size and col_array.size:
            yield Group(row_array, col_array, group.weight, group.connection)


def resolve_groups(
    topology: CanvasTopology,
    layout: CanvasLayout,
    *,
    program: CanvasProgram | None = None,
    skip_temporal: bool = False,
    split_masks: bool = False,
    connections: Collection[int] | None = None,
    warn: bool = True,
) -> list[Group]:
    """The groups of a topology, in the order of its connections.

    Args:
        topology, layout: The declaration. A connection that names a region the layout lacks is skipped with a
            ``UserWarning``.
        program: Its ``ConnectionProgram.mask_spec`` for (src, dst) replaces the connection's own mask.
        skip_temporal: Treat every connection as dense in time.
        split_masks: One group per pair of ``mask_to_index_pairs`` instead of one group with a pattern; for
            functions that see a group as a whole.
        connections: Only these indices of ``topology.connections``.
        warn: Whether to warn of skipped connections.
    """
    index = _RegionIndex(layout)
    patterns: dict[tuple[int, str, str], Pattern | None] = {}
    groups: list[Group] = []
    for number, connection in enumerate(topology.connections):
        missing = [name for name in (connection.src, connection.dst) if name not in layout.regions]
        if not missing and connections is not None and number not in connections:
            continue
        if missing and not warn:
            continue
        if missing:
            warnings.warn(
                f"connection {number} ({connection.src!r} -> {connection.dst!r}) names the unknown region "
                f"{missing[0]!r} and is skipped; known regions: {sorted(layout.regions)}",
                UserWarning,
                stacklevel=2,
            )
            continue
        mask_spec = connection_mask(connection, program)
        for src_t, dst_t, fill_weight in _temporal_pairs(connection, index, skip_temporal):
            rows, cols = index.tokens(connection.src, src_t), index.tokens(connection.dst, dst_t)
            if rows.size == 0 or cols.size == 0:
                continue
            group = Group(rows, cols, fill_weight * connection.weight, number)
            if mask_spec is None or mask_spec.kind == "full":
                groups.append(group)
            elif split_masks:
                groups.extend(_split_groups(mask_spec, index, group, connection.src, connection.dst))
            else:
                key = (id(mask_spec), connection.src, connection.dst)
                if key not in patterns:
                    patterns[key] = _mask_pattern(mask_spec, index, connection.src, connection.dst)
                pattern = patterns[key]
                if pattern is None:
                    groups.append(group)
                    continue
                part = pattern.restrict(
                    index.frame_slice(connection.src, src_t), index.frame_slice(connection.dst, dst_t)
                )
                masked = with_pattern(group, part)
                if masked is not None:
                    groups.append(masked)
    return groups


def connection_mask(connection: Connection, program: CanvasProgram | None) -> MaskSpec | None:
    """The mask of a connection: its program's, else its own."""
    if program is not None:
        edge = program.connections.get((connection.src, connection.dst))
        if edge is not None and edge.mask_spec is not None:
            return edge.mask_spec
    return connection.mask
