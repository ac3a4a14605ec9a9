"""The JAX dispatcher: equal to the torch dispatcher, pure, jittable; parameters to and from torch; the bridge."""

from __future__ import annotations

import copy
import pickle
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from canvas_strategies import layouts, topologies
from hypothesis import given, settings, strategies as st
from jax import Array
from jax.test_util import check_grads

from canvas_engineering import dispatch
from canvas_engineering.canvas import CanvasLayout, RegionSpec
from canvas_engineering.connectivity import CanvasTopology, Connection, TemporalFill
from canvas_engineering.cortex import CortexRegistry, CortexSpec
from canvas_engineering.errors import BackendError, CanvasError
from canvas_engineering.identity import IdentitySpec
from canvas_engineering.jax import (
    ATTENTION_REGISTRY,
    AttentionDispatcher,
    ResidualAccumulator,
    bridge,
    from_torch,
    register_attention,
    residual_state_from_torch,
    to_torch,
)
from canvas_engineering.jax.params import flatten
from canvas_engineering.masks import MaskSpec
from canvas_engineering.nn.residuals import ResidualAccumulator as TorchAccumulator
from canvas_engineering.program import CanvasProgram, ConnectionProgram, RegionProgram
from canvas_engineering.residuals import ResidualSpec
from canvas_engineering.schema import CanvasSchema

WIDTH = 8
#: The same program with less of XLA's optimisation: these tests spend their time in the compiler.
fast_jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

REGIONS = {
    "a": RegionSpec((0, 3, 0, 3)),
    "b": RegionSpec((0, 3, 2, 5)),  # overlaps a
    "err": RegionSpec((0, 3, 5, 7), carrier="residual"),
    "slow": RegionSpec((0, 2, 7, 9), period=2),
    "mem.bank": RegionSpec((0, 3, 9, 11)),
}
LAYOUT = CanvasLayout(T=3, spatial_shape=(12,), d_model=WIDTH, regions=REGIONS)  # column 11 is uncovered
SPEC = ResidualSpec(kinds=("prediction", "surprise"), decay=0.5)


def everything() -> dict[str, Any]:
    """A declaration with all write modes, a trigger, a mask, slots, residuals, offsets and a cortex."""
    topology = CanvasTopology(
        [
            Connection("a", "a"),
            Connection("a", "b", weight=0.5, fn="gated"),
            Connection("b", "a", write_mode="gate"),
            Connection("b", "b", fn="local_attention"),
            Connection("b", "a", fn="random_fixed", weight=2.0),
            Connection("a", "err", fn="cosine_attention"),  # feeds the residuals of err
            Connection("b", "err"),  # likewise
            Connection("b", "slow", t_src=0, t_dst=-1, temporal_fill=TemporalFill.HOLD),
            Connection("slow", "a", fn="pooling"),
            Connection("slow", "b", fn="mixture"),
            Connection("err", "a", operator="write"),  # copy, replaces
            Connection("err", "b", fn="sigmoid_attention"),
            Connection("slow", "slow", fn="linear_attention", write_mode="gate"),
            Connection("mem.bank", "mem.bank", fn="cross_attention"),  # reads its own slots
            Connection("mem.bank", "a", fn="none"),
            Connection("slow", "mem.bank", fn="sparse_attention"),
        ]
    )
    program = CanvasProgram(
        schema=CanvasSchema(layout=LAYOUT),
        regions={
            "mem.bank": RegionProgram(
                identity=IdentitySpec(mode="tracklet", slot_capacity=3, birth_death=True),
            )
        },
        connections={
            ("a", "b"): ConnectionProgram(trigger="err.prediction > 0.25"),
            ("b", "b"): ConnectionProgram(mask_spec=MaskSpec(kind="tile", tile_shape=(2,))),
        },
    )
    registry = CortexRegistry()
    registry.register(CortexSpec("late", local_backend="mamba"))
    registry.assign("slow", "late")
    return {"topology": topology, "layout": LAYOUT, "d_model": WIDTH, "program": program, "cortex_registry": registry}


def randomized(module: dispatch.AttentionDispatcher, seed: int = 0) -> dispatch.AttentionDispatcher:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator))
    return module


def torch_everything(**changes: Any) -> dispatch.AttentionDispatcher:
    accumulator = TorchAccumulator(["err"], SPEC)
    return randomized(dispatch.AttentionDispatcher(**{**everything(), "residual_accumulator": accumulator, **changes}))


def canvas(seed: int = 0, batch: int = 2, layout: CanvasLayout = LAYOUT) -> np.ndarray[Any, Any]:
    shape = (batch, layout.num_positions, layout.d_model)
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


FIRES = {"err": {"prediction": 0.5, "surprise": 0.0}}


@pytest.fixture(scope="module")
def both() -> tuple[dispatch.AttentionDispatcher, AttentionDispatcher, dict[str, Any]]:
    """A torch dispatcher of everything, its JAX form and its parameters; tests must leave them as they are."""
    module = torch_everything()
    return module, AttentionDispatcher.from_torch(module), from_torch(module)


def torch_run(module: dispatch.AttentionDispatcher, x: np.ndarray[Any, Any], dtype: torch.dtype, *args: Any) -> Any:
    """Output, gradient of the input, gradients of the parameters by name, in float64."""
    module = copy.deepcopy(module).to(dtype)
    leaf = torch.from_numpy(x).to(dtype).requires_grad_()
    y = module(leaf, *args)
    (y * torch.linspace(-1, 1, y.numel(), dtype=dtype).view_as(y)).sum().backward()
    grads = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in module.named_parameters()}
    found = {"y": y.detach(), "dx": leaf.grad, **grads}
    return {n: t.double().numpy() for n, t in found.items()}, module


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
    exact, _ = torch_run(module, x, torch.float64, None, FIRES)
    single, _ = torch_run(module, x, torch.float32, None, FIRES)
    found = jax_run(d, params, x, jnp.float32, None, FIRES)
    assert_as_exact_as_torch(found, single, exact, float(np.finfo(np.float32).eps))
    assert not found["fn_modules.mamba.A_log"].any()
    assert found["gates.b->a:cross_attention"] != 0
    for uncovered in (11, 23, 35):
        np.testing.assert_array_equal(found["y"][:, uncovered], x[:, uncovered])


def test_float64_equals_torch_to_the_precision_of_the_weights(both: Any) -> None:
    module, d, params = both
    x = canvas()
    exact, _ = torch_run(module, x, torch.float64, ["a", "slow"])
    with jax.enable_x64(True):
        found = jax_run(d, params, x, np.dtype(np.float64), ["a", "slow"])
    for n, want in exact.items():
        scale = max(1.0, float(np.abs(want).max(initial=0)))
        np.testing.assert_allclose(found[n], want, rtol=0, atol=1e-6 * scale, err_msg=n)


def test_float64_equals_torch_where_no_weight_is_rounded() -> None:
    fns = ["cross_attention", "sigmoid_attention", "perceiver", "rwkv", "hyena"]
    topology = CanvasTopology([Connection(src, "a", fn=fn) for src, fn in zip(REGIONS, fns, strict=True)])
    module = randomized(dispatch.AttentionDispatcher(topology, LAYOUT, WIDTH))
    x = canvas()
    exact, _ = torch_run(module, x, torch.float64)
    single, _ = torch_run(module, x, torch.float32)
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
        found = compiled_with_weights(d)(params, x, d.row_weights(active, summaries))
        np.testing.assert_allclose(found, wanted, rtol=2e-5, atol=2e-5)
        idle = sorted(set(range(36)) - {int(p) for r in active or REGIONS for p in LAYOUT.region_indices(r)})
        np.testing.assert_array_equal(found[:, idle], x[:, idle])
    assert compiled_with_weights(d)._cache_size() == 1


_COMPILED: dict[int, Any] = {}


def compiled_with_weights(d: AttentionDispatcher) -> Any:
    return _COMPILED.setdefault(id(d), fast_jit(lambda p, x, w: d.apply(p, x, weights=w)))


def test_nothing_active_returns_the_input(both: Any) -> None:
    _, d, params = both
    x = jnp.asarray(canvas())
    assert d.apply(params, x, ()) is x


# Transformations


def small(**changes: Any) -> tuple[AttentionDispatcher, dict[str, Any]]:
    topology = CanvasTopology(
        [Connection("a", "b"), Connection("b", "a", weight=0.5), Connection("b", "b", write_mode="gate")]
    )
    d = AttentionDispatcher(**{"topology": topology, "layout": LAYOUT, "d_model": WIDTH, "n_heads": 2, **changes})
    return d, d.init(jax.random.key(0))


def test_vmap_shard_map_and_checkpoint_change_nothing() -> None:
    d, params = small()
    x = jnp.asarray(canvas(0, 4))
    plain = jax.jit(d.apply)(params, x)
    mapped = jax.jit(jax.vmap(d.apply, (None, 0)))(params, x[:, None])[:, 0]
    np.testing.assert_allclose(mapped, plain, rtol=1e-5, atol=1e-6)

    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("batch",))
    spec = jax.sharding.PartitionSpec
    sharded = jax.shard_map(
        d.apply, mesh=mesh, in_specs=(spec(), spec("batch")), out_specs=spec("batch"), check_vma=False
    )
    np.testing.assert_allclose(jax.jit(sharded)(params, x), plain, rtol=1e-5, atol=1e-6)

    def loss(apply: Any) -> Any:
        return jax.jit(jax.grad(lambda params: (apply(params, x) ** 2).sum()))(params)

    for one, two in zip(*map(jax.tree.leaves, (loss(d.apply), loss(jax.checkpoint(d.apply)))), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-5, atol=1e-5)


def test_gradients_agree_with_differences_twice() -> None:
    with jax.enable_x64(True):
        d, params = small()
        params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), params)
        x = jnp.asarray(canvas(0, 1), jnp.float64)
        check_grads(jax.jit(d.apply), (params, x), order=2, modes=["rev"], atol=1e-5, rtol=1e-5)


def test_params_are_checked_and_trainable_leaves_marked(both: Any) -> None:
    _, d, params = both
    x = jnp.asarray(canvas())
    flags = dict(flatten(d.trainable(params)))
    assert [path for path, flag in flags.items() if not flag] == ["fn_modules.mamba.A_log"]
    assert set(flags) == set(dict(flatten(params)))
    missing = {**params, "fn_modules": {n: p for n, p in params["fn_modules"].items() if n != "pooling"}}
    with pytest.raises(CanvasError, match=r"params must have the \d+ entries .* but lack 'fn_modules.pooling.proj.wei"):
        d.apply(missing, x)
    with pytest.raises(CanvasError, match="but have the unknown 'more'"):
        d.apply({**params, "more": x}, x)
    with pytest.raises(CanvasError, match=r"'gates.b->a:cross_attention' must have shape \(\), got \(1,\)"):
        d.apply({**params, "gates": jax.tree.map(lambda g: g[None], params["gates"])}, x)
    with pytest.raises(CanvasError, match=r"params must have one dtype, got float32 .*, bfloat16"):
        d.apply({**params, "gates": jax.tree.map(lambda g: g.astype(jnp.bfloat16), params["gates"])}, x)
    with pytest.raises(CanvasError, match="params must be the nested dictionary that init returns, got list"):
        d.apply([], x)  # type: ignore[arg-type]


def test_bfloat16_runs_and_stays(both: Any) -> None:
    _, d, params = both
    x = jnp.asarray(canvas(), jnp.bfloat16)
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    found = fast_jit(d.apply)(half, x)
    assert found.dtype == jnp.bfloat16
    wanted = compiled_with_weights(d)(params, np.asarray(x, np.float32), d.row_weights())
    error = np.abs(np.asarray(found, np.float32) - wanted)
    assert error.max() < 16 * float(jnp.finfo(jnp.bfloat16).eps) * max(1, np.abs(wanted).max())


@pytest.mark.parametrize("backend", ["reference", "pallas"])
def test_every_jax_backend_gives_the_same(backend: str) -> None:
    d, params = small()
    forced, _ = small(backend=backend, block_q=16, block_kv=128)
    x = jnp.asarray(canvas())
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
    state = d.init_residuals()
    run = fast_jit(lambda p, x, w, s: d.apply(p, x, weights=w, residual_state=s))
    for step, active in enumerate([None, ["a"], ["slow"], None]):
        x = canvas(step)
        with torch.no_grad():
            wanted = module(torch.from_numpy(x), active).numpy()
        # Triggers read what the torch accumulator would have read: the state before this step.
        found, state = run(params, x, d.row_weights(active, d.summaries(state)), state)
        np.testing.assert_allclose(found, wanted, rtol=2e-5, atol=2e-5)
        of_torch = residual_state_from_torch(module.residual_accumulator)
        np.testing.assert_allclose(state.summaries, of_torch.summaries, rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(state.step_counts, of_torch.step_counts)
    assert int(state.step_counts[0]) == 5  # a and b read err; b is not always active, and slow never does
    assert d.summaries(state)["err"]["prediction"] > 0.25  # so the trigger did fire
    y, static = d.apply(params, jnp.asarray(x), ["slow"], residual_state=state)
    np.testing.assert_array_equal(static.summaries, state.summaries)
    assert y.shape == x.shape


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
    assert jax.tree.structure(fresh) == jax.tree.structure(params)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), fresh) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), params
    )
    target = copy.deepcopy(module)
    to_torch(fresh, target)
    for one, two in zip(jax.tree.leaves(from_torch(target)), jax.tree.leaves(fresh), strict=True):
        np.testing.assert_array_equal(one, two)
    seed, other_seed = (m.fn_modules["random_fixed"].seed for m in (module, target))
    assert seed == other_seed
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
    params = d.init(jax.random.key(0), jnp.float32)
    weights = [leaf for path, leaf in flatten(params) if path.endswith("_proj.weight") and leaf.shape == (8, 8)]
    assert len({float(w[0, 0]) for w in weights}) == len(weights) > 20


# The bridge


@pytest.fixture
def bridged() -> dispatch.AttentionDispatcher:
    module = randomized(
        dispatch.AttentionDispatcher(
            CanvasTopology([Connection("a", "b"), Connection("b", "a", fn="random_fixed"), Connection("slow", "a")]),
            LAYOUT,
            WIDTH,
        )
    )
    module.eval()
    return module


def run_torch(module: dispatch.AttentionDispatcher, x: np.ndarray[Any, Any], *args: Any) -> np.ndarray[Any, Any]:
    with torch.no_grad():
        result: np.ndarray[Any, Any] = module(torch.from_numpy(x), *args).numpy()
    return result


def test_a_torch_dispatcher_runs_a_jax_array(bridged: dispatch.AttentionDispatcher) -> None:
    x = canvas()
    found = bridged(jnp.asarray(x))
    assert isinstance(found, jax.Array)
    np.testing.assert_allclose(found, run_torch(bridged, x), rtol=1e-5, atol=1e-5)
    part = bridged(jnp.asarray(x), {"a"})
    np.testing.assert_allclose(part, run_torch(bridged, x, {"a"}), rtol=1e-5, atol=1e-5)
    idle = [p for r in ("b", "slow") for p in LAYOUT.region_indices(r) if p not in LAYOUT.region_indices("a")]
    np.testing.assert_array_equal(part[:, idle], x[:, idle])
    leaf = torch.from_numpy(x).requires_grad_()
    (bridged(leaf) ** 2).sum().backward()
    dx = jax.grad(lambda x: (bridged(x) ** 2).sum())(jnp.asarray(x))
    np.testing.assert_allclose(dx, leaf.grad, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(jax.jit(bridged)(x), found, rtol=1e-5, atol=1e-6)
    assert bridged(jnp.asarray(x, jnp.bfloat16)).dtype == jnp.bfloat16


def test_the_bridge_follows_the_module(bridged: dispatch.AttentionDispatcher, monkeypatch: Any) -> None:
    x = canvas()
    converted = []
    real = bridge.params_of
    monkeypatch.setattr(bridge, "params_of", lambda *args: converted.append(1) or real(*args))

    def agrees() -> None:
        np.testing.assert_allclose(bridged(jnp.asarray(x)), run_torch(bridged, x), rtol=1e-5, atol=1e-5)

    agrees()
    agrees()
    assert len(converted) == 1
    kept = bridge._bridges[bridged]
    with torch.no_grad():
        bridged.fn_modules["cross_attention"].q_proj.weight.mul_(2.0)
    agrees()
    assert len(converted) == 2
    bridged.fn_modules["cross_attention"].k_proj.bias.data = torch.ones(WIDTH)
    agrees()
    assert len(converted) == 3
    assert bridge._bridges[bridged] is kept  # new numbers compile nothing
    state = bridged.state_dict()
    state["fn_modules.random_fixed.pattern_seed"] = torch.tensor(5)
    bridged.load_state_dict(state)
    agrees()
    bridged.fn_modules["cross_attention"] = type(bridged.fn_modules["cross_attention"])(WIDTH, 2)
    agrees()
    clone = pickle.loads(pickle.dumps(bridged))
    assert clone not in bridge._bridges
    del clone
    with torch.inference_mode():
        bridged.fn_modules["cross_attention"].k_proj.bias = torch.nn.Parameter(torch.zeros(WIDTH))
    agrees()


def test_the_bridge_accumulates_residuals(both: Any) -> None:
    module = copy.deepcopy(both[0])
    twin = copy.deepcopy(module)
    for step in range(2):
        x = canvas(step)
        np.testing.assert_allclose(module(jnp.asarray(x)), run_torch(twin, x), rtol=2e-5, atol=2e-5)
    for region, kinds in twin.summaries.items():
        assert module.summaries[region] == pytest.approx(kinds, rel=1e-4)
    assert module.residual_accumulator._step_counts.tolist() == [4]
    with pytest.raises(CanvasError, match="residual summaries cannot be accumulated under a JAX transformation"):
        jax.jit(module)(jnp.asarray(x))


def test_the_bridge_drops_in_training_only(bridged: dispatch.AttentionDispatcher) -> None:
    x = jnp.asarray(canvas())
    plain = bridged(x)
    for function in bridged.fn_modules.values():
        function.dropout.p = 0.5
    np.testing.assert_array_equal(bridged(x), plain)
    bridged.train()
    torch.manual_seed(0)
    one = bridged(x)
    assert np.abs(one - plain).max() > 1e-3
    assert np.abs(bridged(x) - one).max() > 1e-3
    torch.manual_seed(0)
    np.testing.assert_array_equal(bridged(x), one)


def test_the_bridge_refuses_what_it_cannot_do(bridged: dispatch.AttentionDispatcher, monkeypatch: Any) -> None:
    x = jnp.asarray(canvas())
    with pytest.raises(CanvasError, match=r"x must have shape \(B, 36, 8\), got \(2, 35, 8\)"):
        bridged(x[:, 1:])
    with pytest.raises(CanvasError, match="x must have a floating-point dtype, got int32"):
        bridged(x.astype(jnp.int32))
    with pytest.raises(CanvasError, match="active_regions must be region names"):
        bridged(x, ["nobody"])
    bridged.backend = "triton"
    with pytest.raises(BackendError, match="backend 'triton' cannot run this call: needs torch tensors, got JAX arr"):
        bridged(x)
    with pytest.raises(BackendError, match="needs torch tensors, got JAX arrays"):
        small(backend="triton")
    bridged.backend = "auto"

    class Doubled(torch.nn.Module):
        def forward(self, queries: Any, keys: Any, values: Any) -> Any:
            return 2 * queries

    bridged.fn_modules["cross_attention"] = Doubled()
    with pytest.raises(CanvasError, match=r"function 'cross_attention' \(Doubled\) has no JAX form: .*register_att"):
        bridged(x)
    monkeypatch.setitem(ATTENTION_REGISTRY, "cross_attention", None)
    register_attention("cross_attention", lambda key, d, h: {}, lambda params, q, k, v, **_: 2 * q)
    found = AttentionDispatcher.from_torch(bridged)
    assert found.functions["cross_attention"].apply({}, x, x, x).shape == x.shape


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
    options = {"local_attention": {"window_size": 2}, "random_fixed": {"pattern_seed": 1, "dropout": 0.5}}
    one = AttentionDispatcher(topology, LAYOUT, WIDTH, function_options=options)
    two = AttentionDispatcher(topology, LAYOUT, WIDTH)
    pairs = [[c.plan.stats().true_pairs for c in d.schedule.plan_calls] for d in (one, two)]
    assert pairs[0][0] < pairs[1][0]
    assert one.schedule.plan_calls[1].plan.digest != two.schedule.plan_calls[1].plan.digest
    assert [one.functions[n].dropout for n in options] == [0.0, 0.5]
    with pytest.raises(CanvasError, match=r"function_options must name functions of the connections, .*got 'gated'"):
        AttentionDispatcher(topology, LAYOUT, WIDTH, function_options={"gated": {}})


def test_bad_arguments_are_refused(both: Any) -> None:
    _, d, params = both
    x = jnp.asarray(canvas())
    with pytest.raises(CanvasError, match="x must be a JAX array, got list"):
        d.apply(params, [1.0])  # type: ignore[arg-type]
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
