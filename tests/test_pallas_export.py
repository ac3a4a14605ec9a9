"""Lowering for a TPU with ``jax.export``, on any machine: block shapes, layouts, operations that Mosaic lacks."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from equivalence.build import plan_from_dense
from equivalence.cases import BY_NAME
from jax import Array
from jax.sharding import AbstractDevice, AbstractMesh

from canvas_engineering.attention.api import block_sparse_attention
from canvas_engineering.canvas import CanvasLayout
from canvas_engineering.connectivity import CanvasTopology
from canvas_engineering.kernels.pallas import lowering
from canvas_engineering.kernels.pallas.attention import plan_attention
from canvas_engineering.kernels.pallas.lowering import LIST_BYTES, lower_plan
from canvas_engineering.kernels.pallas.tiles import TPU_TILES
from canvas_engineering.plan import BlockSparsePlan
from canvas_engineering.plan.compile import compile_topology

TPU = AbstractMesh((1,), ("device",), abstract_device=AbstractDevice("TPU v5 lite", 1, "tpu"))


@pytest.fixture(autouse=True)
def on_an_abstract_tpu() -> Iterator[None]:
    with jax.sharding.use_abstract_mesh(TPU):
        yield


def forward_and_backward(plan: BlockSparsePlan, **options: Any) -> Callable[..., Any]:
    """Output and all gradients of the public function with ``backend="pallas"``."""

    def run(*operands: Array) -> Any:
        def call(q: Array, k: Array, v: Array, row_weight: Array | None = None) -> Any:
            return block_sparse_attention(q, k, v, plan, row_weight=row_weight, backend="pallas", **options)

        out, pull_back = jax.vjp(call, *operands)
        return out, pull_back(out)

    return run


def exported(function: Callable[..., Any], *operands: Any) -> str:
    """The module exported for a TPU."""
    result = jax.export.export(jax.jit(function), platforms=["tpu"])(*operands)
    assert result.platforms == ("tpu",)
    return str(result.mlir_module())


def kernels(module: str) -> list[str]:
    return sorted(re.findall(r'kernel_name = "canvas_attention_(\w+)"', module))


def shapes(plan: BlockSparsePlan, heads_q: int, heads_kv: int, head_dim: int, dtype: str) -> list[Any]:
    q = jax.ShapeDtypeStruct((1, heads_q, plan.num_q, head_dim), dtype)
    kv = jax.ShapeDtypeStruct((1, heads_kv, plan.num_kv, head_dim), dtype)
    return [q, kv, kv]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("head_dim", [40, 64, 128, 256])
def test_every_head_dim_and_dtype(head_dim: int, dtype: str) -> None:
    plan = BY_NAME["several_sets"].plan(16, 128)
    module = exported(forward_and_backward(plan), *shapes(plan, 2, 1, head_dim, dtype))
    assert kernels(module) == ["dkv", "dq", "forward"]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("several_sets", {"activation": "sigmoid"}),
        ("several_sets", {"dropout_p": 0.1, "seed": 3}),
        ("window", {"return_lse": True}),
        ("window", {"activation": "sigmoid", "dropout_p": 0.1, "seed": 3, "scale": -2.0}),
        ("permuted", {}),
        ("topology", {}),
    ],
    ids=str,
)
def test_every_option(name: str, options: dict[str, Any]) -> None:
    """With row weights that are data."""
    plan = BY_NAME[name].plan(32, 256)
    operands = [*shapes(plan, 4, 2, 64, "bfloat16"), jax.ShapeDtypeStruct(plan.row_weight.shape, np.float32)]
    assert kernels(exported(forward_and_backward(plan, **options), *operands)) == ["dkv", "dq", "forward"]


@pytest.mark.parametrize("tiles", [(16, 128), (128, 512), (512, 128), (512, 512)], ids=str)
def test_every_tile_size(tiles: tuple[int, int]) -> None:
    """The smallest, the largest, and more rows of mask than one word per lane holds."""
    plan = plan_from_dense(np.tri(600, dtype=bool)[None], block_q=tiles[0], block_kv=tiles[1])
    assert plan.num_masks
    assert len(kernels(exported(forward_and_backward(plan), *shapes(plan, 1, 1, 128, "bfloat16")))) == 3


def test_chunks_are_a_loop_around_one_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_from_dense(np.tri(160, dtype=bool)[None], block_q=16, block_kv=128)
    monkeypatch.setattr(lowering, "LIST_BYTES", 4 * int(np.bincount(plan.entry_kv).max()))
    assert lower_plan(plan).row_format.chunks > 1
    module = exported(forward_and_backward(plan), *shapes(plan, 1, 1, 64, "float32"))
    assert kernels(module) == ["dkv", "dq", "forward"]
    assert "stablehlo.while" in module


def test_tiles_that_a_tpu_does_not_take_fail_here_too() -> None:
    """The control: without our own check it is Mosaic that refuses."""
    plan = plan_from_dense(np.ones((1, 40, 128), bool), block_q=20, block_kv=128)
    keywords: dict[str, Any] = {"plan": plan, "scale": 1.0, "activation": "softmax", "dropout_p": 0.0}

    def call(q: Array, k: Array, v: Array) -> Any:
        return plan_attention(q, k, v, None, None, return_lse=False, interpret=False, **keywords)

    with pytest.raises(ValueError, match=r"not supported|divisible|block shape|multiple"):
        exported(call, *shapes(plan, 1, 1, 64, "bfloat16"))


def test_a_million_positions() -> None:
    """Their lists are cut into chunks that scalar memory holds; nothing here has the size of the mask."""
    layout = CanvasLayout(
        T=64,
        H=128,
        W=128,
        d_model=64,
        regions={
            "screen": (0, 64, 0, 120, 0, 128),
            "keys": (0, 64, 120, 128, 0, 64),
            "text": (0, 64, 120, 128, 64, 128),
        },
    )
    topology = CanvasTopology.causal_temporal(["screen", "keys", "text"])
    plan = compile_topology(topology, layout, block_q=256, block_kv=256, tiles=TPU_TILES)
    assert plan.num_q == 2**20
    lowered = lower_plan(plan)
    for form, words in ((lowered.row_format, lowered.rows), (lowered.col_format, lowered.cols)):
        assert form.chunks > 1
        assert 4 * form.words * form.length <= LIST_BYTES
        assert sum(word.size for word in words) < 1.1 * form.words * (plan.num_entries + plan.num_q_tiles)
    module = exported(forward_and_backward(plan), *shapes(plan, 1, 1, 128, "bfloat16"))
    assert kernels(module) == ["dkv", "dq", "forward"]


def test_cost_estimates_are_those_of_the_visited_tiles() -> None:
    plan = BY_NAME["in_plan_order"].plan(16, 128)
    operands = shapes(plan, 2, 2, 64, "bfloat16")
    found = {}
    for call in _pallas_calls(jax.make_jaxpr(forward_and_backward(plan))(*operands).jaxpr):
        found[call.params["name"].removeprefix("canvas_attention_")] = call.params["cost_estimate"]
    pairs = 2 * lower_plan(plan).row_format.length * plan.block_q * plan.block_kv
    assert {name: cost.flops for name, cost in found.items()} == {
        "forward": 4 * 64 * pairs,
        "dq": 6 * 64 * pairs,
        "dkv": 8 * 64 * 2 * lower_plan(plan).col_format.length * plan.block_q * plan.block_kv,
    }
    assert all(cost.transcendentals == pairs for name, cost in found.items() if name != "dkv")
    assert all(cost.bytes_accessed > 0 for cost in found.values())


def _pallas_calls(jaxpr: Any) -> Iterator[Any]:
    """All ``pallas_call`` equations, inner functions included."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "pallas_call":
            yield equation
            continue
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from _pallas_calls(inner)


def test_the_dispatcher_exports() -> None:
    from canvas_engineering.jax import AttentionDispatcher

    layout = CanvasLayout(T=2, H=8, W=16, d_model=64, regions={"a": (0, 2, 0, 4, 0, 16), "b": (0, 2, 4, 8, 0, 16)})
    dispatcher = AttentionDispatcher(
        CanvasTopology.causal_temporal(["a", "b"]), layout, d_model=64, n_heads=1, backend="pallas"
    )
    params = jax.eval_shape(dispatcher.init, jax.eval_shape(lambda: jax.random.key(0)))
    x = jax.ShapeDtypeStruct((1, layout.num_positions, 64), jnp.float32)
    module = exported(jax.grad(lambda p, x: (dispatcher.apply(p, x) ** 2).sum()), params, x)
    assert kernels(module) == ["dkv", "dq", "forward"]
