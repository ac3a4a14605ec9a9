"""A plan over a mesh of simulated devices: the same numbers as on one, and shards with equal work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from equivalence.backends import Backend
from equivalence.build import plan_from_dense
from equivalence.cases import BY_NAME, make_inputs
from equivalence.tolerance import Options, assert_close, round_inputs
from hypothesis import example, given, strategies as st
from jax import Array
from jax.sharding import Mesh

from canvas_engineering.cli.schema_file import read_schema
from canvas_engineering.errors import BackendError, PlanError
from canvas_engineering.jax import shard_plan, sharded_attention
from canvas_engineering.kernels.pallas.sharding import deal_tiles
from canvas_engineering.kernels.pallas.tiles import TPU_TILES
from canvas_engineering.plan import BlockSparsePlan
from canvas_engineering.plan.compile import compile_topology

CANVASES = sorted((Path(__file__).parents[1] / "examples" / "canvases").glob("*.json"))


def mesh(heads: int, queries: int) -> Mesh:
    if len(jax.devices()) < heads * queries:
        pytest.skip(f"needs {heads * queries} devices, JAX has {len(jax.devices())}")
    devices = np.array(jax.devices()[: heads * queries]).reshape(heads, queries)
    return Mesh(devices, ("heads", "queries"))


def ragged() -> BlockSparsePlan:
    """Nine q tiles of unequal work in two weighted sets, one without keys; three kv tiles, one of them padded."""
    masks = np.zeros((2, 140, 300), np.bool_)
    masks[0] = np.tri(140, 300, 20, dtype=bool)
    masks[1, 40:90, 200:] = True
    masks[:, 96:112] = False
    weights = np.random.default_rng(0).uniform(0.2, 1, masks.shape[:2])
    return plan_from_dense(masks, weights, block_q=16, block_kv=128)


def test_every_device_computes_its_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads and queries over 2 x 4 devices, outputs and gradients against the reference."""
    plan = ragged()
    options = Options(override_weight=True)
    inputs = round_inputs(make_inputs(plan, 1, 4, 2, 8, seed=0), "float32")
    over = mesh(2, 4)

    def run(q: Array, k: Array, v: Array, plan: BlockSparsePlan, *, row_weight: Any, **given: Any) -> Any:
        assert given["backend"] == "pallas"
        return sharded_attention(
            q, k, v, plan, over, head_axis="heads", q_axis="queries", row_weight=row_weight, interpret=True
        )

    monkeypatch.setattr("equivalence.backends.block_sparse_attention", run)
    assert_close(Backend("pallas", "jax").run(plan, inputs, "float32", options), plan, inputs, options, "float32")


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((1, 8), {"dropout_p": 0.3, "seed": np.array([5, 6], np.uint32)}),
        ((8, 1), {"return_lse": True}),
        ((1, 3), {"activation": "sigmoid", "scale": -0.4}),
    ],
    ids=["queries", "heads", "uneven"],
)
def test_many_devices_equal_one(shape: tuple[int, int], options: dict[str, Any]) -> None:
    plan = BY_NAME["window"].plan(16, 128) if options.get("return_lse") else ragged()
    inputs = make_inputs(plan, 1, 8, 8, 8, seed=0)
    operands = [jnp.asarray(x, jnp.float32) for x in (inputs.q, inputs.k, inputs.v)]

    @jax.jit(static_argnums=0, compiler_options={"xla_backend_optimization_level": 0})
    def run(over: Mesh, operands: Any) -> Any:
        def call(q: Array, k: Array, v: Array) -> Any:
            return sharded_attention(
                q, k, v, plan, over, head_axis="heads", q_axis="queries", interpret=True, **options
            )

        out, pull_back = jax.vjp(call, *operands)
        return out, pull_back(jax.tree.map(jnp.ones_like, out))

    many, one = run(mesh(*shape), operands), run(mesh(1, 1), operands)
    for a, b in zip(jax.tree.leaves(many), jax.tree.leaves(one), strict=True):
        # dK and dV are summed in another order.
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_one_device_of_a_mesh_in_tpu_interpret_mode() -> None:
    """Reads out of bounds raise, uninitialised memory is NaN: the shards' lists are complete."""
    plan = ragged()
    inputs = make_inputs(plan, 1, 1, 1, 8, seed=0)
    q, k, v = (jnp.asarray(x, jnp.float32) for x in (inputs.q, inputs.k, inputs.v))
    out = sharded_attention(q, k, v, plan, mesh(1, 2), q_axis="queries")
    expected = sharded_attention(q, k, v, plan, mesh(1, 1), q_axis="queries", interpret=True)
    np.testing.assert_allclose(out, expected, rtol=1e-6, atol=1e-6)


def test_types_under_shard_map() -> None:
    """On a TPU ``shard_map`` checks over which axes everything varies; tracing for one does as well."""
    plan = ragged()
    q = jax.ShapeDtypeStruct((1, 2, plan.num_q, 64), jnp.bfloat16)
    kv = jax.ShapeDtypeStruct((1, 2, plan.num_kv, 64), jnp.bfloat16)
    over = mesh(2, 2)

    def loss(q: Array, k: Array, v: Array) -> Array:
        out = sharded_attention(q, k, v, plan, over, head_axis="heads", q_axis="queries", interpret=False)
        assert isinstance(out, Array)
        return out.astype(jnp.float32).sum()

    traced = jax.jit(jax.grad(loss, (0, 1, 2))).trace(q, kv, kv)
    assert traced.lower(lowering_platforms=("tpu",)).as_text().count("tpu_custom_call") == 3


# -- dealing out --------------------------------------------------------------------------------------------


@example([3, 3, 2, 2, 2], 2)  # dealt longest first these are 7 and 5
@given(st.lists(st.integers(0, 30), min_size=1, max_size=60), st.integers(1, 9))
def test_tiles_are_dealt_once_each(visits: list[int], shards: int) -> None:
    shards = min(shards, len(visits))
    tiles = deal_tiles(np.array(visits), shards)
    assert tiles.shape == (shards, -(-len(visits) // shards))
    assert sorted(tiles[tiles >= 0].tolist()) == list(range(len(visits)))
    work = np.append(visits, 0)[tiles].sum(axis=1)
    for row in tiles:
        real = row[row >= 0]
        assert (np.diff(real) > 0).all()
        assert (row[: real.size] >= 0).all()
    # No single exchange of slots could relieve the busiest shard.
    busiest = int(work.argmax())
    for other in range(shards):
        moved = np.append(visits, 0)[tiles[busiest]][:, None] - np.append(visits, 0)[tiles[other]]
        assert not ((moved > 0) & (moved < work[busiest] - work[other])).any()


@pytest.mark.parametrize("path", CANVASES, ids=lambda path: path.stem)
def test_work_is_balanced_on_the_shipped_canvases(path: Path) -> None:
    """Within 5 % over eight devices, at tiles small enough that there are several for each."""
    schema, topology = read_schema(path)
    found = {}
    for block_q in (128, 64, 32, 16):
        plan = compile_topology(topology, schema.layout, block_q=block_q, block_kv=128, tiles=TPU_TILES)
        if plan.num_q_tiles >= 8:
            shards = shard_plan(plan, 8)
            assert shards.work.sum() == plan.num_entries
            found[block_q] = shards.imbalance
    assert min(found.values()) <= 0.05, found


def test_shards_without_work() -> None:
    plan = plan_from_dense(np.zeros((1, 64, 64), bool), block_q=16, block_kv=128)
    assert shard_plan(plan, 4).imbalance == 0
    q = jnp.ones((1, 1, 64, 8))
    out = sharded_attention(q, q, q, plan, mesh(1, 4), q_axis="queries", interpret=True)
    assert not np.asarray(out).any()


def test_bad_input() -> None:
    plan, over = ragged(), mesh(2, 2)
    q, kv = jnp.zeros((1, 3, 140, 8)), jnp.zeros((1, 3, 300, 8))
    with pytest.raises(PlanError, match=r"q_axis must be an axis of the mesh, one of heads, queries, got 'rows'"):
        sharded_attention(q, kv, kv, plan, over, q_axis="rows")
    with pytest.raises(PlanError, match=r"the 3 query heads and 3 kv heads must be divisible by the 2 devices of mesh"):
        sharded_attention(q, kv, kv, plan, over, head_axis="heads")
    with pytest.raises(PlanError, match=r"q_shards must be between 1 and the plan's 9 q tiles, got 10"):
        shard_plan(plan, 10)
    with pytest.raises(PlanError, match=r"q must have shape \(batch, heads, 140, head_dim\) .* got \(1, 3, 139, 8\)"):
        sharded_attention(q[:, :, 1:], kv, kv, plan, over)
    with pytest.raises(PlanError, match="return_lse needs a plan with one softmax set per row, got one with up to 2"):
        sharded_attention(q, kv, kv, plan, over, return_lse=True)
    with pytest.raises(BackendError, match="dtype must be one of bfloat16, float32, got float16"):
        sharded_attention(q.astype(jnp.float16), kv.astype(jnp.float16), kv.astype(jnp.float16), plan, over)
