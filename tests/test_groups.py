"""Groups: temporal offsets, fill rules and masks, against the rules written out by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, strategies as st

from canvas_engineering.canvas import CanvasLayout, RegionSpec
from canvas_engineering.connectivity import CanvasTopology, Connection
from canvas_engineering.groups import BoxPattern, PairPattern, fill_frames, resolve_groups
from canvas_engineering.masks import MaskSpec
from canvas_engineering.program import CanvasProgram, ConnectionProgram
from canvas_engineering.schema import CanvasSchema


def layout(**regions: RegionSpec) -> CanvasLayout:
    return CanvasLayout(T=8, spatial_shape=(8,), d_model=8, regions=dict(regions))


FAST = RegionSpec((0, 8, 0, 2))
SLOW = RegionSpec((0, 3, 2, 4), period=4)  # real times 0, 4, 8


def readable(topology: CanvasTopology, canvas: CanvasLayout) -> list[tuple[int, int, float]]:
    """(row frame, key frame, weight) of every group; frames of one region each."""
    volume = canvas.spatial_volume
    return [
        (int(g.rows[0]) // volume, int(g.cols[0]) // volume, round(g.weight, 6))
        for g in resolve_groups(topology, canvas)
    ]


@pytest.mark.parametrize(
    ("target", "fill", "order", "expected"),
    [
        (4, "drop", 1, [(1, 1.0)]),
        (5, "drop", 1, []),
        (5, "hold", 1, [(1, 1.0)]),
        (4, "hold", 1, [(1, 1.0)]),
        (-1, "hold", 1, []),
        (5, "interpolate", 1, [(1, 0.75), (2, 0.25)]),
        (-3, "interpolate", 1, [(0, 1.0)]),
        (99, "interpolate", 1, [(3, 1.0)]),
        (6, "interpolate", 2, [(1, 4 / 9), (2, 4 / 9), (0, 1 / 9 * 1 / 1)]),
    ],
)
def test_fill_rules(target: int, fill: str, order: int, expected: list[tuple[int, float]]) -> None:
    populated = np.array([0, 4, 8, 16])
    got = fill_frames(populated, target, fill, order)
    assert [i for i, _ in got] == [i for i, _ in expected]
    if order == 1:
        assert [w for _, w in got] == [w for _, w in expected]


def test_inverse_distance_weights() -> None:
    got = fill_frames(np.array([0, 4, 8]), 5, "interpolate", 2)
    raw = {1: 1 / 1**2, 2: 1 / 3**2, 0: 1 / 5**2}
    assert [i for i, _ in got] == [1, 2, 0]
    np.testing.assert_allclose([w for _, w in got], [raw[i] / sum(raw.values()) for i, _ in got])


def test_ties_take_the_earlier_time_first() -> None:
    assert [i for i, _ in fill_frames(np.array([0, 4, 8, 12]), 6, "interpolate", 2)] == [1, 2, 0]


@given(
    st.lists(st.integers(-50, 50), unique=True, max_size=8).map(sorted),
    st.integers(-60, 60),
    st.sampled_from(["drop", "hold", "interpolate"]),
    st.integers(1, 60),
)
def test_fill_weights_sum_to_one_and_name_existing_times(times: list[int], target: int, fill: str, order: int) -> None:
    got = fill_frames(np.array(times, np.int64), target, fill, order)
    assert all(0 <= i < len(times) for i, _ in got)
    assert not got or abs(sum(w for _, w in got) - 1) < 1e-9
    if target in times:
        assert got == [(times.index(target), 1.0)]
    elif fill == "drop":
        assert got == []


def test_without_offsets_there_is_one_group() -> None:
    groups = resolve_groups(CanvasTopology([Connection("a", "b", weight=2.0)]), layout(a=FAST, b=SLOW))
    assert [(g.rows.size, g.cols.size, g.weight, g.connection) for g in groups] == [(16, 6, 2.0, 0)]


def test_same_and_previous_frame_are_two_connections() -> None:
    """0.5.0 gave both of them the first one's offsets, so a region never read its own past."""
    canvas = layout(a=FAST)
    topology = CanvasTopology([Connection("a", "a", t_src=0, t_dst=0), Connection("a", "a", t_src=0, t_dst=-1)])
    same = [(t, t, 1.0) for t in range(8)]
    previous = [(t, t - 1, 1.0) for t in range(1, 8)]
    assert readable(topology, canvas) == same + previous


def test_real_time_of_a_slow_source_and_a_fast_key() -> None:
    topology = CanvasTopology([Connection("slow", "fast", t_src=0, t_dst=0, temporal_fill="drop")])  # type: ignore[arg-type]
    assert readable(topology, layout(fast=FAST, slow=SLOW)) == [(0, 0, 1.0), (1, 4, 1.0)], "2 * 4 = 8 is past the end"


def test_hold_reads_the_last_slow_frame() -> None:
    topology = CanvasTopology([Connection("fast", "slow", t_src=0, t_dst=0, weight=0.5)])
    assert readable(topology, layout(fast=FAST, slow=SLOW)) == [(t, t // 4, 0.5) for t in range(8)]


def test_interpolation_splits_the_weight() -> None:
    topology = CanvasTopology([Connection("fast", "slow", weight=2.0, t_src=0, t_dst=0, temporal_fill="interpolate")])  # type: ignore[arg-type]
    expected = []
    for t in range(8):
        if t % 4 == 0:
            expected.append((t, t // 4, 2.0))
        else:
            expected += [(t, t // 4, 2 * (1 - t % 4 / 4)), (t, t // 4 + 1, 2 * (t % 4 / 4))]
    assert readable(topology, layout(fast=FAST, slow=SLOW)) == expected


def test_one_sided_offsets() -> None:
    canvas = layout(fast=FAST, slow=SLOW)
    keys_only = resolve_groups(CanvasTopology([Connection("slow", "fast", t_dst=-1)]), canvas)
    assert [g.rows.size for g in keys_only] == [6] * 7, "all rows, once per reference frame with keys (none at -1)"
    rows_only = resolve_groups(CanvasTopology([Connection("fast", "slow", t_src=1)]), canvas)
    assert [int(g.rows[0]) // 8 for g in rows_only] == list(range(1, 8))
    assert all(g.cols.size == 6 for g in rows_only)


def test_skip_temporal_ignores_offsets() -> None:
    topology = CanvasTopology([Connection("fast", "slow", t_src=0, t_dst=-1)])
    assert len(resolve_groups(topology, layout(fast=FAST, slow=SLOW), skip_temporal=True)) == 1


def test_a_mask_and_offsets_must_both_allow() -> None:
    canvas = CanvasLayout(T=3, spatial_shape=(2,), d_model=8, regions={"a": (0, 3, 0, 2)})
    mask = np.zeros((6, 6), bool)
    mask[2, 0] = mask[3, 5] = True  # frame 1 reads frame 0; frame 1 reads frame 2, which the offset forbids
    topology = CanvasTopology([Connection("a", "a", t_src=0, t_dst=-1, mask=MaskSpec(kind="sparse", mask=mask))])
    (group,) = resolve_groups(topology, canvas)
    assert group.rows.tolist() == [2]
    assert group.cols[group.pattern.dense()[0]].tolist() == [0]  # type: ignore[union-attr]


def test_the_program_s_mask_replaces_the_connection_s() -> None:
    canvas = CanvasLayout(T=1, spatial_shape=(4,), d_model=8, regions={"a": (0, 1, 0, 4)})
    topology = CanvasTopology([Connection("a", "a", mask=MaskSpec(kind="tile", tile_shape=(1,)))])
    program = CanvasProgram(
        schema=CanvasSchema(layout=canvas, topology=topology),
        connections={("a", "a"): ConnectionProgram(mask_spec=MaskSpec(kind="tile", tile_shape=(2,)))},
    )
    (group,) = resolve_groups(topology, canvas, program=program)
    np.testing.assert_array_equal(group.pattern.dense(), np.kron(np.eye(2), np.ones((2, 2))))  # type: ignore[union-attr]


def test_split_masks_give_one_group_per_pair() -> None:
    canvas = CanvasLayout(T=2, spatial_shape=(4,), d_model=8, regions={"a": (0, 2, 0, 4)})
    topology = CanvasTopology([Connection("a", "a", t_src=0, t_dst=0, mask=MaskSpec(kind="tile", tile_shape=(2,)))])
    groups = resolve_groups(topology, canvas, split_masks=True)
    assert [(g.rows.tolist(), g.cols.tolist()) for g in groups] == [
        ([0, 1],) * 2,
        ([2, 3],) * 2,
        ([4, 5],) * 2,
        ([6, 7],) * 2,
    ]


@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 99))
def test_patterns_restrict_like_their_dense_form(n: int, m: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    lo = rng.integers(0, m, (n, 1)).astype(np.int32)
    box = BoxPattern(lo, lo + rng.integers(0, 3, (n, 1)).astype(np.int32), np.arange(m, dtype=np.int32)[:, None])
    pairs = PairPattern.from_dense(rng.random((n, m)) < 0.4)
    rows, cols = np.flatnonzero(rng.random(n) < 0.7), slice(0, int(rng.integers(0, m + 1)))
    for pattern in (box, pairs):
        part = pattern.restrict(rows, cols)
        np.testing.assert_array_equal(part.dense(), pattern.dense()[rows][:, cols])
        np.testing.assert_array_equal(part.rows_with_keys(), part.dense().any(axis=1))
