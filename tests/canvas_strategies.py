"""Hypothesis strategies for small canvases of one to three spatial axes, with overlapping regions."""

from __future__ import annotations

from hypothesis import strategies as st

from canvas_engineering.canvas import CanvasLayout, RegionSpec
from canvas_engineering.connectivity import CanvasTopology, Connection, TemporalFill
from canvas_engineering.masks import MaskSpec

NAMES = ("a", "b", "c")


@st.composite
def bounds(draw: st.DrawFn, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Bounds of a box with at least one position."""
    flat: list[int] = []
    for size in shape:
        lo = draw(st.integers(0, size - 1))
        flat += [lo, draw(st.integers(lo + 1, size))]
    return tuple(flat)


@st.composite
def layouts(draw: st.DrawFn, max_spatial: int = 3, max_size: int = 4) -> CanvasLayout:
    """Canvases with one to three regions, some with a period, some as plain bounds."""
    n_spatial = draw(st.integers(1, max_spatial))
    shape = tuple(draw(st.integers(1, max_size)) for _ in range(n_spatial + 1))
    regions: dict[str, tuple[int, ...] | RegionSpec] = {}
    for name in NAMES[: draw(st.integers(1, 3))]:
        box = draw(bounds(shape))
        period = draw(st.sampled_from([1, 1, 2, 3]))
        regions[name] = box if period == 1 else RegionSpec(box, period=period, loss_weight=0.5)
    return CanvasLayout(T=shape[0], spatial_shape=shape[1:], d_model=8, regions=regions)


@st.composite
def mask_specs(draw: st.DrawFn, layout: CanvasLayout, src: str, dst: str) -> MaskSpec:
    """Masks of every kind that fit a pair of regions."""
    n = layout.n_spatial_dims
    sizes = st.integers(1, 4)
    kind = draw(st.sampled_from(["full", "tile", "sparse", "window"]))
    if kind == "tile":
        return MaskSpec(kind, tile_shape=tuple(draw(st.lists(sizes, min_size=1, max_size=n))))
    if kind == "window":
        tile = draw(st.none() | st.lists(sizes, min_size=1, max_size=n + 1).map(tuple))
        return MaskSpec(kind, tile_shape=tile, window_shape=tuple(draw(sizes) for _ in range(n + 1)))
    if kind == "sparse":
        rows, cols = layout.region_numel(src), layout.region_numel(dst)
        bits = draw(st.integers(0, 2 ** min(rows * cols, 64) - 1))
        cells = [[bool(bits >> ((i * cols + j) % 64) & 1) for j in range(cols)] for i in range(rows)]
        return MaskSpec(kind, mask=cells)
    return MaskSpec()


@st.composite
def topologies(draw: st.DrawFn, layout: CanvasLayout, masks: bool = True) -> CanvasTopology:
    """One to four connections with any offsets, fill modes, weights and masks; equal pairs may repeat."""
    names = st.sampled_from(list(layout.regions))
    offsets = st.none() | st.integers(-2, 2)
    connections = []
    for _ in range(draw(st.integers(1, 4))):
        src, dst = draw(names), draw(names)
        connections.append(
            Connection(
                src,
                dst,
                weight=draw(st.sampled_from([0.5, 1.0, 2.0])),
                t_src=draw(offsets),
                t_dst=draw(offsets),
                temporal_fill=draw(st.sampled_from(list(TemporalFill))),
                interpolation_order=draw(st.integers(1, 3)),
                mask=draw(mask_specs(layout, src, dst)) if masks and draw(st.booleans()) else None,
            )
        )
    return CanvasTopology(connections)
