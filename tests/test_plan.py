"""The compiler: a plan means exactly what the groups say, whatever its order and tiles."""

from __future__ import annotations

import math
import pickle
from copy import deepcopy
from typing import Any
from unittest import mock

import numpy as np
import pytest
from canvas_strategies import layouts, topologies
from hypothesis import given, settings, strategies as st
from numpy.typing import NDArray

from canvas_engineering.canvas import CanvasLayout, RegionSpec
from canvas_engineering.connectivity import CanvasTopology, Connection
from canvas_engineering.errors import CanvasError, PlanError
from canvas_engineering.groups import resolve_groups
from canvas_engineering.masks import MaskSpec
from canvas_engineering.plan import BlockSize, BlockSparsePlan, compile as compiler
from canvas_engineering.plan.auto import Candidate, choose
from canvas_engineering.plan.compile import cell_shapes
from canvas_engineering.plan.plan import Softmax

BLOCKS: st.SearchStrategy[BlockSize] = st.sampled_from(["auto", 8, 16, 32])


def meaning(topology: CanvasTopology, layout: CanvasLayout) -> list[list[tuple[bytes, float]]]:
    """For every row, its groups as sorted (keys, weight) pairs, straight from the groups."""
    n = layout.num_positions
    rows: list[list[tuple[bytes, float]]] = [[] for _ in range(n)]
    for group in resolve_groups(topology, layout):
        dense = np.ones((group.rows.size, group.cols.size), bool) if group.pattern is None else group.pattern.dense()
        for i, row in enumerate(group.rows):
            keys = np.zeros(n, bool)
            keys[group.cols[dense[i]]] = True
            rows[row].append((keys.tobytes(), group.weight))
    return [sorted(row) for row in rows]


def plan_meaning(plan: BlockSparsePlan) -> list[list[tuple[bytes, float]]]:
    """The same of a plan, from ``to_dense``."""
    masks, weights = plan.to_dense()
    return [
        sorted((masks[s, i].tobytes(), float(weights[s, i])) for s in range(len(masks)) if masks[s, i].any())
        for i in range(plan.num_q)
    ]


def assert_same_meaning(plan: BlockSparsePlan, expected: list[list[tuple[bytes, float]]]) -> None:
    for row, want in zip(plan_meaning(plan), expected, strict=True):
        assert [keys for keys, _ in row] == [keys for keys, _ in want]
        np.testing.assert_allclose([w for _, w in row], [w for _, w in want], rtol=1e-6)


@given(st.data(), BLOCKS, BLOCKS)
def test_a_connection_plan_means_its_groups(data: st.DataObject, block_q: BlockSize, block_kv: BlockSize) -> None:
    layout = data.draw(layouts())
    topology = data.draw(topologies(layout))
    plan = BlockSparsePlan.from_topology(
        topology,
        layout,
        block_q=block_q,
        block_kv=block_kv,
        normalize=False,
    )
    plan.validate()
    expected = meaning(topology, layout)
    assert_same_meaning(plan, expected)
    assert plan.max_sets <= max((len(row) for row in expected), default=0), "no more sets than a row has groups"
    masks, _ = plan.to_dense()
    assert plan.stats().true_pairs == masks.sum()
    assert ((plan.row_connection >= 0) == (plan.row_weight > 0)).all()


@given(st.data(), BLOCKS)
def test_a_joint_plan_is_the_union_of_its_groups(data: st.DataObject, block: BlockSize) -> None:
    layout = data.draw(layouts())
    topology = data.draw(topologies(layout))
    plan = BlockSparsePlan.from_topology(
        topology,
        layout,
        softmax="joint",
        block_q=block,
        block_kv=block,
    )
    plan.validate()
    union = np.zeros((layout.num_positions, layout.num_positions), bool)
    for group in resolve_groups(topology, layout):
        dense = True if group.pattern is None else group.pattern.dense()
        union[np.ix_(group.rows, group.cols)] |= dense
    masks, weights = plan.to_dense()
    assert plan.max_sets <= 1
    np.testing.assert_array_equal(masks.any(axis=0), union)
    np.testing.assert_array_equal(weights.sum(axis=0), union.any(axis=1))


@given(st.data())
def test_normalized_weights_sum_to_one(data: st.DataObject) -> None:
    layout = data.draw(layouts())
    topology = data.draw(topologies(layout))
    plan = BlockSparsePlan.from_topology(topology, layout)
    _, weights = plan.to_dense()
    has_keys = np.array([bool(row) for row in meaning(topology, layout)])
    np.testing.assert_allclose(weights.sum(axis=0), has_keys, atol=1e-6)


@given(st.integers(0, 40), st.integers(0, 40), st.sampled_from([0.0, 0.05, 0.5, 1.0]), st.integers(0, 99), BLOCKS)
def test_from_mask_is_the_mask(num_q: int, num_kv: int, density: float, seed: int, block: BlockSize) -> None:
    mask = np.random.default_rng(seed).random((num_q, num_kv)) < density
    plan = BlockSparsePlan.from_mask(mask, block_q=block, block_kv=block)
    plan.validate()
    masks, weights = plan.to_dense()
    np.testing.assert_array_equal(masks.any(axis=0), mask)
    np.testing.assert_array_equal(weights.sum(axis=0), mask.any(axis=1))


@given(st.data())
def test_from_mask_spec_is_the_mask_of_the_topology(data: st.DataObject) -> None:
    layout = data.draw(layouts())
    topology = data.draw(topologies(layout))
    connection = topology.connections[0]
    spec = connection.mask or MaskSpec()
    plan = BlockSparsePlan.from_mask_spec(spec, layout, connection.src, connection.dst)
    plan.validate()
    dense = CanvasTopology([Connection(connection.src, connection.dst, mask=spec)]).to_attention_mask(layout, "numpy")
    rows, cols = layout.region_index_array(connection.src), layout.region_index_array(connection.dst)
    masks, _ = plan.to_dense()
    np.testing.assert_array_equal(masks.any(axis=0), dense[np.ix_(rows, cols)] > 0)


def zeros(*shape: int) -> NDArray[np.float64]:
    return np.zeros(shape)


def softmax_attention(q, k, v, allowed):  # type: ignore[no-untyped-def]
    """One softmax per row over the allowed keys; rows without keys give 0. Shapes (n, d), (m, d), (m, d), (n, m)."""
    scores = np.where(allowed, q @ k.T / math.sqrt(q.shape[1]), -np.inf)
    peak = np.maximum(scores.max(axis=1, initial=-np.inf, keepdims=True), -1e300)
    weights = np.exp(scores - peak)
    total = weights.sum(axis=1, keepdims=True)
    return np.divide(weights @ v, total, out=np.zeros((len(q), v.shape[1])), where=total > 0)


def decode(plan: BlockSparsePlan, q: NDArray[np.float64], k: NDArray[np.float64], v: NDArray[np.float64]):  # type: ignore[no-untyped-def]
    """The loop of the class docstring, as it stands there, with the padding handled as it says."""
    num_q, head_dim = q.shape
    num_q_tiles, set_ptr, entry_ptr, entry_kv = plan.num_q_tiles, plan.set_ptr, plan.entry_ptr, plan.entry_kv
    q_tokens, kv_tokens, entry_mask, row_weight = plan.q_tokens, plan.kv_tokens, plan.entry_mask, plan.row_weight
    tile_mask = plan.tile_mask
    out = zeros(num_q, head_dim)
    for tile in range(num_q_tiles):
        rows = q_tokens[tile]
        real = rows >= 0
        for s in range(set_ptr[tile], set_ptr[tile + 1]):
            keys: list[NDArray[np.int32]] = []
            allowed: list[NDArray[np.bool_]] = []
            for e in range(entry_ptr[s], entry_ptr[s + 1]):
                keys.append(kv_tokens[entry_kv[e]])
                allowed.append(tile_mask(entry_mask[e]) & (kv_tokens[entry_kv[e]] >= 0))
            key, mask = np.concatenate(keys), np.concatenate(allowed, axis=1)
            attended = row_weight[s][:, None] * softmax_attention(q[rows], k[key], v[key], mask)
            out[rows[real]] += attended[real]
    return out


@settings(max_examples=20)
@given(st.data())
def test_the_decode_loop_of_the_docstring(data: st.DataObject) -> None:
    layout = data.draw(layouts())
    topology = data.draw(topologies(layout))
    plan = BlockSparsePlan.from_topology(topology, layout, normalize=False)
    q, k, v = np.random.default_rng(0).standard_normal((3, layout.num_positions, 4))
    expected = zeros(layout.num_positions, 4)
    for group in resolve_groups(topology, layout):
        dense = np.ones((group.rows.size, group.cols.size), bool) if group.pattern is None else group.pattern.dense()
        expected[group.rows] += group.weight * softmax_attention(q[group.rows], k[group.cols], v[group.cols], dense)
    np.testing.assert_allclose(decode(plan, q, k, v), expected, atol=1e-5)  # weights are float32


def test_the_docstring_shows_the_loop_that_is_tested() -> None:
    text = BlockSparsePlan.__doc__ or ""
    for line in (
        "for s in range(set_ptr[tile], set_ptr[tile + 1]):",
        "for e in range(entry_ptr[s], entry_ptr[s + 1]):",
        "keys.append(kv_tokens[entry_kv[e]])",
        "row_weight[s][:, None] * softmax_attention(q[rows], k[keys], v[keys], allowed)",
    ):
        assert line in text


def computer_use(T: int, size: int) -> tuple[CanvasTopology, CanvasLayout]:
    """Screen, mouse, keyboard and text in each frame, as in the shipped example, for any size."""
    h = size * 3 // 4
    regions: dict[str, tuple[int, ...] | RegionSpec] = {
        "screen": (0, T, 0, h, 0, h),
        "mouse": (0, T, h, h + size // 16, 0, size // 8),
        "keyboard": (0, T, h + size // 16, h + size // 8, 0, size // 8),
        "llm": (0, T, h + size // 8, size, 0, size // 4),
    }
    layout = CanvasLayout(T=T, H=size, W=size, d_model=8, regions=regions)
    return CanvasTopology.causal_temporal(list(regions)), layout


@pytest.mark.parametrize(("frames", "size"), [(8, 16), (16, 32)])
def test_auto_tiles_compute_at_most_a_quarter_more_than_needed(frames: int, size: int) -> None:
    topology, layout = computer_use(frames, size)
    for softmax in ("connection", "joint"):
        plan = BlockSparsePlan.from_topology(topology, layout, softmax=softmax)
        assert 1.0 <= plan.stats().computed_per_true <= 1.25


@pytest.mark.parametrize("softmax", ["connection", "joint"])
@pytest.mark.parametrize("block", ["auto", 16, 24])
def test_as_many_tiles_are_visited_as_the_choice_was_told(block: BlockSize, softmax: Softmax) -> None:
    """Frames that share tiles in the same way, and tiles that several regions share."""
    topology, layout = computer_use(8, 16)
    seen: list[Candidate] = []

    def remembered(*arguments: Any, **options: Any) -> Candidate:
        seen.append(choose(*arguments, **options))
        return seen[-1]

    with mock.patch.object(compiler, "choose", remembered):
        plan = BlockSparsePlan.from_topology(topology, layout, softmax=softmax, block_q=block, block_kv=block)
    assert seen[0].visited == plan.num_entries


def test_a_video_of_windows_is_compiled_without_its_pairs() -> None:
    """115,200 positions and 1.2 billion pairs: neither pairs nor an N x N array can be made on the way."""
    layout = CanvasLayout(T=30, spatial_shape=(48, 80), d_model=8, regions={"video": (0, 30, 0, 48, 0, 80)})
    window = MaskSpec(kind="window", window_shape=(18, 24, 24))
    plan = BlockSparsePlan.from_topology(CanvasTopology([Connection("video", "video", mask=window)]), layout)
    stats = plan.stats()
    assert stats.true_pairs == 115_200 * 18 * 24 * 24, "every query has the full count of keys"
    assert stats.computed_per_true < 2.0
    assert stats.masks < 500, "a regular grid has few distinct masks"


def test_windows_in_spatial_tiles_of_the_window_need_no_mask() -> None:
    layout = CanvasLayout(T=8, spatial_shape=(16, 16), d_model=8, regions={"video": (0, 8, 0, 16, 0, 16)})
    window = MaskSpec(kind="window", window_shape=(4, 12, 12), tile_shape=(4, 4, 4))
    plan = BlockSparsePlan.from_mask_spec(window, layout, "video", "video")
    assert plan.stats().partial_tiles == 0
    assert plan.stats().computed_per_true == 1.0


def test_disguised_blocks_are_found() -> None:
    rng = np.random.default_rng(1)
    blocks = np.kron(rng.random((8, 8)) < 0.3, np.ones((32, 32), bool)).astype(bool)
    shuffled = blocks[rng.permutation(256)][:, rng.permutation(256)]
    plan = BlockSparsePlan.from_mask(shuffled)
    assert plan.stats().computed_per_true < 1.3, "rows and keys that belong together are brought together"


def test_cells_divide_their_extent() -> None:
    for shape in cell_shapes((30, 48, 80)):
        assert all(n % c == 0 for n, c in zip((30, 48, 80), shape, strict=True))
    assert cell_shapes((7, 5)) == [(7, 5)] or all(7 % a == 0 and 5 % b == 0 for a, b in cell_shapes((7, 5)))


def test_renumbering_keeps_the_meaning() -> None:
    topology, layout = computer_use(4, 16)
    plan = BlockSparsePlan.from_topology(topology, layout)
    ordered = plan.in_plan_order
    assert ordered.is_contiguous
    assert not plan.is_contiguous
    masks, weights = plan.to_dense()
    ordered_masks, ordered_weights = ordered.to_dense()
    np.testing.assert_array_equal(ordered_masks, masks[:, plan.q_order][:, :, plan.kv_order])
    np.testing.assert_array_equal(ordered_weights, weights[:, plan.q_order])


def test_the_transpose_lists_every_entry_once_by_kv_tile() -> None:
    topology, layout = computer_use(4, 16)
    plan = BlockSparsePlan.from_topology(topology, layout)
    back = plan.transpose
    assert sorted(back.entry) == list(range(plan.num_entries))
    for tile in range(plan.num_kv_tiles):
        for e in range(back.entry_ptr[tile], back.entry_ptr[tile + 1]):
            assert plan.entry_kv[back.entry[e]] == tile
            assert back.entry_set[e] == plan.entry_set[back.entry[e]]
            assert back.entry_q[e] == plan.set_tile[back.entry_set[e]]
            assert back.entry_mask[e] == plan.entry_mask[back.entry[e]]
    visits = np.diff(back.entry_ptr)[plan.kv_work]
    assert (np.diff(visits) <= 0).all(), "longest work first"


def test_equal_declarations_give_equal_plans() -> None:
    first = BlockSparsePlan.from_topology(*computer_use(4, 16))
    second = BlockSparsePlan.from_topology(*computer_use(4, 16))
    other = BlockSparsePlan.from_topology(*computer_use(4, 16), softmax="joint")
    assert first == second
    assert hash(first) == hash(second)
    assert first.digest == second.digest
    assert first != other
    assert first != "plan"


def test_plans_copy_and_pickle_without_their_caches() -> None:
    plan = BlockSparsePlan.from_topology(*computer_use(4, 16))
    assert plan.lowered("key", lambda p: p.num_q) == plan.num_q
    assert plan.lowered("key", lambda p: -1) == plan.num_q, "lowered once per key"
    assert deepcopy(plan) is plan
    copy = pickle.loads(pickle.dumps(plan))
    assert copy == plan
    assert copy.lowered("key", lambda p: -1) == -1


def test_printing_says_what_it_is() -> None:
    plan = BlockSparsePlan.from_topology(*computer_use(4, 16))
    text = str(plan)
    for part in ("1,024 queries x 1,024 keys", "softmax=connection", "full", "partial", "metadata", "topology of 20"):
        assert part in text
    assert repr(plan).startswith("BlockSparsePlan(num_q=1024")


@pytest.mark.parametrize("block", [0, -8, 12, 2048, 16.0, True, "large", None])
def test_bad_block_sizes_are_named(block: object) -> None:
    with pytest.raises(PlanError, match=r'block_q must be "auto" or a multiple of 8 between 8 and 1024, got'):
        BlockSparsePlan.from_mask(np.ones((4, 4), bool), block_q=block)  # type: ignore[arg-type]


def test_other_bad_arguments_are_named() -> None:
    topology, layout = computer_use(4, 16)
    with pytest.raises(PlanError, match='softmax must be "connection" or "joint", got \'both\''):
        BlockSparsePlan.from_topology(topology, layout, softmax="both")  # type: ignore[arg-type]
    with pytest.raises(
        PlanError, match=r"mask must be a boolean array \(num_q, num_kv\), got float64 with shape \(4,\)"
    ):
        BlockSparsePlan.from_mask(np.ones(4))  # type: ignore[arg-type]
    plan = BlockSparsePlan.from_topology(topology, layout)
    with pytest.raises(PlanError, match="q_order must be a permutation of the 1024 tokens"):
        plan.renumbered(np.zeros(1024, int), np.arange(1024))
    with pytest.raises(CanvasError, match="nowhere"):
        BlockSparsePlan.from_mask_spec(MaskSpec(), layout, "nowhere", "screen")


def test_an_unknown_region_is_skipped_with_a_warning() -> None:
    layout = CanvasLayout(T=1, H=2, W=2, d_model=8, regions={"a": (0, 1, 0, 2, 0, 2)})
    topology = CanvasTopology([Connection("a", "ghost"), Connection("a", "a")])
    with pytest.warns(UserWarning, match=r"connection 0 \('a' -> 'ghost'\) names the unknown region 'ghost'.*\['a'\]"):
        plan = BlockSparsePlan.from_topology(topology, layout)
    assert plan.stats().true_pairs == 16
