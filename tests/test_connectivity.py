"""Topologies: constructors, queries, and the dense mask against a definition over single pairs."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import pytest
from canvas_strategies import layouts, topologies
from hypothesis import given, strategies as st

from canvas_engineering.canvas import CanvasLayout, RegionSpec
from canvas_engineering.connectivity import CanvasTopology, Connection, TemporalFill
from canvas_engineering.errors import CanvasError
from canvas_engineering.masks import MaskSpec, mask_to_index_pairs

DROP, HOLD, INTERPOLATE = TemporalFill.DROP, TemporalFill.HOLD, TemporalFill.INTERPOLATE


def edges(topology: CanvasTopology) -> list[tuple[str, str]]:
    return [(edge.src, edge.dst) for edge in topology.connections]


def test_constructors() -> None:
    names = ["x", "y", "z"]
    assert edges(CanvasTopology.dense(names)) == [(s, d) for s in names for d in names]
    assert edges(CanvasTopology.isolated(names)) == [("x", "x"), ("y", "y"), ("z", "z")]
    assert edges(CanvasTopology.causal_chain(names))[3:] == [("y", "x"), ("z", "y")]
    loops = [("h", "h"), ("x", "x"), ("y", "y")]
    assert edges(CanvasTopology.hub_spoke("h", ["x", "y"])) == [*loops, ("h", "x"), ("x", "h"), ("h", "y"), ("y", "h")]
    assert edges(CanvasTopology.hub_spoke("h", ["x", "y"], bidirectional=False)) == [*loops, ("h", "x"), ("h", "y")]
    temporal = CanvasTopology.causal_temporal(["x", "y"], temporal_fill=DROP)
    assert [(e.src, e.dst, e.t_src, e.t_dst) for e in temporal.connections] == [
        ("x", "x", 0, 0),
        ("x", "x", 0, -1),
        ("y", "y", 0, 0),
        ("y", "y", 0, -1),
        ("x", "y", 0, -1),
        ("y", "x", 0, -1),
    ]
    assert {edge.temporal_fill for edge in temporal.connections} == {DROP}
    assert CanvasTopology.causal_temporal(["x"]).connections[0].temporal_fill is HOLD
    assert CanvasTopology(tuple(temporal.connections)) == temporal  # type: ignore[arg-type]


def test_queries() -> None:
    topology = CanvasTopology(
        [
            Connection("a", "b", weight=0.5),
            Connection("a", "b", weight=2.0, fn="gated"),
            Connection("b", "a", t_dst=0, operator="predict"),
            Connection("c", "c", temporal_fill=DROP, t_src=1),
        ]
    )
    layout = CanvasLayout(
        T=1,
        H=1,
        W=2,
        d_model=1,
        regions={"a": RegionSpec((0, 1, 0, 1, 0, 1), default_attn="mamba"), "b": (0, 1, 0, 1, 1, 2)},
    )
    assert topology.regions == {"a", "b", "c"}
    assert topology.has_temporal_constraints
    assert not CanvasTopology.dense(["a"]).has_temporal_constraints
    assert topology.neighbors_of("a") == ["b", "b"]
    assert topology.attended_by("a") == ["b"]
    assert topology.to_block_adjacency() == {("a", "b"): 2.0, ("b", "a"): 1.0, ("c", "c"): 1.0}
    functions = ["mamba", "gated", "cross_attention", "cross_attention"]
    assert [topology.resolve_fn(edge, layout) for edge in topology.connections] == functions
    assert topology.attention_ops(layout)[0] == ("a", "b", 0.5, "mamba")
    assert topology.attention_ops()[0] == ("a", "b", 0.5, "cross_attention")
    assert topology.summary() == (
        "CanvasTopology (4 ops, 3 regions):\n"
        "  a ↔ b  (w=2.00)\n"
        "  b ↔ a  (w=1.00)\n"
        "  c ↺ self  (w=1.00)\n"
        "  [2 temporal constraints: drop=1, hold=1]\n"
        "  [operators: predict=1]"
    )
    assert CanvasTopology([Connection("a", "b")]).summary().splitlines()[1] == "  a → b  (w=1.00)"
    assert repr(topology) == "CanvasTopology(connections=4, regions=['a', 'b', 'c'])"


def test_mask_is_that_of_0_5_0() -> None:
    layout = CanvasLayout(
        T=3,
        spatial_shape=(2, 3),
        d_model=4,
        regions={"a": (0, 2, 0, 2, 1, 3), "b": RegionSpec((1, 3, 1, 2, 0, 2), period=2)},
    )
    topology = CanvasTopology(
        [
            Connection("a", "b", t_src=0, t_dst=0),
            Connection("b", "a", weight=0.5, t_src=0, t_dst=-1, temporal_fill=INTERPOLATE),
            Connection("b", "b"),
        ]
    )
    mask = topology.to_attention_mask(layout).numpy()
    reads = {i: np.flatnonzero(mask[i]).tolist() for i in np.flatnonzero(mask.any(axis=1)).tolist()}
    own = [9, 10, 15, 16]
    early, late = sorted([1, 2, 4, 5, *own]), sorted([7, 8, 11, *own])
    assert reads == {9: early, 10: early, 15: late, 16: late}
    assert mask[9, [1, 2, 4, 5]].tolist() == [0.5] * 4
    assert mask[15, [7, 8, 9, 10, 11]].tolist() == [0.5, 0.5, 1, 1, 0.5]
    additive = topology.to_additive_mask(layout).numpy()
    expected = np.where((mask > 0) | np.diag(~mask.any(axis=1)), 0.0, -np.inf)
    np.testing.assert_array_equal(additive, expected)


@pytest.mark.parametrize(
    ("fill", "order", "expected"),
    [
        (DROP, 1, [[1, 0, 0], [0, 0, 0], [0, 0, 0], [0, 0, 0], [0, 1, 0], [0, 0, 0]]),
        (HOLD, 1, [[1, 0, 0], [1, 0, 0], [1, 0, 0], [1, 0, 0], [0, 1, 0], [0, 1, 0]]),
        (INTERPOLATE, 1, [[1, 0, 0], [0.75, 0.25, 0], [0.5, 0.5, 0], [0.25, 0.75, 0], [0, 1, 0], [0, 0.75, 0.25]]),
        (
            INTERPOLATE,
            2,
            [
                [1, 0, 0],
                [0.883768, 0.098196, 0.018036],
                [0.473684, 0.473684, 0.052632],
                [0.096525, 0.868726, 0.034749],
                [0, 1, 0],
                [0.034749, 0.868726, 0.096525],
            ],
        ),
    ],
)
def test_fill_modes_across_periods(fill: TemporalFill, order: int, expected: list[list[float]]) -> None:
    layout = CanvasLayout(
        T=12, spatial_shape=(2,), d_model=4, regions={"fast": (0, 12, 0, 1), "slow": RegionSpec((0, 3, 1, 2), period=4)}
    )
    edge = Connection("fast", "slow", t_src=0, t_dst=0, temporal_fill=fill, interpolation_order=order)
    mask = CanvasTopology([edge]).to_attention_mask(layout).numpy()
    np.testing.assert_allclose(mask[:12:2, 1:6:2], expected, atol=5e-7)


def fill_times(edge: Connection, times: list[int], target: int) -> dict[int, float]:
    """Real times that are read in place of ``target``, and their weights."""
    if target in times:
        return {target: 1.0}
    past, future = [t for t in times if t < target], [t for t in times if t > target]
    match edge.temporal_fill, edge.interpolation_order:
        case TemporalFill.DROP, _:
            return {}
        case TemporalFill.HOLD, _:
            return {past[-1]: 1.0} if past else {}
        case _, 1 if past and future:
            span = future[0] - past[-1]
            return {past[-1]: (future[0] - target) / span, future[0]: (target - past[-1]) / span}
        case _, 1:
            return dict.fromkeys(past[-1:] + future[:1], 1.0)
        case _, order:
            nearest = sorted(times, key=lambda t: (abs(t - target), t))[: order + 1]
            total = sum(abs(t - target) ** -order for t in nearest)
            return {t: abs(t - target) ** -order / total for t in nearest}
    raise AssertionError


def mask_by_definition(topology: CanvasTopology, layout: CanvasLayout) -> np.ndarray:
    """SEMANTICS, sections 2 and 4, pair by pair."""
    mask = np.zeros((layout.num_positions,) * 2)
    for edge in topology.connections:
        allowed = {
            (i, j)
            for rows, cols in mask_to_index_pairs(edge.mask or MaskSpec(), layout, edge.src, edge.dst)
            for i in rows
            for j in cols
        }
        temporal = edge.t_src is not None or edge.t_dst is not None
        period = layout.region_spec(edge.dst).period
        for ref in range(layout.T if temporal else 1):
            rows = layout.region_indices(edge.src)
            if edge.t_src is not None:
                rows = layout.region_indices_at_t(edge.src, ref + edge.t_src)
            reads = [(layout.region_indices(edge.dst), 1.0)]
            if edge.t_dst is not None:
                target = (ref + edge.t_dst) * (layout.region_spec(edge.src).period if edge.t_src is not None else 1)
                times = [t * period for t in layout.region_timesteps(edge.dst)]
                reads = [
                    (layout.region_indices_at_t(edge.dst, t // period), weight)
                    for t, weight in fill_times(edge, times, target).items()
                ]
            for cols, weight in reads:
                for i in rows:
                    for j in cols:
                        if (i, j) in allowed:
                            mask[i, j] = max(mask[i, j], weight * edge.weight)
    return mask


@given(st.data())
def test_mask_matches_the_definition(data: st.DataObject) -> None:
    layout = data.draw(layouts(max_spatial=2, max_size=3))
    topology = data.draw(topologies(layout))
    mask = topology.to_attention_mask(layout, device="numpy")
    assert mask.dtype == np.float32
    np.testing.assert_allclose(mask, mask_by_definition(topology, layout), rtol=3e-7)
    additive = topology.to_additive_mask(layout, device="numpy")
    idle = ~(mask > 0).any(axis=1)
    np.testing.assert_array_equal(additive == 0, (mask > 0) | np.diag(idle))
    assert np.isneginf(additive[additive != 0]).all()


def test_two_connections_of_one_pair_keep_their_own_offsets() -> None:
    layout = CanvasLayout(T=3, spatial_shape=(1,), d_model=1, regions={"a": (0, 3, 0, 1)})
    mask = CanvasTopology.causal_temporal(["a"]).to_attention_mask(layout).numpy()
    assert mask.tolist() == [[1, 0, 0], [1, 1, 0], [0, 1, 1]]


def test_unknown_regions_are_skipped_with_a_warning() -> None:
    layout = CanvasLayout(T=1, spatial_shape=(2,), d_model=1, regions={"a": (0, 1, 0, 2)})
    topology = CanvasTopology([Connection("a", "lidar"), Connection("a", "a")])
    with pytest.warns(UserWarning, match="'lidar'.*'a'"):
        mask = topology.to_attention_mask(layout)
    assert mask.sum() == 4


def test_result_device_and_type() -> None:
    torch = pytest.importorskip("torch")
    layout = CanvasLayout(T=1, spatial_shape=(2,), d_model=1, regions={"a": (0, 1, 0, 1)})
    topology = CanvasTopology.isolated(["a"])
    mask = topology.to_attention_mask(layout, device=torch.device("cpu"))
    assert mask.dtype == torch.float32
    assert mask.tolist() == [[1, 0], [0, 0]]
    assert topology.to_additive_mask(layout).tolist() == [[0, -math.inf], [-math.inf, 0]]
    assert isinstance(topology.to_additive_mask(layout, device="numpy"), np.ndarray)
    assert CanvasTopology().to_additive_mask(layout).tolist() == [[0, -math.inf], [-math.inf, 0]]


def test_the_largest_weight_counts_under_every_kind_of_mask() -> None:
    layout = CanvasLayout(T=1, spatial_shape=(3,), d_model=1, regions={"a": (0, 1, 0, 3)})
    upper = np.triu(np.ones((3, 3)))
    for mask in (
        None,
        MaskSpec("sparse", mask=upper),
        MaskSpec("window", window_shape=(1, 3)),
        MaskSpec("tile", tile_h=2),
    ):
        edges = [Connection("a", "a", weight=weight, mask=mask) for weight in (0.5, 2.0, 1.0)]
        weights = CanvasTopology(edges).to_attention_mask(layout, "numpy")
        assert set(weights[weights > 0].tolist()) == {2.0}


def test_zero_weight_reads_nothing() -> None:
    layout = CanvasLayout(T=1, spatial_shape=(2,), d_model=1, regions={"a": (0, 1, 0, 2)})
    assert not CanvasTopology([Connection("a", "a", weight=0)]).to_attention_mask(layout).any()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"weight": math.nan}, "connection 'a' -> 'b': weight: expected a finite number >= 0, got nan"),
        ({"weight": -0.5}, "weight: expected a finite number >= 0, got -0.5"),
        ({"weight": math.inf}, "weight: expected a finite number >= 0, got inf"),
        ({"weight": "abc"}, "weight: expected a finite number >= 0, got 'abc'"),
        ({"weight": True}, "weight: expected a finite number >= 0, got True"),
        ({"t_src": 0.5}, "t_src: expected an integer, got 0.5"),
        ({"t_dst": "0"}, "t_dst: expected an integer, got '0'"),
        ({"interpolation_order": 0}, "interpolation_order: expected a positive integer, got 0"),
        ({"temporal_fill": "keep"}, "temporal_fill: expected one of drop, hold, interpolate, got 'keep'"),
        ({"write_mode": "overwrite"}, "write_mode: expected one of add, gate, replace, got 'overwrite'"),
        ({"write_mode": ["add"]}, "write_mode: expected one of add, gate, replace, got"),
        ({"mask": "tile"}, "mask: expected a MaskSpec, got 'tile'"),
        ({"fn": 3}, "fn: expected a string, got 3"),
        ({"src": 3}, "src: expected a string, got 3"),
    ],
)
def test_wrong_connections(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(CanvasError, match=message):
        Connection(**{"src": "a", "dst": "b", **fields})


def test_connection_takes_values_as_well_as_members() -> None:
    edge = Connection("a", "b", t_src=np.int64(1), temporal_fill="interpolate", weight=np.float32(0.5))  # type: ignore[arg-type]
    assert edge == Connection("a", "b", t_src=1, temporal_fill=INTERPOLATE, weight=0.5)
    assert edge.temporal_fill is INTERPOLATE
    assert type(edge.weight) is float
    assert len({edge, Connection("a", "b", mask=MaskSpec("sparse", mask=[[1]]))}) == 2
    assert HOLD == "hold"
    with pytest.raises(CanvasError, match=r"connections\[1\]: expected a Connection, got \('a', 'b'\)"):
        CanvasTopology([edge, ("a", "b")])  # type: ignore[list-item]


def test_large_masks_need_no_loop_over_pairs() -> None:
    layout = CanvasLayout(
        T=16, H=16, W=16, d_model=8, regions={"screen": (0, 16, 0, 14, 0, 16), "llm": (0, 16, 14, 16, 0, 16)}
    )
    window = Connection("screen", "screen", mask=MaskSpec("window", window_shape=(3, 3, 3)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dense = CanvasTopology.dense(["screen", "llm"]).to_attention_mask(layout, "numpy")
        assert dense.sum() == 4096**2
        temporal = CanvasTopology.causal_temporal(["screen", "llm"]).to_attention_mask(layout, "numpy")
        assert temporal.sum() == 15 * 256**2 + 16 * (224**2 + 32**2)
        assert CanvasTopology([window]).to_attention_mask(layout, "numpy").sum() == 3584 * 27
