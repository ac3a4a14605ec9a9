"""Masks: every kind against a definition over single coordinates, and what is refused."""

from __future__ import annotations

import copy
import itertools
import pickle
import time
from typing import Any

import numpy as np
import pytest
from canvas_strategies import layouts, mask_specs
from hypothesis import given, strategies as st

from canvas_engineering.canvas import CanvasLayout, UnknownRegionError
from canvas_engineering.errors import CanvasError
from canvas_engineering.masks import (
    MaskSpec,
    mask_to_index_pairs,
    sparse_mask_matrix,
    tile_of,
    window_axes,
    window_bounds,
)


def allowed_by_pairs(spec: MaskSpec, layout: CanvasLayout, src: str, dst: str) -> np.ndarray:
    """(|src|, |dst|) bool from the pairs; fails when a query stands in two pairs."""
    rows, cols = layout.region_indices(src), layout.region_indices(dst)
    allowed = np.zeros((len(rows), len(cols)), dtype=bool)
    seen: set[int] = set()
    for queries, keys in mask_to_index_pairs(spec, layout, src, dst):
        assert queries
        assert keys
        assert not seen & set(queries)
        assert len(set(queries)) == len(queries)
        seen |= set(queries)
        allowed[np.ix_([rows.index(q) for q in queries], [cols.index(k) for k in keys])] = True
    return allowed


def coordinates(layout: CanvasLayout, region: str) -> list[tuple[int, ...]]:
    return list(itertools.product(*(range(lo, hi) for lo, hi in layout.region_bounds(region))))


def own_tile(q: tuple[int, ...], sizes: tuple[int, ...], box: Any) -> list[range]:
    """Extent, cut at the region, of the tile that a coordinate lies in, per axis."""
    return [
        next(range(a, min(a + size, hi)) for a in range(lo, hi, size) if a <= x < a + size)
        for x, size, (lo, hi) in zip(q, sizes, box, strict=True)
    ]


def allowed_by_definition(spec: MaskSpec, layout: CanvasLayout, src: str, dst: str) -> np.ndarray:
    """(|src|, |dst|) bool, one coordinate at a time."""
    keys = coordinates(layout, dst)
    box = layout.region_bounds(src)
    rows = []
    for index, q in enumerate(coordinates(layout, src)):
        if spec.kind == "tile":
            tile = own_tile(q[1:], spec.spatial_tile(layout.n_spatial_dims), box[1:])
            row = [all(x in extent for x, extent in zip(k[1:], tile, strict=True)) for k in keys]
            rows.append(row if any(row) else [True] * len(keys))
        elif spec.kind == "window":
            assert spec.window_shape is not None
            windows = []
            tile = own_tile(q, spec.window_tile(layout.n_spatial_dims), box)
            for extent, width, (lo, hi) in zip(tile, spec.window_shape, layout.region_bounds(dst), strict=True):
                middle = (extent.start + extent.stop) / 2
                starts = range(lo, max(lo, hi - width) + 1)  # every place for the window inside dst
                start = min(starts, key=lambda s, w=width, m=middle: (abs(s + w / 2 - m), s))  # type: ignore[misc]
                windows.append(range(start, min(start + width, hi)))
            rows.append([all(x in window for x, window in zip(k, windows, strict=True)) for k in keys])
        elif spec.mask is not None:
            rows.append(spec.mask[index].tolist())
        else:
            rows.append([True] * len(keys))
    return np.array(rows)


@given(st.data())
def test_pairs_match_the_definition(data: st.DataObject) -> None:
    layout = data.draw(layouts())
    src, dst = (data.draw(st.sampled_from(list(layout.regions))) for _ in range(2))
    spec = data.draw(mask_specs(layout, src, dst))
    expected = allowed_by_definition(spec, layout, src, dst)
    np.testing.assert_array_equal(allowed_by_pairs(spec, layout, src, dst), expected)
    if spec.kind == "window":
        lo, hi = window_bounds(spec, layout, src, dst)
        local = np.indices(layout.region_size(dst)).reshape(len(layout.shape), -1).T
        inside = ((lo[:, None] <= local) & (local < hi[:, None])).all(axis=2)
        np.testing.assert_array_equal(inside, expected)
        assert len(set(inside.sum(axis=1).tolist())) == 1  # every query has the full count
    if spec.kind == "tile":
        own, theirs = tile_of(spec, layout, src), tile_of(spec, layout, dst, anchor=src)
        same = own[:, None] == theirs
        np.testing.assert_array_equal(same | ~same.any(axis=1, keepdims=True), expected)
    if spec.kind == "sparse":
        np.testing.assert_array_equal(sparse_mask_matrix(spec, layout, src, dst), expected)


@pytest.fixture
def layout() -> CanvasLayout:
    return CanvasLayout(
        T=2,
        H=3,
        W=3,
        d_model=4,
        regions={"a": (0, 2, 0, 3, 0, 3), "b": (0, 1, 1, 2, 1, 3), "c": (0, 2, 0, 1, 0, 2), "0": (1, 1, 0, 3, 0, 3)},
    )


def test_tile_pairs_are_those_of_0_5_0(layout: CanvasLayout) -> None:
    assert mask_to_index_pairs(MaskSpec("tile", tile_h=2, tile_w=2), layout, "a", "b") == [
        ([0, 1, 3, 4, 9, 10, 12, 13], [4]),
        ([2, 5, 11, 14], [5]),
        ([6, 7, 15, 16], [4, 5]),
        ([8, 17], [4, 5]),
    ]
    assert mask_to_index_pairs(MaskSpec("tile", tile_shape=(2,)), layout, "c", "a") == [
        ([0, 9], [0, 9]),
        ([1, 10], [1, 10]),
    ]


def test_full_and_sparse_without_mask_are_one_pair(layout: CanvasLayout) -> None:
    everything = [(layout.region_indices("c"), layout.region_indices("b"))]
    assert mask_to_index_pairs(MaskSpec(), layout, "c", "b") == everything
    assert mask_to_index_pairs(MaskSpec("sparse"), layout, "c", "b") == everything
    assert sparse_mask_matrix(MaskSpec("sparse"), layout, "c", "b").all()


def test_sparse_mask_of_the_shape_of_dst(layout: CanvasLayout) -> None:
    mask = np.array([[[True, False]]])
    assert mask_to_index_pairs(MaskSpec("sparse", mask=mask), layout, "c", "b") == [([0, 1, 9, 10], [4])]
    assert mask_to_index_pairs(MaskSpec("sparse", mask=~mask & False), layout, "c", "b") == []


def test_sparse_rows_with_equal_keys_share_a_pair(layout: CanvasLayout) -> None:
    mask = [[1, 0], [0, 0], [1, 1], [1, 0]]
    assert mask_to_index_pairs(MaskSpec("sparse", mask=mask), layout, "c", "b") == [([0, 10], [4]), ([9], [4, 5])]


def test_empty_regions(layout: CanvasLayout) -> None:
    window = MaskSpec("window", window_shape=(1, 3, 3))
    for spec in (MaskSpec("tile", tile_h=2), window, MaskSpec("sparse", mask=np.zeros((0, 2)))):
        assert mask_to_index_pairs(spec, layout, "0", "b") == []
    for spec in (MaskSpec("tile", tile_h=2), window, MaskSpec("sparse", mask=np.zeros((2, 0)))):
        assert mask_to_index_pairs(spec, layout, "b", "0") == []


def test_window_moves_inward_at_the_border() -> None:
    layout = CanvasLayout(T=1, spatial_shape=(8,), d_model=1, regions={"x": (0, 1, 0, 8), "y": (0, 1, 2, 6)})
    odd = window_bounds(MaskSpec("window", window_shape=(1, 3)), layout, "x", "x")
    assert odd[0][:, 1].tolist() == [0, 0, 1, 2, 3, 4, 5, 5]
    even = window_axes(MaskSpec("window", window_shape=(1, 4)), layout, "x", "x")[1]
    assert even[0].tolist() == [0, 0, 0, 1, 2, 3, 4, 4]  # two keys before the query, one after it
    assert (even[1] - even[0] == 4).all()
    # Canvas coordinates count, not positions within the region; too wide a window reads all of dst.
    other = window_axes(MaskSpec("window", window_shape=(1, 3)), layout, "x", "y")[1]
    assert other[0].tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    wide = window_axes(MaskSpec("window", window_shape=(7, 9)), layout, "x", "y")[1]
    assert set(wide[0].tolist()) == {0}
    assert set(wide[1].tolist()) == {4}


def test_window_around_tiles() -> None:
    layout = CanvasLayout(T=2, H=4, W=8, d_model=1, regions={"x": (0, 2, 0, 4, 0, 8)})
    spatial = MaskSpec("window", window_shape=(1, 4, 4), tile_shape=(2, 4))
    assert window_axes(spatial, layout, "x", "x")[2][0].tolist() == [0, 0, 0, 0, 4, 4, 4, 4]
    assert window_axes(spatial, layout, "x", "x")[0][0].tolist() == [0, 1]
    assert window_axes(MaskSpec("window", window_shape=(1, 4, 4), tile_h=2, tile_w=4), layout, "x", "x")[1][
        0
    ].tolist() == [0, 0, 0, 0]
    # The last tile of x is cut short at 10: its middle is 9, not 10.
    line = CanvasLayout(T=1, spatial_shape=(20,), d_model=1, regions={"x": (0, 1, 0, 10), "y": (0, 1, 0, 20)})
    cut = window_axes(MaskSpec("window", window_shape=(1, 4), tile_shape=(4,)), line, "x", "y")[1]
    assert cut[0].tolist() == [0, 0, 0, 0, 4, 4, 4, 4, 7, 7]
    with_time = MaskSpec("window", window_shape=(1, 4, 4), tile_shape=(2, 2, 4))
    assert window_axes(with_time, layout, "x", "x")[0][0].tolist() == [0, 0]


def test_video_canvas_is_cheap() -> None:
    layout = CanvasLayout(T=30, H=48, W=80, d_model=8, regions={"video": (0, 30, 0, 48, 0, 80)})
    start = time.process_time()
    lo, hi = window_bounds(MaskSpec("window", window_shape=(18, 24, 24)), layout, "video", "video")
    assert lo.shape == (115200, 3)
    assert ((hi - lo) == (18, 24, 24)).all()
    assert time.process_time() - start < 2.0


def test_value_equality_and_hash() -> None:
    mask = np.eye(3, dtype=bool)
    spec = MaskSpec("sparse", mask=mask)
    same = MaskSpec("sparse", mask=mask.astype(int).tolist())
    assert spec == same
    assert hash(spec) == hash(same)
    assert spec != MaskSpec("sparse", mask=~mask)
    assert spec != MaskSpec("sparse", mask=mask.reshape(9))
    assert spec != MaskSpec("sparse")
    assert MaskSpec() != "full"
    assert MaskSpec("tile", tile_shape=[2, 3]) == MaskSpec("tile", tile_shape=(2, np.int64(3)))  # type: ignore[arg-type]
    assert copy.deepcopy(spec) == pickle.loads(pickle.dumps(spec)) == spec
    mask[0, 1] = True  # the spec keeps its own copy
    assert spec == same
    with pytest.raises(ValueError, match="read-only"):
        spec.mask[0, 1] = True


def test_masks_from_torch() -> None:
    torch = pytest.importorskip("torch")
    mask = torch.tensor([[True, False]])
    assert MaskSpec("sparse", mask=mask) == MaskSpec("sparse", mask=[[True, False]])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "dense"}, "MaskSpec.kind: expected one of full, tile, sparse, window, got 'dense'"),
        ({"kind": "tile", "tile_h": 0}, "MaskSpec.tile_h: expected a positive integer, got 0"),
        ({"kind": "tile", "tile_w": 1.5}, "MaskSpec.tile_w: expected a positive integer, got 1.5"),
        ({"kind": "tile", "tile_shape": (2, 0)}, r"MaskSpec.tile_shape\[1\]: expected a positive integer, got 0"),
        ({"kind": "tile", "tile_shape": ()}, r"MaskSpec.tile_shape: expected at least one size, got \(\)"),
        (
            {"kind": "tile", "tile_shape": (2, 2), "tile_h": 2},
            r"either tile_shape or tile_h and tile_w, got tile_shape=\(2, 2\), tile_h=2, tile_w=1",
        ),
        ({"kind": "window"}, r"needs window_shape=\(t, \*spatial\), got None"),
        ({"kind": "window", "window_shape": (1, -3)}, r"MaskSpec.window_shape\[1\]: .* got -3"),
        ({"kind": "tile", "window_shape": (1, 3)}, "window_shape belongs to kind='window', got kind='tile'"),
        ({"kind": "tile", "mask": [[True]]}, "mask belongs to kind='sparse', got kind='tile'"),
        ({"kind": "sparse", "mask": [[0.5]]}, r"MaskSpec.mask: expected booleans \(or 0 and 1\), got dtype float64"),
        ({"kind": "sparse", "mask": [["x"]]}, "MaskSpec.mask: expected booleans"),
        ({"kind": "sparse", "mask": [[True], []]}, "MaskSpec.mask: .* rows of unequal length"),
        ({"kind": "sparse", "mask": True}, "MaskSpec.mask: expected an array of booleans, got True"),
    ],
)
def test_wrong_fields(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(CanvasError, match=message):
        MaskSpec(**fields)


def test_masks_that_do_not_fit_the_layout(layout: CanvasLayout) -> None:
    with pytest.raises(
        CanvasError,
        match=r"MaskSpec.mask: expected shape \(4, 2\) \(tokens of 'c' x tokens of 'b'\) or \(1, 1, 2\) "
        r"\(the shape of 'b'\), got \(2, 4\)",
    ):
        mask_to_index_pairs(MaskSpec("sparse", mask=np.ones((2, 4))), layout, "c", "b")
    with pytest.raises(CanvasError, match=r"window_shape: expected 3 sizes \(t and 2 spatial\), got \(3, 3\)"):
        mask_to_index_pairs(MaskSpec("window", window_shape=(3, 3)), layout, "a", "b")
    with pytest.raises(CanvasError, match=r"tile has 3 sizes for 2 spatial axes, got tile \(1, 2, 3\)"):
        mask_to_index_pairs(MaskSpec("tile", tile_shape=(1, 2, 3)), layout, "a", "b")
    with pytest.raises(CanvasError, match="expected a MaskSpec of kind 'window', got kind='tile'"):
        window_bounds(MaskSpec("tile"), layout, "a", "b")
    for spec in (MaskSpec(), MaskSpec("tile"), MaskSpec("sparse")):
        with pytest.raises(UnknownRegionError, match="unknown region 'x'"):
            mask_to_index_pairs(spec, layout, "a", "x")


def test_one_dimensional_canvas_takes_tile_h() -> None:
    layout = CanvasLayout(T=1, spatial_shape=(4,), d_model=1, regions={"a": (0, 1, 0, 4)})
    assert mask_to_index_pairs(MaskSpec("tile", tile_h=2), layout, "a", "a") == [([0, 1], [0, 1]), ([2, 3], [2, 3])]
    with pytest.raises(CanvasError, match="tile has 2 sizes for 1 spatial axes"):
        mask_to_index_pairs(MaskSpec("tile", tile_h=2, tile_w=2), layout, "a", "a")
