"""Exact covers of boolean masks by disjoint boxes."""

from __future__ import annotations

import gc
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from canvas_engineering._checks import check_int
from canvas_engineering.errors import CanvasError


class Rect:
    """Axis-aligned box of grid cells in any number of dimensions, compared and hashed by value.

    Made from ``Rect(ranges=((lo, hi), ...))``, ``Rect(((lo, hi), ...))`` or ``Rect(lo, hi, lo, hi, ...)``.
    For boxes of ``(t, h, w)`` the attributes ``t0, t1, h0, h1, w0, w1`` name the limits; 0 for missing axes.

    Attributes:
        ranges: Half-open ``(lo, hi)`` per axis.

    Raises:
        TypeError: neither pairs nor an even number of limits.
    """

    __slots__ = ("ranges",)

    ranges: tuple[tuple[int, int], ...]

    def __init__(self, *limits: Any, ranges: tuple[tuple[int, int], ...] | None = None) -> None:
        if ranges is None:
            if len(limits) == 1 and isinstance(limits[0], tuple) and limits[0]:
                ranges = limits[0]
            elif limits and len(limits) % 2 == 0:
                ranges = tuple(zip(limits[::2], limits[1::2], strict=True))
            else:
                raise TypeError(
                    "Rect takes an even number of limits (lo, hi, lo, hi, ...) or ranges=((lo, hi), ...), "
                    f"got {limits!r}"
                )
        elif limits:
            raise TypeError(f"Rect takes limits or ranges, not both, got {limits!r} and ranges={ranges!r}")
        self.ranges = ranges

    def __eq__(self, other: object) -> bool:
        return self.ranges == other.ranges if isinstance(other, Rect) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.ranges)

    def __repr__(self) -> str:
        return f"Rect(ranges={self.ranges})"

    @property
    def volume(self) -> int:
        """Number of cells."""
        return math.prod(hi - lo for lo, hi in self.ranges)

    def _limit(self, axis: int, side: int) -> int:
        return self.ranges[axis][side] if axis < len(self.ranges) else 0

    @property
    def t0(self) -> int:
        """First timestep."""
        return self._limit(0, 0)

    @property
    def t1(self) -> int:
        """End of the timesteps."""
        return self._limit(0, 1)

    @property
    def h0(self) -> int:
        """First row."""
        return self._limit(1, 0)

    @property
    def h1(self) -> int:
        """End of the rows."""
        return self._limit(1, 1)

    @property
    def w0(self) -> int:
        """First column."""
        return self._limit(2, 0)

    @property
    def w1(self) -> int:
        """End of the columns."""
        return self._limit(2, 1)


def as_bool_array(mask: Any, what: str) -> np.ndarray:
    """A NumPy bool array of a NumPy array, torch tensor or nested list of booleans or 0/1 numbers.

    Raises:
        CanvasError: ragged, without axes, or holding anything but booleans, 0 and 1.
    """
    if hasattr(mask, "detach"):
        mask = mask.detach().cpu()
    try:
        array = np.asarray(mask)
    except ValueError:
        raise CanvasError(f"{what}: expected an array of booleans, got rows of unequal length") from None
    if array.ndim == 0:
        raise CanvasError(f"{what}: expected an array of booleans, got {mask!r}")
    if array.dtype != np.bool_:
        if array.dtype.kind not in "iuf" or not np.isin(array, (0, 1)).all():
            raise CanvasError(f"{what}: expected booleans (or 0 and 1), got dtype {array.dtype}")
        array = array.astype(np.bool_)
    return array


def rect_cover(mask: Any, min_area: int = 4) -> list[Rect]:
    """Cover exactly the True cells of a mask with disjoint boxes.

    Boxes below ``min_area`` cells appear only where nothing larger fits: the cells they hold contain no box
    of ``min_area`` cells or more. The cover is small for masks made of blocks, not the smallest possible.

    Equal runs of True along the last axis are merged across the other axes; what this leaves in small pieces
    is merged again in the opposite order of axes, then searched for every minimal shape of ``min_area``.

    Args:
        mask: Booleans in any number of dimensions: a NumPy array or torch tensor.
        min_area: Volume from which a box counts as large.

    Returns:
        Boxes ordered by their lower corner, row-major.

    Raises:
        CanvasError: ``mask`` is not an array of booleans, or ``min_area`` not an integer >= 0.
    """
    rest = np.array(as_bool_array(mask, "rect_cover: mask"), order="C")
    min_area = max(1, check_int(min_area, "rect_cover: min_area", minimum=0))
    order = tuple(range(rest.ndim))
    found = []
    for axes in (order, order[::-1])[: rest.ndim]:
        lo, hi = _merged_runs(rest, axes)
        large = np.prod(hi - lo, axis=0) >= min_area
        found.append((lo[:, large], hi[:, large]))
        rest[...] = False
        _fill(rest, lo[:, ~large], hi[:, ~large])
    found.extend(_search_shapes(rest, min_area))
    found.append(_merged_runs(rest, order))
    lo = np.concatenate([part for part, _ in found], axis=1)
    hi = np.concatenate([part for _, part in found], axis=1)
    first = np.argsort(_flat_index(lo, rest.shape), kind="stable")
    columns = [zip(lo[a, first].tolist(), hi[a, first].tolist(), strict=True) for a in order]
    # The collector would walk the growing list again and again: 10 s instead of 2 s for four million boxes.
    collecting = gc.isenabled()
    gc.disable()
    try:
        return [_rect(ranges) for ranges in zip(*columns, strict=True)]
    finally:
        if collecting:
            gc.enable()


def _rect(ranges: tuple[tuple[int, int], ...]) -> Rect:
    """A Rect without the argument handling of its constructor: covers can have millions."""
    rect = Rect.__new__(Rect)
    rect.ranges = ranges
    return rect


_Boxes = tuple[np.ndarray, np.ndarray]  # lo, hi: each (n_dims, K) int64


def _merged_runs(mask: np.ndarray, axes: tuple[int, ...]) -> _Boxes:
    """Runs along the last of ``axes``, merged along the others from last to first where they agree."""
    grid = mask.transpose(axes)
    shape = grid.shape
    flat = np.zeros((math.prod(shape[:-1]), shape[-1] + 2), dtype=np.int8)
    flat[:, 1:-1] = grid.reshape(flat.shape[0], shape[-1])
    edge = np.diff(flat, axis=1)  # 1 where a run starts, -1 one past its end
    row, start = np.nonzero(edge == 1)
    end = np.nonzero(edge == -1)[1]
    lo = np.stack([*(np.unravel_index(row, shape[:-1]) if len(shape) > 1 else ()), start])
    hi = lo + 1
    hi[-1] = end
    for axis in range(len(shape) - 2, -1, -1):
        lo, hi = _merge_along(lo, hi, shape, axis)
    back = np.argsort(axes)
    return lo[back], hi[back]


def _merge_along(lo: np.ndarray, hi: np.ndarray, shape: tuple[int, ...], axis: int) -> _Boxes:
    """Join boxes that touch along ``axis`` and agree in all other axes.

    Boxes are one cell wide along ``axis`` and the axes before it.
    """
    if lo.shape[1] == 0:
        return lo, hi
    # With ``axis`` as the fastest one, lower corners that differ by one cell along it are consecutive numbers.
    last = [*(a for a in range(len(shape)) if a != axis), axis]
    key = _flat_index(lo[last], [shape[a] for a in last])
    order = np.argsort(key, kind="stable")  # merges the sorted stretches that the row-major order left
    key = key[order]
    joined = (key[1:] == key[:-1] + 1) & (key[1:] % shape[axis] != 0)
    for a in range(axis + 1, len(shape)):
        end = hi[a, order]
        joined &= end[1:] == end[:-1]
    head = np.flatnonzero(np.concatenate(([True], ~joined)))
    width = np.zeros(len(order), dtype=np.int64)  # along ``axis``, at the first box of each chain
    width[order[head]] = np.diff(head, append=len(order))
    kept = width > 0
    lo, hi = lo[:, kept], hi[:, kept]
    hi[axis] = lo[axis] + width[kept]
    return lo, hi


def _flat_index(coords: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """Row-major number of each column of ``coords`` (n, K) in a grid."""
    index = coords[0].copy()
    for coord, size in zip(coords[1:], shape[1:], strict=True):
        index *= size
        index += coord
    return index


def _fill(mask: np.ndarray, lo: np.ndarray, hi: np.ndarray) -> None:
    """Set the cells of many small boxes."""
    size = hi - lo
    volume = np.prod(size, axis=0)
    local = np.arange(volume.sum()) - np.repeat(np.cumsum(volume) - volume, volume)
    coords: list[np.ndarray] = []
    for axis in range(mask.ndim - 1, -1, -1):
        extent = np.repeat(size[axis], volume)
        coords.insert(0, np.repeat(lo[axis], volume) + local % extent)
        local //= extent
    mask[tuple(coords)] = True


def _search_shapes(rest: np.ndarray, min_area: int) -> Iterator[_Boxes]:
    """Take boxes of every minimal shape of ``min_area`` cells out of ``rest`` until none is left."""
    cells = rest.reshape(-1)
    strides = np.array(rest.strides) // rest.itemsize
    for shape, anchors in _minimal_shapes(rest, min_area, ()):
        step = np.array(shape)
        offsets = np.stack(np.unravel_index(np.arange(math.prod(shape)), shape), axis=1) @ strides
        # Boxes whose corners agree modulo the shape cannot overlap: one class at a time is taken as a whole,
        # and since cells only ever leave, no box of the shape is left after the last class.
        class_of = np.ravel_multi_index(tuple((anchors % step).T), shape)
        order = np.argsort(class_of, kind="stable")
        for members in np.split(anchors[order], np.flatnonzero(np.diff(class_of[order])) + 1):
            covered = (members @ strides)[:, None] + offsets
            free = cells[covered].all(axis=1)
            cells[covered[free]] = False
            yield members[free].T, (members[free] + step).T


def _minimal_shapes(
    eroded: np.ndarray, min_area: int, shape: tuple[int, ...]
) -> Iterator[tuple[tuple[int, ...], np.ndarray]]:
    """Shapes of at least ``min_area`` cells that need all of every axis, and the corners ``(K, n)`` of fits.

    ``eroded`` marks the cells from which the sizes fixed so far fit. The caller may clear cells between two
    steps: corners found before are then candidates, no longer certain.
    """
    axis, needed = len(shape), -(-min_area // math.prod(shape))
    if axis == eroded.ndim - 1:
        full = (*shape, needed)
        volume = math.prod(full)
        if all(volume // size * (size - 1) < min_area for size in full):
            anchors = np.argwhere(_erode(eroded, axis, 1, needed))
            if len(anchors):
                yield full, anchors
        return
    for size in range(1, needed + 1):
        eroded = _erode(eroded, axis, size - 1, size)
        if not eroded.any():
            return
        yield from _minimal_shapes(eroded, min_area, (*shape, size))


def _erode(mask: np.ndarray, axis: int, have: int, want: int) -> np.ndarray:
    """From cells where ``have`` cells along ``axis`` fit to those where ``want`` fit."""
    moved = np.moveaxis(mask, axis, 0)
    have = max(have, 1)
    while have < want and len(moved):
        step = min(have, want - have)
        moved = moved[:-step] & moved[step:]
        have += step
    return np.moveaxis(moved, 0, axis)
