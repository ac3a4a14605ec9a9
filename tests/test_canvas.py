"""Geometry of layouts: indices, real time, loss weights, and what is refused."""

from __future__ import annotations

import itertools
import math
import pickle
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from canvas_strategies import layouts
from hypothesis import given

from canvas_engineering import canvas
from canvas_engineering.canvas import (
    ATTENTION_TYPES,
    CanvasLayout,
    RegionSpec,
    UnknownRegionError,
    transfer_distance,
)
from canvas_engineering.errors import CanvasError


@pytest.fixture
def layout() -> CanvasLayout:
    return CanvasLayout(
        T=3,
        spatial_shape=(2, 3),
        d_model=4,
        regions={"a": (0, 2, 0, 2, 1, 3), "b": RegionSpec((1, 3, 1, 2, 0, 2), period=2, loss_weight=0.5)},
        t_current=2,
    )


def test_indices_are_those_of_0_5_0(layout: CanvasLayout) -> None:
    assert layout.region_indices("a") == [1, 2, 4, 5, 7, 8, 10, 11]
    assert layout.region_indices("b") == [9, 10, 15, 16]
    assert layout.region_indices_at_t("b", 2) == [15, 16]
    assert layout.output_mask() == [12, 13, 14, 15, 16, 17]
    assert all(type(index) is int for index in layout.region_indices("a"))


def test_loss_weights_of_overlapping_regions_add_up(layout: CanvasLayout) -> None:
    weights = layout.loss_weight_mask()
    assert weights.shape == (18,)
    assert weights.tolist() == [0, 1, 1, 0, 1, 1, 0, 1, 1, 0.5, 1.5, 1, 0, 0, 0, 0.5, 0.5, 0]
    hidden = CanvasLayout(T=1, H=1, W=2, d_model=1, regions={"x": RegionSpec((0, 1, 0, 1, 0, 2), is_output=False)})
    assert hidden.loss_weight_mask("cpu").tolist() == [0, 0]


def test_real_time_is_relative_to_the_region(layout: CanvasLayout) -> None:
    assert [layout.real_frame("b", t) for t in range(3)] == [0, 2, 4]
    assert [layout.canvas_frame("b", t) for t in (-2, 0, 1, 2, 3, 4)] == [None, 0, None, 1, None, None]
    assert layout.region_timesteps("b") == [1, 2]


@given(layouts())
def test_region_indices_match_the_grid(layout: CanvasLayout) -> None:
    grid = np.arange(layout.num_positions).reshape(layout.shape)
    for name in layout.regions:
        box = grid[tuple(slice(lo, hi) for lo, hi in layout.region_bounds(name))]
        assert layout.region_indices(name) == box.ravel().tolist()
        assert layout.region_size(name) == box.shape
        assert layout.region_numel(name) == box.size
        t0, t1 = layout.bounds(name)[:2]
        for t in range(-1, layout.T + 1):
            expected = box[t - t0].ravel().tolist() if t0 <= t < t1 else []
            assert layout.region_indices_at_t(name, t) == expected


@given(layouts())
def test_flat_index_is_row_major(layout: CanvasLayout) -> None:
    corner = tuple(size - 1 for size in layout.shape)
    assert layout.flat_index(*corner) == layout.num_positions - 1
    assert layout.flat_index(layout.T - 1) == (layout.T - 1) * layout.spatial_volume
    assert layout.num_positions == math.prod(layout.shape)
    for coords in itertools.islice(itertools.product(*map(range, layout.shape)), 20):
        assert layout.flat_index(*coords) == np.ravel_multi_index(coords, layout.shape)


def test_shorthand_for_two_dimensions() -> None:
    layout = CanvasLayout(T=2, H=3, W=4, d_model=8)
    assert layout == CanvasLayout(T=2, spatial_shape=(3, 4), d_model=8)
    assert layout.spatial_shape == (3, 4)
    assert (layout.n_spatial_dims, layout.spatial_volume, layout.num_positions) == (2, 12, 24)
    assert CanvasLayout(T=2, W=4, d_model=8).spatial_shape == (1, 4)
    line = CanvasLayout(2, 8, (5,))
    assert (line.H, line.W) == (5, None)
    assert "H=" not in repr(line)


def test_numpy_numbers_and_lists_become_plain() -> None:
    spec = RegionSpec(bounds=np.array([0, 1, 0, 2]), period=np.int64(2), semantic_embedding=[1.0, 2.0])  # type: ignore[arg-type]
    layout = CanvasLayout(
        T=np.int32(1),  # type: ignore[arg-type]
        spatial_shape=[np.int64(2)],  # type: ignore[arg-type]
        d_model=4,
        regions={"a": spec, "b": [0, 1, 0, 1]},  # type: ignore[dict-item]
    )
    assert type(layout.T) is int
    assert layout.spatial_shape == (2,)
    assert spec.bounds == (0, 1, 0, 2)
    assert hash(spec) == hash(RegionSpec((0, 1, 0, 2), period=2, semantic_embedding=(1.0, 2.0)))
    assert layout.regions["b"] == (0, 1, 0, 1)


def test_plain_bounds_equal_a_default_spec() -> None:
    plain = CanvasLayout(T=1, spatial_shape=(2,), d_model=4, regions={"a": (0, 1, 0, 2)})
    spec = CanvasLayout(T=1, spatial_shape=(2,), d_model=4, regions={"a": RegionSpec((0, 1, 0, 2))})
    other = CanvasLayout(T=1, spatial_shape=(2,), d_model=4, regions={"a": RegionSpec((0, 1, 0, 2), period=2)})
    assert plain == spec != other
    assert plain != "layout"
    assert plain.region_spec("a") == RegionSpec((0, 1, 0, 2))


def test_empty_region() -> None:
    layout = CanvasLayout(T=2, spatial_shape=(3,), d_model=4, regions={"none": (1, 1, 0, 3)})
    assert layout.region_indices("none") == []
    assert layout.region_numel("none") == 0


def test_a_million_positions_at_once() -> None:
    layout = CanvasLayout(T=64, H=128, W=128, d_model=8, regions={"screen": (0, 64, 0, 128, 0, 100)})
    indices = layout.region_index_array("screen")
    assert indices.dtype == np.int64
    assert indices.shape == (64 * 128 * 100,)
    assert layout.region_index_array("screen", 63)[-1] == indices[-1] == 128**2 * 64 - 1 - 28


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        ((0, 5, 0, 2, 0, 2), r"region 'cam': bounds\[1\]=5 must be <= T=4"),
        ((0, 4, 0, 9, 0, 2), r"region 'cam': bounds\[3\]=9 must be <= spatial_shape\[0\]=8"),
        ((-1, 4, 0, 2, 0, 2), r"region 'cam': bounds\[0\]=-1 must be >= 0 \(axis of T=4\)"),
        ((0, 4, 3, 2, 0, 2), r"region 'cam': bounds\[2\]=3 must not exceed bounds\[3\]=2"),
        ((0, 4, 0, 2), r"region 'cam': bounds: expected 6 numbers .* 2 spatial axes\), got 4: \(0, 4, 0, 2\)"),
        ((0, 4, 0, 2, 0, 1.5), r"region 'cam': bounds\[5\]: expected an integer, got 1.5"),
        ((0, 4, 0, 2, 0, True), r"region 'cam': bounds\[5\]: expected an integer, got True"),
        ("0402", r"region 'cam': bounds: expected \(t0, t1, lo, hi, ...\), got '0402'"),
        (None, r"region 'cam': bounds: expected \(t0, t1, lo, hi, ...\), got None"),
    ],
)
def test_wrong_bounds_name_region_bound_and_limit(bounds: Any, message: str) -> None:
    with pytest.raises(CanvasError, match=message):
        CanvasLayout(T=4, H=8, W=8, d_model=4, regions={"cam": bounds})
    with pytest.raises(ValueError, match="cam"):
        CanvasLayout(T=4, H=8, W=8, d_model=4, regions={"cam": RegionSpec(bounds=bounds)})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"T": 0}, "T: expected a positive integer, got 0"),
        ({"T": 2.0}, r"T: expected a positive integer, got 2.0"),
        ({"d_model": True}, "d_model: expected a positive integer, got True"),
        ({"d_model": -4}, "d_model: expected a positive integer, got -4"),
        ({"H": 0}, "H: expected a positive integer, got 0"),
        ({"t_current": -1}, "t_current: expected an integer >= 0, got -1"),
        ({"spatial_shape": (2, 2)}, r"either spatial_shape or H and W, not both: got spatial_shape=\(2, 2\), H=4"),
        ({"H": None, "W": None}, "needs spatial_shape, or H and W; got neither"),
        ({"H": None, "W": None, "spatial_shape": (2, -1)}, r"spatial_shape\[1\]: .* positive integer, got -1"),
        ({"H": None, "W": None, "spatial_shape": 4}, "spatial_shape: expected a sequence .* got 4"),
        ({"regions": [(0, 1)]}, "regions: expected a mapping"),
        ({"regions": {3: (0, 1, 0, 1, 0, 1)}}, "regions: region name: expected a string, got 3"),
    ],
)
def test_wrong_sizes(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CanvasError, match=message):
        CanvasLayout(**{"T": 2, "d_model": 4, "H": 4, "W": 4, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"period": 0}, "region 'cam': period: expected a positive integer, got 0"),
        ({"period": 1.5}, "region 'cam': period: expected a positive integer, got 1.5"),
        ({"loss_weight": math.nan}, "region 'cam': loss_weight: expected a finite number >= 0, got nan"),
        ({"loss_weight": math.inf}, "region 'cam': loss_weight: expected a finite number >= 0, got inf"),
        ({"loss_weight": -1.0}, "region 'cam': loss_weight: expected a finite number >= 0, got -1.0"),
        ({"semantic_embedding": (1.0, math.nan)}, r"region 'cam': semantic_embedding\[1\]: .* got nan"),
    ],
)
def test_wrong_region_fields(changes: dict[str, Any], message: str) -> None:
    spec = RegionSpec(**{"bounds": (0, 1, 0, 1), **changes})
    with pytest.raises(CanvasError, match=message):
        CanvasLayout(T=1, spatial_shape=(1,), d_model=1, regions={"cam": spec})


def test_unknown_region_is_a_key_error_and_readable(layout: CanvasLayout) -> None:
    for method in (layout.region_spec, layout.region_indices, layout.region_size, layout.bounds):
        with pytest.raises(KeyError) as caught:
            method("camera")
        assert str(caught.value) == "unknown region 'camera'; the layout has 'a', 'b'"
    assert isinstance(caught.value, CanvasError)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
    with pytest.raises(UnknownRegionError, match="the layout has none"):
        CanvasLayout(T=1, H=1, W=1, d_model=1).region_spec("x")


def test_regions_added_later_are_checked_when_used(layout: CanvasLayout) -> None:
    layout.regions["late"] = (0, 9, 0, 1, 0, 1)
    with pytest.raises(CanvasError, match=r"region 'late': bounds\[1\]=9 must be <= T=3"):
        layout.region_indices("late")


def test_flat_index_refuses_coordinates_outside(layout: CanvasLayout) -> None:
    with pytest.raises(CanvasError, match=r"coordinate 2 must be in 0..2, got \(0, 1, 3\)"):
        layout.flat_index(0, 1, 3)
    with pytest.raises(CanvasError, match="at most 3 coordinates"):
        layout.flat_index(0, 0, 0, 0)


def _embedded(*numbers: float, model: str = "m") -> RegionSpec:
    return RegionSpec((0, 1, 0, 1), semantic_embedding=numbers, embedding_model=model)


def test_transfer_distance() -> None:
    assert transfer_distance(_embedded(1, 2), _embedded(2, 4)) == pytest.approx(0.0, abs=1e-12)
    assert transfer_distance(_embedded(1, 0), _embedded(0, 3)) == pytest.approx(1.0)
    assert transfer_distance(_embedded(1, 1), _embedded(-2, -2)) == pytest.approx(2.0)
    assert transfer_distance(_embedded(0, 0), _embedded(1, 0)) == 1.0
    # The value that 0.5.0 returns, in float32.
    assert transfer_distance(_embedded(0.2, 0.5, -1), _embedded(1, 0.25, 0.5)) == pytest.approx(1.1344910974643214)
    with pytest.raises(CanvasError, match="needs semantic_embedding set on both regions, b has None"):
        transfer_distance(_embedded(1), RegionSpec((0, 1, 0, 1)))
    with pytest.raises(CanvasError, match="embedding model mismatch, got 'm' and 'n'"):
        transfer_distance(_embedded(1), _embedded(1, model="n"))
    with pytest.raises(CanvasError, match="dimension mismatch, got 1 and 2 numbers"):
        transfer_distance(_embedded(1), _embedded(1, 2))


def test_attention_types_hold_every_function_name() -> None:
    assert set(ATTENTION_TYPES) == {
        "cross_attention",
        "linear_attention",
        "cosine_attention",
        "sigmoid_attention",
        "gated",
        "perceiver",
        "pooling",
        "copy",
        "mamba",
        "rwkv",
        "hyena",
        "sparse_attention",
        "local_attention",
        "none",
        "random_fixed",
        "mixture",
        "cogvideox",
    }
    assert all(ATTENTION_TYPES.values())


def test_torch_names_are_forwarded() -> None:
    for module, name in (
        ("canvas", "SpatiotemporalCanvas"),
        ("canvas", "PeriodEmbedding"),
        ("canvas", "FamilyCarrierEmbedding"),
        ("canvas", "SinusoidalPositionalEncodingND"),
        ("canvas", "SinusoidalPositionalEncoding3D"),
        ("identity", "SlotBindingModule"),
        ("residuals", "ResidualAccumulator"),
        ("semantic", "SemanticConditioner"),
    ):
        owner = __import__(f"canvas_engineering.{module}", fromlist=[name])
        assert getattr(owner, name).__name__ == name
    with pytest.raises(AttributeError, match=r"'canvas_engineering\.canvas' has no attribute 'Nothing'"):
        canvas.Nothing  # noqa: B018


def test_without_torch_the_error_names_the_extra() -> None:
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "import importlib.util as u; find = u.find_spec\n"
        "u.find_spec = lambda name, *rest: None if name == 'torch' else find(name, *rest)\n"
        "from canvas_engineering.canvas import CanvasLayout\n"
        "from canvas_engineering.connectivity import CanvasTopology\n"
        "from canvas_engineering.errors import MissingDependencyError\n"
        "layout = CanvasLayout(T=1, H=1, W=2, d_model=1, regions={'a': (0, 1, 0, 1, 0, 2)})\n"
        "assert CanvasTopology.dense(['a']).to_attention_mask(layout, 'numpy').sum() == 4\n"
        "import canvas_engineering.canvas as c\n"
        "for f in (layout.loss_weight_mask, lambda: CanvasTopology().to_additive_mask(layout),\n"
        "          lambda: c.PeriodEmbedding):\n"
        "    try:\n        f()\n"
        "    except MissingDependencyError as error:\n        print(error)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    lines = result.stdout.splitlines()
    assert len(lines) == 3
    assert all("pip install 'canvas-engineering[torch]'" in line for line in lines)
