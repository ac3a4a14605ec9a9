"""Attention masks between two regions: tiles, explicit masks and sliding windows.

A :class:`MaskSpec` on a connection restricts which keys of ``dst`` each query of ``src`` reads.
:func:`mask_to_index_pairs` is its definition. The functions below it give the same pattern in the forms
that a plan is compiled from, without a list of pairs: tile numbers (:func:`tile_of`), boxes
(:func:`window_bounds`) and a dense mask (:func:`sparse_mask_matrix`).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np

from canvas_engineering._checks import check_int, check_shape
from canvas_engineering.canvas import CanvasLayout
from canvas_engineering.errors import CanvasError
from canvas_engineering.rects import Rect as Rect, as_bool_array, rect_cover as rect_cover

MASK_KINDS = ("full", "tile", "sparse", "window")
"""What ``MaskSpec.kind`` may be."""


@dataclass(frozen=True, eq=False)
class MaskSpec:
    """Which keys of ``dst`` a query of ``src`` may read.

    Kinds:
        - ``"full"``: all of them.
        - ``"tile"``: those in the query's own spatial tile, at all timesteps. Tiles start at src's lower
          corner; a tile that dst does not reach reads all of dst.
        - ``"sparse"``: those of an explicit ``mask``; without one, all of them.
        - ``"window"``: those in a box of ``window_shape`` around the query's canvas coordinates, moved inward
          at dst's borders so that every query reads equally many keys (the neighborhood rule of NATTEN,
          Hassani et al. 2023); a window wider than dst reads all of it. An even width reaches one further
          towards lower coordinates. With a tile shape the box is centred on the query's tile, so that all
          queries of a tile read the same keys (sliding tile attention, Zhang et al. 2025).

    Args:
        kind: One of :data:`MASK_KINDS`.
        tile_h: Tile height, for two spatial axes.
        tile_w: Tile width, for two spatial axes.
        tile_shape: Tile size per spatial axis, missing trailing sizes are 1; excludes ``tile_h``/``tile_w``.
            For ``"window"`` it may also have one size per axis of ``(t, *spatial)``.
        mask: For ``"sparse"``: booleans of shape ``(|src|, |dst|)`` in ``region_indices`` order, or of dst's
            own shape ``(t, *spatial)``, the same keys for every query. Kept as a read-only NumPy array.
        window_shape: For ``"window"``: size per axis of ``(t, *spatial)``.

    Raises:
        CanvasError: unknown kind; sizes that are not positive integers; both forms of tile shape; a ``mask``
            that is not boolean; ``mask`` or ``window_shape`` with a kind that does not use it, or missing
            where ``"window"`` needs it.
    """

    kind: str = "full"
    tile_h: int = 1
    tile_w: int = 1
    tile_shape: tuple[int, ...] | None = None
    mask: Any = None
    window_shape: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.kind not in MASK_KINDS:
            raise CanvasError(f"MaskSpec.kind: expected one of {', '.join(MASK_KINDS)}, got {self.kind!r}")
        object.__setattr__(self, "tile_h", check_int(self.tile_h, "MaskSpec.tile_h", minimum=1))
        object.__setattr__(self, "tile_w", check_int(self.tile_w, "MaskSpec.tile_w", minimum=1))
        if self.tile_shape is not None:
            object.__setattr__(self, "tile_shape", check_shape(self.tile_shape, "MaskSpec.tile_shape"))
            if (self.tile_h, self.tile_w) != (1, 1):
                raise CanvasError(
                    "MaskSpec takes either tile_shape or tile_h and tile_w, got "
                    f"tile_shape={self.tile_shape}, tile_h={self.tile_h}, tile_w={self.tile_w}"
                )
        if self.mask is not None:
            if self.kind != "sparse":
                raise CanvasError(f"MaskSpec.mask belongs to kind='sparse', got kind={self.kind!r}")
            mask = np.array(as_bool_array(self.mask, "MaskSpec.mask"))
            mask.setflags(write=False)
            object.__setattr__(self, "mask", mask)
        if self.window_shape is not None:
            if self.kind != "window":
                raise CanvasError(f"MaskSpec.window_shape belongs to kind='window', got kind={self.kind!r}")
            object.__setattr__(self, "window_shape", check_shape(self.window_shape, "MaskSpec.window_shape"))
        elif self.kind == "window":
            raise CanvasError("MaskSpec(kind='window') needs window_shape=(t, *spatial), got None")

    def _identity(self) -> tuple[object, ...]:
        digest = None
        if self.mask is not None:
            digest = (self.mask.shape, hashlib.blake2b(np.packbits(self.mask).tobytes()).digest())
        return (self.kind, self.tile_h, self.tile_w, self.tile_shape, digest, self.window_shape)

    def __eq__(self, other: object) -> bool:
        # Written out because == of two arrays has no truth value.
        if not isinstance(other, MaskSpec):
            return NotImplemented
        return self._identity() == other._identity()

    def __hash__(self) -> int:
        return hash(self._identity())

    @property
    def resolved_tile_shape(self) -> tuple[int, ...]:
        """``tile_shape``, or ``(tile_h, tile_w)`` where that is None."""
        return (self.tile_h, self.tile_w) if self.tile_shape is None else self.tile_shape

    def spatial_tile(self, n_spatial: int) -> tuple[int, ...]:
        """Tile size per spatial axis, missing trailing sizes filled with 1.

        Raises:
            CanvasError: more sizes than axes.
        """
        tile = self.resolved_tile_shape
        if self.tile_shape is None and n_spatial == 1 and self.tile_w == 1:
            tile = tile[:1]
        if len(tile) > n_spatial:
            raise CanvasError(f"MaskSpec tile has {len(tile)} sizes for {n_spatial} spatial axes, got tile {tile}")
        return tile + (1,) * (n_spatial - len(tile))

    def window_tile(self, n_spatial: int) -> tuple[int, ...]:
        """Tile size per axis of ``(t, *spatial)`` for ``kind="window"``; one timestep unless given."""
        if self.tile_shape is not None and len(self.tile_shape) == n_spatial + 1:
            return self.tile_shape
        return (1, *self.spatial_tile(n_spatial))


def tile_of(mask_spec: MaskSpec, layout: CanvasLayout, region: str, anchor: str | None = None) -> np.ndarray:
    """Number of the spatial tile that each token of a region lies in.

    Args:
        mask_spec: Its tile shape is used, whatever its kind.
        layout: The canvas.
        region: Region whose tokens are numbered.
        anchor: Region whose box is cut into tiles, starting at its lower corner; ``region`` itself if None.

    Returns:
        ``(|region|,)`` int64 in ``region_indices`` order: tiles of ``anchor`` in row-major order, -1 for
        tokens outside the spatial extent of ``anchor``. Every timestep has the same tiles.
    """
    tile = mask_spec.spatial_tile(layout.n_spatial_dims)
    (t0, t1), *extents = layout.region_bounds(region)
    anchor_extents = layout.region_bounds(region if anchor is None else anchor)[1:]
    number = np.zeros((), dtype=np.int64)
    inside = np.ones((), dtype=bool)
    for (lo, hi), (a_lo, a_hi), size in zip(extents, anchor_extents, tile, strict=True):
        coord = np.arange(lo, hi, dtype=np.int64)
        count = -(-(a_hi - a_lo) // size)
        number = number[..., None] * count + (coord - a_lo) // size
        inside = inside[..., None] & (coord >= a_lo) & (coord < a_hi)
    frame = np.where(inside, number, -1).reshape(-1)
    return np.tile(frame, t1 - t0)


def window_axes(mask_spec: MaskSpec, layout: CanvasLayout, src: str, dst: str) -> list[tuple[np.ndarray, np.ndarray]]:
    """The window of each src coordinate along each axis, for ``kind="window"``.

    Windows are boxes, so the window of a token is the product of these intervals over its coordinates.

    Returns:
        For each axis of ``(t, *spatial)`` a pair ``(lo, hi)`` of int64 arrays, as long as src's extent along
        that axis: half-open intervals in coordinates local to dst.

    Raises:
        CanvasError: the spec has no window, or its length is not the number of canvas axes.
    """
    n_axes = len(layout.shape)
    if mask_spec.window_shape is None:
        raise CanvasError(f"expected a MaskSpec of kind 'window', got kind={mask_spec.kind!r}")
    if len(mask_spec.window_shape) != n_axes:
        raise CanvasError(
            f"MaskSpec.window_shape: expected {n_axes} sizes (t and {layout.n_spatial_dims} spatial), "
            f"got {mask_spec.window_shape}"
        )
    tile = mask_spec.window_tile(layout.n_spatial_dims)
    axes = []
    for axis, (s_bounds, d_bounds) in enumerate(zip(layout.region_bounds(src), layout.region_bounds(dst), strict=True)):
        (s_lo, s_hi), (d_lo, d_hi) = s_bounds, d_bounds
        width = min(mask_spec.window_shape[axis], d_hi - d_lo)
        offset = np.arange(s_hi - s_lo, dtype=np.int64)
        tile_lo = s_lo + offset // tile[axis] * tile[axis]
        tile_hi = np.minimum(tile_lo + tile[axis], s_hi)
        # Floor division puts the odd key of an even window on the side of lower coordinates, like NATTEN.
        start = (tile_lo + tile_hi - mask_spec.window_shape[axis]) // 2
        lo = np.clip(start, d_lo, d_hi - width) - d_lo
        axes.append((lo, lo + width))
    return axes


def window_bounds(mask_spec: MaskSpec, layout: CanvasLayout, src: str, dst: str) -> tuple[np.ndarray, np.ndarray]:
    """The box of keys that each token of src reads, for ``kind="window"``.

    Returns:
        ``(lo, hi)``, int64 ``(|src|, 1 + n_spatial_dims)``: per token of src, in ``region_indices`` order,
        the half-open box in coordinates local to dst, axes ``(t, *spatial)``.

    Raises:
        CanvasError: as :func:`window_axes`.
    """
    axes = window_axes(mask_spec, layout, src, dst)
    lo = np.stack(np.meshgrid(*(a for a, _ in axes), indexing="ij"), axis=-1).reshape(-1, len(axes))
    hi = np.stack(np.meshgrid(*(b for _, b in axes), indexing="ij"), axis=-1).reshape(-1, len(axes))
    return lo, hi


def sparse_mask_matrix(mask_spec: MaskSpec, layout: CanvasLayout, src: str, dst: str) -> np.ndarray:
    """The mask of ``kind="sparse"`` as booleans over (queries, keys).

    Returns:
        ``(|src|, |dst|)`` bool in ``region_indices`` order, read-only; all True without a ``mask``. A mask of
        dst's own shape is broadcast, not copied.

    Raises:
        CanvasError: the mask has neither shape ``(|src|, |dst|)`` nor dst's ``(t, *spatial)``.
    """
    shape = (layout.region_numel(src), layout.region_numel(dst))
    mask: np.ndarray | None = mask_spec.mask
    if mask is None:
        return np.broadcast_to(np.True_, shape)
    if mask.shape == shape:
        return mask
    if mask.shape == layout.region_size(dst):
        return np.broadcast_to(mask.reshape(1, -1), shape)
    raise CanvasError(
        f"MaskSpec.mask: expected shape {shape} (tokens of {src!r} x tokens of {dst!r}) or "
        f"{layout.region_size(dst)} (the shape of {dst!r}), got {mask.shape}"
    )


def mask_to_index_pairs(
    mask_spec: MaskSpec, layout: CanvasLayout, src: str, dst: str
) -> list[tuple[list[int], list[int]]]:
    """The pairs of (query tokens, key tokens) that a mask allows.

    Every query stands in at most one pair, whose keys are all that it may read: attention of each pair's
    queries over its keys equals attention under the dense mask. Queries without keys stand in no pair.

    Returns:
        Flat token indices. ``"full"``: one pair. ``"tile"``: one per spatial tile of src. ``"sparse"``: one
        per distinct row of the mask. ``"window"``: one per distinct window.

    Raises:
        UnknownRegionError: src or dst is not in the layout.
        CanvasError: the mask, window or tile does not fit the layout.
    """
    rows, cols = layout.region_index_array(src), layout.region_index_array(dst)
    match mask_spec.kind:
        case "tile":
            pairs = _tile_pairs(mask_spec, layout, src, dst)
        case "sparse" if mask_spec.mask is not None:
            pairs = _sparse_pairs(mask_spec, layout, src, dst)
        case "window":
            pairs = _window_pairs(mask_spec, layout, src, dst)
        case _:
            return [(rows.tolist(), cols.tolist())]
    return [(rows[r].tolist(), cols[c].tolist()) for r, c in pairs]


_LocalPairs = list[tuple[np.ndarray, np.ndarray]]


def _by_value(values: np.ndarray) -> dict[int, np.ndarray]:
    """Positions of each value, in ascending order; values in ascending order."""
    order = np.argsort(values, kind="stable")
    distinct, first = np.unique(values[order], return_index=True)
    return dict(zip(distinct.tolist(), np.split(order, first[1:]), strict=True)) if order.size else {}


def _tile_pairs(mask_spec: MaskSpec, layout: CanvasLayout, src: str, dst: str) -> _LocalPairs:
    queries = _by_value(tile_of(mask_spec, layout, src))
    keys = _by_value(tile_of(mask_spec, layout, dst, anchor=src))
    everything = np.arange(layout.region_numel(dst))
    pairs = [(local, keys.get(tile, everything)) for tile, local in queries.items()]
    return [(r, c) for r, c in pairs if c.size]


def _sparse_pairs(mask_spec: MaskSpec, layout: CanvasLayout, src: str, dst: str) -> _LocalPairs:
    matrix = sparse_mask_matrix(mask_spec, layout, src, dst)
    if 0 in matrix.shape:
        return []
    if matrix.strides[0] == 0:  # one row for all queries
        kinds = np.zeros(len(matrix), dtype=np.int64)
    else:
        packed = np.packbits(matrix, axis=1)
        kinds = np.unique(packed.view(np.dtype((np.void, packed.shape[1]))).ravel(), return_inverse=True)[1]
    pairs = [(local, np.flatnonzero(matrix[local[0]])) for local in _by_value(kinds).values()]
    return sorted(((r, c) for r, c in pairs if c.size), key=lambda pair: int(pair[0][0]))


def _window_pairs(mask_spec: MaskSpec, layout: CanvasLayout, src: str, dst: str) -> _LocalPairs:
    axes = window_axes(mask_spec, layout, src, dst)
    if 0 in layout.region_size(src) or 0 in layout.region_size(dst):
        return []
    s_grid = np.arange(layout.region_numel(src)).reshape(layout.region_size(src))
    d_grid = np.arange(layout.region_numel(dst)).reshape(layout.region_size(dst))
    # Window starts grow with the coordinate, so equal windows are neighbours: queries of a pair form a box.
    per_axis = []
    for lo, hi in axes:
        cuts = np.flatnonzero(np.diff(lo, prepend=-1)).tolist()
        ends = [*cuts[1:], len(lo)]
        per_axis.append([(slice(a, b), slice(int(lo[a]), int(hi[a]))) for a, b in zip(cuts, ends, strict=True)])
    pairs = []
    for boxes in product(*per_axis):
        queries, keys = tuple(q for q, _ in boxes), tuple(k for _, k in boxes)
        pairs.append((s_grid[queries].ravel(), d_grid[keys].ravel()))
    return pairs
