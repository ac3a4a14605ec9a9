"""The JAX dispatcher: equal to torch, pure, jittable; residuals returned; parameters to and from torch."""

from __future__ import annotations

import copy
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from canvas_strategies import layouts, topologies
from hypothesis import given, settings, strategies as st
from jax import Array
from jax_cases import FIRES, LAYOUT, REGIONS, WIDTH, canvas, fast_jit, randomized, small, torch_everything

from canvas_engineering import dispatch
from canvas_engineering.canvas import CanvasLayout
from canvas_engineering.connectivity import CanvasTopology, Connection
from canvas_engineering.errors import BackendError, CanvasError
from canvas_engineering.jax import (
    ATTENTION_REGISTRY,
    AttentionDispatcher,
    ResidualAccumulator,
    from_torch,
    register_attention,
    residual_state_from_torch,
    to_torch,
)
from canvas_engineering.jax.params import flatten
from canvas_engineering.nn.residuals import ResidualAccumulator as TorchAccumulator
from canvas_engineering.residuals import ResidualSpec


@pytest.fixture(scope="module")
def both() -> tuple[dispatch.AttentionDispatcher, AttentionDispatcher, dict[str, Any]]:
    """A torch dispatcher of everything, its JAX form and its parameters; only its residual summaries may change."""
    module = torch_everything()
    return module, AttentionDispatcher.from_torch(module), from_torch(module)


def torch_run(module: dispatch.AttentionDispatcher, x: np.ndarray[Any, Any], dtype: torch.dtype, *args: Any) -> Any:
    """Output, gradient of the input, gradients of the parameters by name, in float64."""
    module = copy.deepcopy(module).to(dtype)
    leaf = torch.from_numpy(x).to(dtype).requires_grad_()
    y = module(leaf, *args)
    (y * torch.linspace(-1, 1, y.numel(), dtype=dtype).view_as(y)).sum().backward()
    grads = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in module.named_parameters()}
    found = {"y": y.detach(), "dx": torch.zeros_like(leaf) if leaf.grad is None else leaf.grad, **grads}
    return {n: t.double().numpy() for n, t in found.items()}


def jax_run(d: AttentionDispatcher, params: Any, x: np.ndarray[Any, Any], dtype: Any, *args: Any, **kw: Any) -> Any:
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), params)

    @fast_jit
    def run(params: Any, x: Array) -> Any:
        y, pull = jax.vjp(lambda params, x: d.apply(params, x, *args, **kw), params, x)
        return y, pull(jnp.linspace(-1, 1, y.size, dtype=y.dtype).reshape(y.shape))

    y, (dp, dx) = run(params, jnp.asarray(x, dtype))
    found = {"y": y, "dx": dx, **dict(flatten(dp))}
    return {n: np.asarray(t, np.float64) for n, t in found.items()}


def assert_as_exact_as_torch(found: Any, single: Any, exact: Any, eps: float) -> None:
    """Within a few times torch's own float32 error; row weights are float32 in every dtype, hence ``eps``."""
    assert set(found) - set(exact) <= {"fn_modules.mamba.A_log"}  # a buffer there
    for n, want in exact.items():
        alike = ["y"] if n == "y" else ["dx"] if n == "dx" else [m for m in exact if m not in ("y", "dx")]
        error = max(np.abs(single[m] - exact[m]).max(initial=0) for m in alike)
        spacing = np.finfo(np.float32).eps * max(np.abs(exact[m]).max(initial=0) for m in alike)
        tolerance = 4 * max(error, spacing) * max(eps / np.finfo(np.float32).eps, 1e-6)
        np.testing.assert_allclose(found[n], want, rtol=0, atol=tolerance, err_msg=n)


# Equal to torch


def test_everything_equals_torch_outputs_and_gradients(both: Any) -> None:
    module, d, params = both
    assert {edge.fn for edge in d.edges} >= {"mamba", "copy", "mixture", "none"}
    x = canvas()
    exact = torch_run(module, x, torch.float64, None, FIRES)
    single = torch_run(module, x, torch.float32, None, FIRES)
    found = jax_run(d, params, x, jnp.float32, None, FIRES)
    assert_as_exact_as_torch(found, single, exact, float(np.finfo(np.float32).eps))
    assert not found["fn_modules.mamba.A_log"].any()
    assert found["gates.b->a:cross_attention"] != 0
    for uncovered in (11, 23, 35):
        np.testing.assert_array_equal(found["y"][:, uncovered], x[:, uncovered])


def test_float64_equals_torch_where_no_weight_is_rounded() -> None:
    fns = ["cross_attention", "sigmoid_attention", "perceiver", "rwkv", "hyena"]
    topology = CanvasTopology([Connection(src, "a", fn=fn) for src, fn in zip(REGIONS, fns, strict=True)])
    module = randomized(dispatch.AttentionDispatcher(topology, LAYOUT, WIDTH))
    x = canvas()
    exact = torch_run(module, x, torch.float64)
    single = torch_run(module, x, torch.float32)
    with jax.enable_x64(True):
        d, params = AttentionDispatcher.from_torch(module), from_torch(module.double())
        assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(np.float64)}
        found = jax_run(d, params, x, np.dtype(np.float64))
    assert_as_exact_as_torch(found, single, exact, float(np.finfo(np.float64).eps))


@given(layouts(), st.data())
@settings(max_examples=6)
def test_random_declarations_equal_torch(layout: CanvasLayout, data: st.DataObject) -> None:
    topology = data.draw(topologies(layout))
    module = dispatch.AttentionDispatcher(topology, layout, layout.d_model, 1)
    d = AttentionDispatcher(topology, layout, layout.d_model, 1)
    assert [c.plan.digest for c in d.schedule.plan_calls] == [c.plan.digest for c in module.schedule.plan_calls]
    active = data.draw(st.none() | st.sets(st.sampled_from(sorted(layout.regions))))
    x = canvas(0, 1, layout)
    with torch.no_grad():
        exact = copy.deepcopy(module).double()(torch.from_numpy(x).double(), active).numpy()
    found = fast_jit(lambda p, x: d.apply(p, x, active))(from_torch(module), x)
    np.testing.assert_allclose(found, exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("active", [None, (), ("a",), ("b", "err"), ("slow", "mem.bank", "a")])
def test_active_regions_and_triggers_equal_torch_without_compiling_again(both: Any, active: Any) -> None:
    module, d, params = both
    x = canvas(1)
    for summaries in ({}, FIRES):
        with torch.no_grad():
            wanted = module(torch.from_numpy(x), active, summaries).numpy()
        found, _ = compiled(d)(params, x, d.row_weights(active, summaries), d.init_residuals())
        np.testing.assert_allclose(found, wanted, rtol=2e-5, atol=2e-5)
        idle = sorted(set(range(36)) - {int(p) for r in active or REGIONS for p in LAYOUT.region_indices(r)})
        np.testing.assert_array_equal(found[:, idle], x[:, idle])
    assert compiled(d)._cache_size() == 1


@functools.cache
def compiled(d: AttentionDispatcher) -> Any:
    """All of a dispatcher's work with its active connections as data."""
    return fast_jit(lambda p, x, w, s: d.apply(p, x, weights=w, residual_state=s))


def test_nothing_active_returns_the_input(both: Any) -> None:
    _, d, params = both
    x = jnp.asarray(canvas())
    assert d.apply(params, x, ()) is x


# Transformations


def test_vmap_shard_map_and_checkpoint_change_nothing() -> None:
    d, params = small()
    x = jnp.asarray(canvas(0, 4))
    plain = fast_jit(d.apply)(params, x)
    mapped = fast_jit(jax.vmap(d.apply, (None, 0)))(params, x[:, None])[:, 0]
    np.testing.assert_allclose(mapped, plain, rtol=1e-5, atol=1e-6)

    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("batch",))
    spec = jax.sharding.PartitionSpec
    sharded = jax.shard_map(
        d.apply, mesh=mesh, in_specs=(spec(), spec("batch")), out_specs=spec("batch"), check_vma=False
    )
    np.testing.assert_allclose(fast_jit(sharded)(params, x), plain, rtol=1e-5, atol=1e-6)

    def loss(apply: Any) -> Any:
        return fast_jit(jax.grad(lambda params: (apply(params, x) ** 2).sum()))(params)

    for one, two in zip(*map(jax.tree.leaves, (loss(d.apply), loss(jax.checkpoint(d.apply)))), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-5, atol=1e-5)


def test_second_derivatives_agree_with_differences() -> None:
    with jax.enable_x64(True):
        d, params = small()
        params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), params)
        x, v = (jnp.asarray(canvas(seed, 1), jnp.float64) for seed in (0, 1))
        gradient = jax.grad(lambda x: (d.apply(params, x) ** 2).sum())
        first = fast_jit(gradient)
        second = fast_jit(jax.grad(lambda x: (gradient(x) * v).sum()))(x)
        step = 1e-5
        differences = (first(x + step * v) - first(x - step * v)) / (2 * step)
        np.testing.assert_allclose(second, differences, rtol=1e-6, atol=1e-7)


def test_params_are_checked_and_trainable_leaves_marked(both: Any) -> None:
    _, d, params = both
    x = jnp.asarray(canvas())
    flags = dict(flatten(d.trainable(params)))
    assert [path for path, flag in flags.items() if not flag] == ["fn_modules.mamba.A_log"]
    assert set(flags) == set(dict(flatten(params)))
    missing = {**params, "fn_modules": {n: p for n, p in params["fn_modules"].items() if n != "pooling"}}
    with pytest.raises(CanvasError, match=r"params must have the \d+ entries .* but lack 'fn_modules.pooling.proj"):
        d.apply(missing, x)
    with pytest.raises(CanvasError, match="but have the unknown 'more'"):
        d.apply({**params, "more": x}, x)
    with pytest.raises(CanvasError, match=r"'gates.b->a:cross_attention' must have shape \(\), got \(1,\)"):
        d.apply({**params, "gates": jax.tree.map(lambda g: g[None], params["gates"])}, x)
    with pytest.raises(CanvasError, match=r"params must have one dtype, got float32 .*, bfloat16"):
        d.apply({**params, "gates": jax.tree.map(lambda g: g.astype(jnp.bfloat16), params["gates"])}, x)
    with pytest.raises(CanvasError, match="params must be the nested dictionary that init returns, got list"):
        d.apply([], x)


def test_bfloat16_runs_and_stays() -> None:
    d, params = small()
    x = jnp.asarray(canvas(), jnp.bfloat16)
    found = fast_jit(d.apply)(jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params), x)
    assert found.dtype == jnp.bfloat16
    wanted = fast_jit(d.apply)(params, x.astype(jnp.float32))
    error = np.abs(np.asarray(found, np.float32) - wanted)
    assert error.max() < 8 * float(jnp.finfo(jnp.bfloat16).eps) * np.abs(wanted).max()


@pytest.mark.parametrize("backend", ["reference", "pallas"])
def test_every_jax_backend_gives_the_same(backend: str) -> None:
    d, params = small()
    forced, _ = small(backend=backend)
    x = jnp.asarray(canvas())
    assert {c.plan.block_kv % 128 == 0 for c in forced.schedule.plan_calls} == {backend == "pallas"}
    np.testing.assert_allclose(forced.apply(params, x), fast_jit(d.apply)(params, x), rtol=1e-5, atol=1e-5)


def test_dropout_needs_a_key_and_follows_it() -> None:
    topology = CanvasTopology([Connection("a", "b"), Connection("b", "err", fn="sparse_attention")])
    d = AttentionDispatcher(topology, LAYOUT, WIDTH, dropout=0.5)
    params = d.init(jax.random.key(0))
    x = jnp.asarray(canvas())
    run = fast_jit(lambda key: d.apply(params, x, train=True, rng=key))
    plain, one, again, other = fast_jit(d.apply)(params, x), *(run(jax.random.key(i)) for i in (1, 1, 2))
    np.testing.assert_array_equal(one, again)
    assert np.abs(one - other)[:, LAYOUT.region_indices("a")].max() > 1e-3
    assert np.abs(one - plain)[:, LAYOUT.region_indices("b")].max() > 1e-3
    with pytest.raises(CanvasError, match=r"rng must be a jax.random key when train=True and dropout > 0, got None"):
        d.apply(params, x, train=True)
    still = AttentionDispatcher(topology, LAYOUT, WIDTH)
    still.apply(params, x, train=True)  # nothing to drop


# Residuals


def test_residuals_are_returned_and_equal_the_torch_accumulator(both: Any) -> None:
    module, d, params = both
    module = copy.deepcopy(module)
    module.residual_accumulator.reset()
    state = d.init_residuals()
    for step, active in enumerate([None, ["a"], ["slow"], None]):
        x = canvas(step)
        with torch.no_grad():
            wanted = module(torch.from_numpy(x), active).numpy()
        # Triggers read what the torch accumulator would have read: the state before this step.
        found, state = compiled(d)(params, x, d.row_weights(active, d.summaries(state)), state)
        np.testing.assert_allclose(found, wanted, rtol=2e-5, atol=2e-5)
        of_torch = residual_state_from_torch(module.residual_accumulator)
        np.testing.assert_allclose(state.summaries, of_torch.summaries, rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(state.step_counts, of_torch.step_counts)
    assert int(state.step_counts[0]) == 5  # a and b read err; b is not always active, and slow never does
    assert d.summaries(state)["err"]["prediction"] > 0.25  # so the trigger did fire
    _, idle = d.apply(params, jnp.asarray(x), ["mem.bank"], residual_state=state)
    np.testing.assert_array_equal(idle.summaries, state.summaries)


@pytest.mark.parametrize("kinds", [("one",), ("one", "two", "three")])
@pytest.mark.parametrize("reduce", ["max_mean", "mean", "max", "l2"])
def test_reductions_equal_torch(reduce: str, kinds: tuple[str, ...]) -> None:
    spec = ResidualSpec(kinds, reduce, 0.75)
    of_torch, mine = TorchAccumulator(["b", "a"], spec), ResidualAccumulator(["b", "a"], spec)
    assert list(mine.region_names) == of_torch.region_names
    state = mine.init()
    for step in range(2):
        error = np.random.default_rng(step).standard_normal((2, 3, 4)).astype(np.float32)
        of_torch.update("b", torch.from_numpy(error))
        state = mine.update(state, "b", jnp.asarray(error))
        state = mine.update(state, "a", jnp.asarray(error), active=False)
    np.testing.assert_allclose(state.summaries, of_torch.summary_tensor(), rtol=1e-6)
    np.testing.assert_array_equal(state.step_counts, [0, 2])
    np.testing.assert_allclose(mine.summaries(state)["b"]["one"], of_torch.summaries()["b"]["one"], rtol=1e-6)
    with pytest.raises(CanvasError, match="unknown region 'c'; this accumulator tracks 'a', 'b'"):
        mine.update(state, "c", jnp.ones(1))
    with pytest.raises(CanvasError, match=r"error of region 'a' must have elements, got shape \(0, 3\)"):
        mine.update(state, "a", jnp.ones((0, 3)))


# Parameters to and from torch


def test_parameters_go_to_torch_and_back(both: Any) -> None:
    module, d, params = both
    fresh = d.init(jax.random.key(3))
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), fresh) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), params
    )
    target = copy.deepcopy(module)
    to_torch(fresh, target)
    for one, two in zip(jax.tree.leaves(from_torch(target)), jax.tree.leaves(fresh), strict=True):
        np.testing.assert_array_equal(one, two)
    seeds = {m.fn_modules["random_fixed"].seed for m in (module, target)}
    assert seeds == {d.functions["random_fixed"].pattern_seed}
    before = copy.deepcopy(target.state_dict())
    bad = copy.deepcopy(fresh)
    bad["gates"]["b->a:cross_attention"] = jnp.ones(2)
    with pytest.raises(CanvasError, match=r"'gates.b->a:cross_attention' must have shape \(\), got \(2,\)"):
        to_torch(bad, target)
    with pytest.raises(CanvasError, match="must have the entries of the torch dispatcher, but lack 'gates"):
        to_torch({n: p for n, p in fresh.items() if n != "gates"}, target)
    with pytest.raises(CanvasError, match=r"but have the unknown 'fn_modules.more'"):
        to_torch({**fresh, "fn_modules": {**fresh["fn_modules"], "more": jnp.ones(1)}}, target)
    assert all(torch.equal(t, before[n]) for n, t in target.state_dict().items())
    to_torch(jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), fresh), target.double())
    half = from_torch(target.bfloat16())
    assert {leaf.dtype for leaf in jax.tree.leaves(half)} == {np.dtype(jnp.bfloat16)}
    with pytest.raises(CanvasError, match=r"must be a canvas_engineering.AttentionDispatcher \(torch\), got Linear"):
        from_torch(torch.nn.Linear(1, 1))  # type: ignore[arg-type]


def test_initial_values_do_not_repeat(both: Any) -> None:
    _, d, _ = both
    params = d.init(jax.random.key(0))
    weights = [leaf for path, leaf in flatten(params) if path.endswith("_proj.weight") and leaf.shape == (8, 8)]
    assert len({float(w[0, 0]) for w in weights}) == len(weights) > 20


# A user's function, options, errors, explanation


def test_a_users_function_runs_in_the_dispatcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ATTENTION_REGISTRY, "scaled", None)
    register_attention(
        "scaled",
        lambda key, d_model, n_heads, factor=1.0: {"scale": factor * jnp.ones(d_model)},
        lambda params, q, k, v, **_: q * params["scale"] + v.mean(1, keepdims=True),
    )
    topology = CanvasTopology([Connection("a", "b", fn="scaled"), Connection("err", "b", fn="scaled")])
    d = AttentionDispatcher(topology, LAYOUT, WIDTH, function_options={"scaled": {"factor": 2.0}})
    params = d.init(jax.random.key(0))
    assert list(dict(flatten(params))) == ["fn_modules.scaled.scale"]
    x = canvas()
    wanted = x.copy()
    for region in ("a", "err"):
        rows = LAYOUT.region_indices(region)
        wanted[:, rows] = 2 * x[:, rows] + x[:, LAYOUT.region_indices("b")].mean(1, keepdims=True)
    np.testing.assert_allclose(d.apply(params, x), wanted, rtol=1e-5, atol=1e-6)


def test_function_options_reach_the_functions() -> None:
    topology = CanvasTopology([Connection("a", "a", fn="local_attention"), Connection("b", "a", fn="random_fixed")])
    options: dict[str, dict[str, Any]] = {
        "local_attention": {"window_size": 2},
        "random_fixed": {"pattern_seed": 1, "dropout": 0.5},
    }
    one = AttentionDispatcher(topology, LAYOUT, WIDTH, function_options=options)
    two = AttentionDispatcher(topology, LAYOUT, WIDTH)
    pairs = [[c.plan.stats().true_pairs for c in d.schedule.plan_calls] for d in (one, two)]
    assert pairs[0][0] < pairs[1][0]
    assert one.schedule.plan_calls[1].plan.digest != two.schedule.plan_calls[1].plan.digest
    assert [one.functions[n].dropout for n in options] == [0.0, 0.5]
    of_torch = dispatch.AttentionDispatcher(topology, LAYOUT, WIDTH)
    random_fixed: Any = of_torch.fn_modules["random_fixed"]
    random_fixed.pattern_seed.fill_(1)
    assert one.schedule.plan_calls[1].plan.digest == of_torch.schedule.plan_calls[1].plan.digest
    with pytest.raises(CanvasError, match=r"function_options must name functions of the connections, .*got 'gated'"):
        AttentionDispatcher(topology, LAYOUT, WIDTH, function_options={"gated": {}})


def test_bad_arguments_are_refused(both: Any) -> None:
    _, d, params = both
    x = jnp.asarray(canvas())
    with pytest.raises(CanvasError, match="x must be a JAX array, got float"):
        d.apply(params, 1.0)
    with pytest.raises(CanvasError, match=r"x must have shape \(B, 36, 8\), got \(36, 8\)"):
        d.apply(params, x[0])
    with pytest.raises(CanvasError, match="x must have a floating-point dtype, got int32"):
        d.apply(params, x.astype(jnp.int32))
    with pytest.raises(CanvasError, match="x must have the parameters' dtype float32, got bfloat16: cast one of them"):
        d.apply(params, x.astype(jnp.bfloat16))
    with pytest.raises(CanvasError, match=r"active_regions must be region names .*got 'nobody'"):
        d.apply(params, x, ["nobody"])
    weights = d.row_weights()
    with pytest.raises(CanvasError, match="weights must be given instead of active_regions and summaries, got both"):
        d.apply(params, x, ["a"], weights=weights)
    other, other_params = small()
    with pytest.raises(CanvasError, match="weights must come from row_weights of the same dispatcher"):
        other.apply(other_params, x, weights=weights)
    with pytest.raises(CanvasError, match="residual_state must be None for a dispatcher without residual_accumulator"):
        other.apply(other_params, x, residual_state=d.init_residuals())
    with pytest.raises(CanvasError, match="init_residuals needs a dispatcher with residual_accumulator"):
        other.init_residuals()
    with pytest.raises(BackendError, match="backend 'triton' cannot run this call: needs torch tensors"):
        small(backend="triton")
    with pytest.raises(CanvasError, match=r"backend must be 'auto' or one of .*, got 'cuda'"):
        small(backend="cuda")
    with pytest.raises(CanvasError, match="residual_accumulator must be a ResidualAccumulator, got int"):
        small(residual_accumulator=3)
    with pytest.raises(CanvasError, match="d_model must be divisible by n_heads, got d_model=8, n_heads=3"):
        small(n_heads=3)


def test_explain_says_what_runs_where(both: Any) -> None:
    _, d, _ = both
    explained = d.explain()
    by_connection = {row.connection: row for row in explained.rows}
    assert by_connection[0].runs_on == "portable"
    assert "auto for float32 JAX arrays on cpu" in by_connection[0].reason
    assert by_connection[5].reason == "its error feeds the residuals of 'err'"
    assert "AttentionDispatcher(16 connections" in repr(d)
