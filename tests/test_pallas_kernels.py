"""The TPU kernels in interpret mode: what the equivalence suite does not reach.

The suite (``equivalence/``) compares values and gradients with the reference in TPU interpret mode, which raises on
reads out of bounds and fills uninitialised memory with NaN. Here: chunks, skipped sets, races, and JAX's
transformations. Those run in the plain interpreter where TPU interpret mode cannot follow (``checkpoint``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from equivalence.backends import PALLAS, Backend
from equivalence.build import plan_from_dense
from equivalence.cases import BY_NAME, make_inputs
from equivalence.tolerance import Options, assert_close, round_inputs
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from canvas_engineering.attention.api import available_backends, backend_reasons, block_sparse_attention
from canvas_engineering.errors import BackendError
from canvas_engineering.kernels.pallas import lowering
from canvas_engineering.kernels.pallas.attention import plan_attention
from canvas_engineering.kernels.pallas.backend import interpret_here
from canvas_engineering.plan import BlockSparsePlan

#: These tests spend their time in XLA's compiler.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def two_sets(block_q: int = 16) -> BlockSparsePlan:
    """Three q tiles and two kv tiles in two weighted sets: full, partial, padded and empty tiles."""
    masks = np.zeros((2, 2 * block_q + 3, 133), np.bool_)
    masks[0, :block_q, :] = True
    masks[0, block_q:-1, 5:90] = True
    masks[1, : block_q + 4, 100:] = True
    return plan_from_dense(
        masks, np.random.default_rng(0).uniform(0.2, 1, masks.shape[:2]), block_q=block_q, block_kv=128
    )


def operands(plan: BlockSparsePlan, heads: int = 1, head_dim: int = 8, dtype: str = "float32") -> list[Array]:
    inputs = make_inputs(plan, 1, heads, heads, head_dim, seed=0)
    return [jnp.asarray(x, dtype) for x in (inputs.q, inputs.k, inputs.v)]


def attend(plan: BlockSparsePlan, interpret: Any = True, **options: Any) -> Callable[..., Array]:
    """``f(q, k, v, row_weight=None, seed=None)`` in the plain interpreter, or as ``interpret`` says."""
    keywords: dict[str, Any] = {
        "plan": plan,
        "scale": 0.3,
        "activation": "softmax",
        "dropout_p": 0.0,
        "return_lse": False,
        "interpret": interpret,
        **options,
    }
    return lambda q, k, v, row_weight=None, seed=None: plan_attention(q, k, v, row_weight, seed, **keywords)


def squared(function: Callable[..., Array]) -> Callable[..., Array]:
    return lambda *arguments: (function(*arguments) ** 2).sum()


def assert_same(actual: Any, expected: Any) -> None:
    for one, other in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))


# -- lists --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [Options(override_weight=True), Options(dropout_p=0.3, seed=5)], ids=str)
def test_small_tiles_in_chunks(options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    """A list that does not fit at once runs chunk by chunk, each adding its tiles to the same outputs."""
    plan = two_sets()
    most = int(np.bincount(plan.entry_kv).max())
    monkeypatch.setattr(lowering, "LIST_BYTES", 4 * most)
    inputs = round_inputs(make_inputs(plan, 1, 2, 1, 8, seed=1), "float32")
    backend = Backend("pallas", "jax")
    assert_close(backend.run(plan, inputs, "float32", options), plan, inputs, options, "float32")
    lowered = lowering.lower_plan(plan)
    assert (lowered.row_format.chunks, lowered.col_format.chunks) == (2, 2)


def test_sets_without_weight_are_skipped_but_not_their_gradient() -> None:
    """Weights of inactive regions change numbers, not the compiled kernel, and a gate at 0 can still open."""
    masks = np.zeros((2, 32, 256), np.bool_)
    masks[0, :, :128] = True
    masks[1, 3:, 128:] = True
    plan = plan_from_dense(masks, block_q=16, block_kv=128)
    q, k, v = operands(plan)
    weight = np.array(plan.row_weight)
    weight[plan.set_ptr[:-1]] = 0  # the first set of each q tile
    # Poisoned keys and values that only sets without weight read: they must not be touched at all.
    k_bad, v_bad = (x.at[:, :, :128].set(jnp.nan) for x in (k, v))
    function = attend(plan)
    gradient = jax.value_and_grad(squared(function), (0, 1, 2))
    off, gradients = gradient(q, k_bad, v_bad, jnp.asarray(weight))
    assert_same((off, gradients), gradient(q, k, v, jnp.asarray(weight)))
    assert off > 0
    assert np.isnan(function(q, k_bad, v_bad, jnp.asarray(plan.row_weight))).any()

    inputs = make_inputs(plan, 1, 1, 1, 8, seed=0)
    options = Options(override_weight=True)
    rounded = round_inputs(inputs, "float32")
    changed = type(rounded)(**{**vars(rounded), "row_weight": weight.astype(np.float64)})
    assert_close(PALLAS.run(plan, changed, "float32", options), plan, changed, options, "float32")


def test_all_weights_zero() -> None:
    plan = two_sets()
    q, k, v = operands(plan)
    out, gradients = jax.value_and_grad(squared(attend(plan)), (0, 1, 2))(q, k, v, jnp.zeros(plan.row_weight.shape))
    assert out == 0
    assert not any(np.asarray(g).any() for g in gradients)


# -- races --------------------------------------------------------------------------------------------------


def races_found() -> bool:
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call  # the only place where JAX tells

    state = interpret_pallas_call.races
    return bool(state is not None and state.races_found)


@pytest.mark.parametrize("options", [{}, {"activation": "sigmoid", "dropout_p": 0.3}], ids=["weights", "dropout"])
def test_two_cores_do_not_race(options: dict[str, Any]) -> None:
    """Heads are declared independent: two simulated cores share them, forward and backward."""
    plan = two_sets()
    seed = jnp.array([1, 2], jnp.uint32) if options else None
    q, k, v = operands(plan, heads=2)
    arrays = (
        (q, k[:, :1], v[:, :1]) if options else (q, k, v)
    )  # query heads that share a kv head are no two cores' work

    def gradients(interpret: Any) -> Any:
        function = squared(attend(plan, interpret, **options))
        return jax.jit(jax.grad(function, (0, 1, 2, 3)), compiler_options=QUICK)(
            *arrays, jnp.asarray(plan.row_weight), seed
        )

    racing = gradients(pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2))
    assert not races_found()
    for one, other in zip(racing, gradients(True), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


def test_the_detector_sees_a_race() -> None:
    """The control: two cores writing one block."""

    def both_write(out: Any) -> None:
        out[...] = jnp.full_like(out, pl.program_id(0))

    pl.pallas_call(
        both_write,
        out_shape=jax.ShapeDtypeStruct((8, 128), jnp.int32),
        grid=(2,),
        out_specs=pl.BlockSpec((8, 128), lambda i: (0, 0)),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
        interpret=pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2),
    )().block_until_ready()
    assert races_found()


# -- what TPU interpret mode sees: the controls --------------------------------------------------------------


def copy_blocks(index: Callable[[Any], Any], writes: bool) -> Array:
    """Two blocks copied in the mode in which the suite runs the kernels; block ``i`` is read at ``index(i)``."""

    def copy(x: Any, out: Any) -> None:
        if writes:
            out[...] = x[...]

    x = jnp.ones((16, 128))
    block = (8, 128)
    out = pl.pallas_call(
        copy,
        out_shape=x,
        grid=(2,),
        in_specs=[pl.BlockSpec(block, lambda i: (index(i), 0))],
        out_specs=pl.BlockSpec(block, lambda i: (i, 0)),
        interpret=interpret_here(),
    )(x)
    return jax.block_until_ready(out)


def test_reads_out_of_bounds_raise() -> None:
    try:
        with pytest.raises(jax.errors.JaxRuntimeError, match="Out-of-bounds block index"):
            copy_blocks(lambda i: i + 1, writes=True)
    finally:
        pltpu.reset_tpu_interpret_mode_state()


def test_what_is_never_written_is_nan() -> None:
    assert (np.asarray(copy_blocks(lambda i: i, writes=True)) == 1).all()
    assert np.isnan(copy_blocks(lambda i: i, writes=False)).all()


# -- transformations ----------------------------------------------------------------------------------------


def test_vmap() -> None:
    """Over operands, over weights and over seeds, alone and around a gradient."""
    plan = two_sets()
    q, k, v = operands(plan)
    function = attend(plan)
    batch = [jnp.stack([x, 2 * x]) for x in (q, k, v)]
    assert_same(jax.vmap(function)(*batch)[1], function(2 * q, 2 * k, 2 * v))
    gradient = jax.grad(squared(function), (0, 1, 2))
    assert_same([g[0] for g in jax.vmap(gradient)(*batch)], gradient(q, k, v))
    assert_same(jax.vmap(function, (0, None, None))(batch[0], k, v)[1], function(2 * q, k, v))

    weights = jnp.stack([jnp.asarray(plan.row_weight), jnp.zeros(plan.row_weight.shape)])
    by_weight = jax.vmap(lambda w: function(q, k, v, w))(weights)
    assert_same(by_weight, jnp.stack([function(q, k, v, w) for w in weights]))

    seeds = jnp.array([[1, 0], [2, 0]], jnp.uint32)
    dropping = attend(plan, dropout_p=0.4)
    by_seed = jax.vmap(lambda s: dropping(q, k, v, None, s))(seeds)
    assert_same(by_seed, jnp.stack([dropping(q, k, v, None, s) for s in seeds]))


def test_vmap_in_tpu_interpret_mode() -> None:
    plan = two_sets()
    q, k, v = operands(plan)
    batch = [jnp.stack([x, 2 * x]) for x in (q, k, v)]
    out = jax.vmap(lambda q, k, v: block_sparse_attention(q, k, v, plan, backend="pallas", scale=0.3))(*batch)
    assert_same(out[1], attend(plan)(2 * q, 2 * k, 2 * v))


def test_shard_map_over_the_batch() -> None:
    """A caller's own ``shard_map``, also outside of ``jit``: keys are shared, so their gradient is a sum."""
    plan = plan_from_dense(np.tri(20, dtype=bool)[None], block_q=16, block_kv=128)
    q, k, v = operands(plan)
    q = jnp.concatenate([q, 2 * q])
    if len(jax.devices()) < 2:
        pytest.skip("needs two devices")
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("batch",))
    spec = jax.sharding.PartitionSpec

    def run(q: Array, k: Array, v: Array) -> Array:
        return attend(plan)(q, k, v)

    sharded = jax.shard_map(
        run, mesh=mesh, in_specs=(spec("batch"), spec(), spec()), out_specs=spec("batch"), check_vma=False
    )
    expected = jnp.concatenate([run(q[:1], k, v), run(q[1:], k, v)])
    assert_same(sharded(q, k, v), expected)


def test_checkpoint_and_scan() -> None:
    plan = plan_from_dense(np.ones((1, 20, 20), np.bool_), block_q=16, block_kv=128)
    q, k, v = operands(plan)
    function = attend(plan)
    gradient = jax.grad(squared(function), (0, 1, 2))
    rematerialised = jax.grad(jax.checkpoint(squared(function)), (0, 1, 2))
    assert_same(rematerialised(q, k, v), gradient(q, k, v))
    twice, _ = jax.lax.scan(lambda q, _: (function(q, k, v), None), q, None, length=2)
    np.testing.assert_allclose(twice, function(function(q, k, v), k, v), rtol=1e-6)


def test_gradients_of_gradients_are_refused() -> None:
    plan = plan_from_dense(np.ones((1, 16, 16), np.bool_), block_q=16, block_kv=128)
    q, k, v = operands(plan)
    with pytest.raises((TypeError, ValueError, NotImplementedError)):
        jax.hessian(squared(attend(plan)))(q, k, v)


def test_equal_plans_share_one_compilation() -> None:
    """So do other weights: which regions are active is data."""
    jitted: Any = plan_attention
    q, k, v = operands(two_sets())
    first = attend(two_sets(), scale=0.7)(q, k, v)  # a scale of its own: no other test has compiled it
    compiled = jitted._cache_size()
    assert_same(attend(two_sets(), scale=0.7)(q, k, v), first)
    assert jitted._cache_size() == compiled
    weight = jnp.asarray(two_sets().row_weight)
    for factor in (1, 0, 2):
        attend(two_sets(), scale=0.7)(q, k, v, factor * weight)
    assert jitted._cache_size() == compiled + 1


def test_under_x64() -> None:
    """Sessions that turned on 64-bit types: index maps and constants must stay 32-bit."""
    plan = two_sets()
    arrays = operands(plan)
    expected = jax.grad(squared(attend(plan, dropout_p=0.2)))(*arrays, None, jnp.array([1, 2], jnp.uint32))
    with jax.enable_x64(True):
        seed = jnp.array([1, 2], jnp.uint32)
        function = attend(plan, pltpu.InterpretParams(), dropout_p=0.2)
        actual = jax.jit(jax.grad(squared(function)))(*arrays, None, seed)
    assert actual.dtype == jnp.float32
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)


# -- bad input ----------------------------------------------------------------------------------------------


def test_availability_says_what_it_runs_on() -> None:
    available = available_backends()["pallas"]
    assert available.ok
    assert "TPU" in available.reason


def test_reasons() -> None:
    plan = plan_from_dense(np.ones((1, 24, 24), np.bool_), block_q=8, block_kv=64)
    x = jnp.zeros((1, 1, 24, 300), jnp.float16)
    found = backend_reasons("pallas", x, x, x, plan)
    assert found[0] == "dtype must be one of bfloat16, float32, got float16"
    assert found[1] == "head_dim must be at most 256, got 300"
    assert found[2] == "block_q must be a multiple of 16 on a TPU for float16, got 8"
    assert found[3].startswith("block_kv must be a multiple of 128 on a TPU, got 64 (compile the plan with block_q=")
    with pytest.raises(BackendError, match=r"(?s)head_dim must be at most 256, got 300.*block_kv must be a multiple"):
        block_sparse_attention(x, x, x, plan, backend="pallas")


def test_reasons_of_a_plan_too_long_for_scalar_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lowering, "LIST_BYTES", 4)
    plan = plan_from_dense(np.ones((1, 16, 300), np.bool_), block_q=16, block_kv=128)
    q, k, v = operands(plan)
    with pytest.raises(BackendError, match=r"entries of one q tile must fit into 4 bytes of TPU scalar memory"):
        block_sparse_attention(q, k, v, plan, backend="pallas")


def test_dropout_without_a_seed() -> None:
    plan = two_sets()
    with pytest.raises(BackendError, match="dropout needs a seed, got None"):
        attend(plan, dropout_p=0.5)(*operands(plan))


@pytest.mark.parametrize("name", ["several_sets", "window"])
def test_auto_chooses_the_portable_backend_off_tpus(name: str) -> None:
    if jax.default_backend() == "tpu":
        pytest.skip("this is about machines without a TPU")
    plan = BY_NAME[name].plan(16, 128)
    q, k, v = operands(plan)
    jaxpr = str(jax.make_jaxpr(lambda q, k, v: block_sparse_attention(q, k, v, plan))(q, k, v))
    assert "pallas_call" not in jaxpr
