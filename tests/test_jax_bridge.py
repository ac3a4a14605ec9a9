"""A torch dispatcher given a JAX array: the same numbers, parameters followed, residuals accumulated."""

from __future__ import annotations

import copy
import gc
import pickle
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax_cases import LAYOUT, SPEC, WIDTH, canvas, randomized, small

from canvas_engineering import dispatch
from canvas_engineering.attention import CrossAttention
from canvas_engineering.connectivity import CanvasTopology, Connection
from canvas_engineering.errors import BackendError, CanvasError
from canvas_engineering.jax import ATTENTION_REGISTRY, AttentionDispatcher, bridge, register_attention
from canvas_engineering.nn.residuals import ResidualAccumulator as TorchAccumulator
from canvas_engineering.program import CanvasProgram, ConnectionProgram
from canvas_engineering.schema import CanvasSchema


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
    assert leaf.grad is not None
    dx = jax.grad(lambda x: (bridged(x) ** 2).sum())(jnp.asarray(x))
    np.testing.assert_allclose(dx, leaf.grad, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(jax.jit(bridged)(x), found, rtol=1e-5, atol=1e-6)
    bridged.backend = "pallas"  # with tiles that a TPU takes
    np.testing.assert_allclose(bridged(jnp.asarray(x)), found, rtol=1e-5, atol=1e-5)
    bridged.backend = "auto"
    assert bridged(jnp.asarray(x, jnp.bfloat16)).dtype == jnp.bfloat16


def test_the_bridge_follows_the_module(bridged: dispatch.AttentionDispatcher, monkeypatch: Any) -> None:
    x = canvas()
    converted = []
    real = bridge.params_of

    def counted(*args: Any) -> Any:
        converted.append(1)
        return real(*args)

    monkeypatch.setattr(bridge, "params_of", counted)

    def agrees() -> None:
        np.testing.assert_allclose(bridged(jnp.asarray(x)), run_torch(bridged, x), rtol=1e-5, atol=1e-5)

    agrees()
    agrees()
    assert len(converted) == 1
    kept = bridge._bridges[bridged]
    cross: Any = bridged.fn_modules["cross_attention"]
    with torch.no_grad():
        cross.q_proj.weight.mul_(2.0)
    agrees()
    assert len(converted) == 2
    cross.k_proj.bias.data = torch.ones(WIDTH)
    agrees()
    assert len(converted) == 3
    assert bridge._bridges[bridged] is kept  # new numbers compile nothing
    state = bridged.state_dict()
    state["fn_modules.random_fixed.pattern_seed"] = torch.tensor(5)
    bridged.load_state_dict(state)
    agrees()
    bridged.fn_modules["cross_attention"] = replaced = CrossAttention(WIDTH, 2)
    agrees()
    clone = pickle.loads(pickle.dumps(bridged))
    assert clone not in bridge._bridges
    clone(jnp.asarray(x))
    kept_for = len(bridge._bridges)
    del clone
    gc.collect()
    assert len(bridge._bridges) == kept_for - 1
    with torch.inference_mode():
        replaced.k_proj.bias = torch.nn.Parameter(torch.zeros(WIDTH))
    agrees()


def test_the_bridge_accumulates_residuals() -> None:
    program = CanvasProgram(
        CanvasSchema(layout=LAYOUT), connections={("a", "b"): ConnectionProgram(trigger="err.prediction > 0.25")}
    )
    topology = CanvasTopology([Connection("a", "b"), Connection("a", "err"), Connection("b", "err", fn="pooling")])
    accumulator = TorchAccumulator(["err"], SPEC)
    module = randomized(
        dispatch.AttentionDispatcher(topology, LAYOUT, WIDTH, program=program, residual_accumulator=accumulator)
    )
    twin = copy.deepcopy(module)
    for step in range(2):  # the trigger fires in the second
        x = canvas(step)
        np.testing.assert_allclose(module(jnp.asarray(x)), run_torch(twin, x), rtol=2e-5, atol=2e-5)
    assert twin.summaries is not None
    assert twin.summaries["err"]["prediction"] > 0.25
    assert accumulator.summaries()["err"] == pytest.approx(twin.summaries["err"], rel=1e-4)
    assert accumulator._step_counts.tolist() == [4]
    with pytest.raises(CanvasError, match="residual summaries cannot be accumulated under a JAX transformation"):
        jax.jit(module)(jnp.asarray(x))


def test_the_bridge_drops_in_training_only(bridged: dispatch.AttentionDispatcher) -> None:
    x = jnp.asarray(canvas())
    plain = bridged(x)
    functions: Any = bridged.fn_modules.values()
    for function in functions:
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
