"""The attention functions in JAX: equal to the torch modules, edge cases, precision, the registry."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax import Array

from canvas_engineering.attention import ATTENTION_REGISTRY as TORCH_REGISTRY, create_attention as create_torch
from canvas_engineering.errors import CanvasError
from canvas_engineering.jax import (
    ATTENTION_REGISTRY,
    AttentionFunction,
    base,
    create_attention,
    recurrent,
    register_attention,
)
from canvas_engineering.jax.hyena import average_pool
from canvas_engineering.jax.params import flatten, layer_norm

D, HEADS = 16, 4
NAMES = sorted(ATTENTION_REGISTRY)
OPTIONS: dict[str, dict[str, int]] = {
    "sparse_attention": {"top_k": 3},
    "local_attention": {"window_size": 4},
    "random_fixed": {"n_random": 3},
    "hyena": {"max_len": 32},
}
#: One name per function.
DISTINCT = sorted(set(NAMES) - {"cogvideox", "self_attention"})
#: Those with most to lose in a narrow dtype.
IN_TWO_DTYPES = ("cosine_attention", "linear_attention", "local_attention", "mixture", "mamba", "rwkv", "hyena")
#: One function per place where attention probabilities are dropped.
DROPPED = ("cross_attention", "sigmoid_attention", "sparse_attention", "local_attention", "mixture", "perceiver")
#: How often we may exceed the rounding error of torch in the same dtype; a maximum moves by a rounding or two.
SLACK = 4.0
#: The same program with less of XLA's optimisation: these tests spend their time in the compiler.
fast_jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

Results = dict[str, np.ndarray[Any, Any]]


def nested(flat: dict[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        *parents, name = path.split(".")
        branch = tree
        for parent in parents:
            branch = branch.setdefault(parent, {})
        branch[name] = value
    return tree


def torch_module(name: str) -> torch.nn.Module:
    """A float64 module whose numbers float32 holds and in which every parameter matters."""
    torch.manual_seed(NAMES.index(name))
    module = create_torch(name, D, HEADS, **OPTIONS.get(name, {}))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return module.double()


def function_of(name: str, module: Any) -> AttentionFunction:
    options = dict(OPTIONS.get(name, {}))
    if name == "random_fixed":
        options["pattern_seed"] = module.seed
    return create_attention(name, D, HEADS, **options)


def inputs(n_queries: int, n_keys: int) -> tuple[np.ndarray[Any, Any], ...]:
    stream = np.random.default_rng(n_queries * 100 + n_keys)
    sizes = (n_queries, n_keys, n_keys, n_queries)
    return tuple(stream.standard_normal((2, n, D)).astype(np.float32).astype(np.float64) for n in sizes)


def torch_results(module: torch.nn.Module, shape: tuple[int, int], dtype: torch.dtype) -> Results:
    module.to(dtype).zero_grad()
    q, k, v, g = (torch.from_numpy(x).to(dtype).requires_grad_() for x in inputs(*shape))
    out = module(q, k, v)
    if out.requires_grad:
        out.backward(g)
    grads = {"queries": q, "keys": k, "values": v, **dict(module.named_parameters())}
    return {
        "out": out.detach().double().numpy(),
        **{n: np.zeros(t.shape) if t.grad is None else t.grad.double().numpy().copy() for n, t in grads.items()},
    }


def jax_results(name: str, module: torch.nn.Module, shape: tuple[int, int], dtype: Any) -> Results:
    function = function_of(name, module)
    state = {n: jnp.array(t.numpy(), dtype) for n, t in module.state_dict().items() if n != "pattern_seed"}
    *operands, cotangent = (jnp.array(x, dtype) for x in inputs(*shape))

    @fast_jit
    def run(params: Any, operands: Any, cotangent: Array) -> Any:
        out, pull = jax.vjp(lambda params, operands: function.apply(params, *operands), params, operands)
        return out, pull(cotangent)

    out, (of_params, of_operands) = run(nested(state), operands, cotangent)
    assert out.dtype == dtype
    found = {
        "out": out,
        **dict(zip(("queries", "keys", "values"), of_operands, strict=True)),
        **dict(flatten(of_params)),
    }
    return {n: np.asarray(x, np.float64) for n, x in found.items()}


# Equal to torch


@pytest.mark.parametrize(
    ("name", "shape", "dtype"),
    [*((name, (6, 11), "float64") for name in DISTINCT), *((name, (12, 9), "float32") for name in IN_TWO_DTYPES)],
)
def test_outputs_and_gradients_equal_torch(name: str, shape: tuple[int, int], dtype: str) -> None:
    module = torch_module(name)
    exact = torch_results(module, shape, torch.float64)
    single = torch_results(module, shape, torch.float32)
    with jax.enable_x64(dtype == "float64"):
        found = jax_results(name, module.double(), shape, np.dtype(dtype))
    if name == "mamba":
        assert not found.pop("A_log").any()  # a constant
    assert set(found) == set(exact)
    kinds = {n: min(i, 1) + (i > 3) for i, n in enumerate(exact)}  # output, inputs' gradients, parameters'
    eps = np.finfo(np.float32).eps
    for n, values in found.items():
        # By kind, because a gradient that cancels to 0, as k_proj.bias does, has the error of its summands.
        alike = [m for m in exact if kinds[m] == kinds[n]]
        error = max(np.abs(single[m] - exact[m]).max(initial=0) for m in alike)
        spacing = eps * max(np.abs(exact[m]).max(initial=0) for m in alike)
        tolerance = SLACK * max(error, spacing) * np.finfo(dtype).eps / eps
        np.testing.assert_allclose(values, exact[n], rtol=0, atol=tolerance, err_msg=f"{name} {n}")


def test_the_names_are_those_of_torch() -> None:
    assert set(ATTENTION_REGISTRY) == set(TORCH_REGISTRY)
    for name in ("self_attention", "cogvideox"):
        assert ATTENTION_REGISTRY[name] is ATTENTION_REGISTRY["cross_attention"]


@pytest.mark.parametrize("name", DISTINCT)
def test_initial_parameters_have_torch_names_shapes_and_spread(name: str) -> None:
    torch.manual_seed(0)
    module = create_torch(name, D, HEADS)
    wanted = {n: t for n, t in module.state_dict().items() if n != "pattern_seed"}
    found = dict(flatten(create_attention(name, D, HEADS).init(jax.random.key(0))))
    assert {n: tuple(x.shape) for n, x in found.items()} == {n: tuple(t.shape) for n, t in wanted.items()}
    for n, tensor in wanted.items():
        if tensor.unique().numel() == 1 or n == "A_log":
            np.testing.assert_array_equal(found[n], tensor.numpy(), err_msg=n)
        elif tensor.numel() >= 64:  # random: the same centre and spread
            mean, spread = float(tensor.mean()), float(tensor.std())
            noise = 5 * (2 / tensor.numel()) ** 0.5  # five standard errors of a difference
            assert abs(float(found[n].mean()) - mean) < noise * spread, n
            assert float(found[n].std()) == pytest.approx(spread, rel=noise), n
            if n.endswith("weight"):
                assert float(np.abs(found[n]).max()) <= float(tensor.shape[1] ** -0.5), n


def test_initial_parameters_take_a_dtype() -> None:
    for name in NAMES:
        params = jax.eval_shape(lambda n=name: create_attention(n, D, HEADS).init(jax.random.key(0), jnp.bfloat16))
        assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(params)), name


@pytest.mark.parametrize(
    ("name", "dtype"), [*((name, "bfloat16") for name in IN_TWO_DTYPES), ("rwkv", "float16"), ("gated", "float16")]
)
def test_half_precision_stays_half_and_near(name: str, dtype: str) -> None:
    module = torch_module(name).float()
    function = function_of(name, module)
    state = {n: t.numpy() for n, t in module.state_dict().items() if n != "pattern_seed"}
    rounded = {n: jnp.asarray(x).astype(dtype) for n, x in state.items()}
    q, k, v, _ = (jnp.asarray(x, jnp.float32).astype(dtype) for x in inputs(6, 11))
    out = fast_jit(function.apply)(nested(rounded), q, k, v)
    assert out.dtype == jnp.dtype(dtype)
    with torch.no_grad():
        for n, t in module.named_parameters():
            t.copy_(torch.from_numpy(np.array(rounded[n].astype(jnp.float32))))
        operands = [torch.from_numpy(np.array(x.astype(jnp.float32))) for x in (q, k, v)]
        exact = module(*operands).numpy()
        of_torch = module.to(getattr(torch, dtype))(*(x.to(getattr(torch, dtype)) for x in operands)).float().numpy()
    error = np.abs(np.asarray(out, np.float32) - exact)
    spacing = float(jnp.finfo(dtype).eps) * np.abs(exact).max(initial=0)
    assert error.max() <= SLACK * max(np.abs(of_torch - exact).max(), spacing)


# Edge cases


@pytest.mark.parametrize("name", DISTINCT)
def test_no_keys_and_no_queries_are_harmless(name: str) -> None:
    module = torch_module(name).float()
    function = function_of(name, module)
    params = nested({n: jnp.asarray(t.numpy()) for n, t in module.state_dict().items() if n != "pattern_seed"})
    q, none = jnp.ones((2, 3, D)), jnp.zeros((2, 0, D))
    with torch.no_grad():
        wanted = module(torch.ones(2, 3, D), torch.zeros(2, 0, D), torch.zeros(2, 0, D)).numpy()
    np.testing.assert_allclose(fast_jit(function.apply)(params, q, none, none), wanted, rtol=1e-5, atol=1e-6)
    assert jax.eval_shape(function.apply, params, none, q, q).shape == (2, 0, D)


def test_rows_without_keys_give_the_bias_and_finite_gradients() -> None:
    function = create_attention("local_attention", D, HEADS, window_size=0)
    params = function.init(jax.random.key(0))
    q, k = jnp.ones((1, 9, D)), jnp.ones((1, 3, D))  # only every third query has a key

    @fast_jit
    def run(q: Array, k: Array) -> Any:
        out, pull = jax.vjp(lambda q, k: function.apply(params, q, k, k), q, k)
        return out, pull(jnp.ones_like(out))

    out, grads = run(q, k)
    np.testing.assert_array_equal(out[0, 1], params["out_proj"]["bias"])
    assert np.abs(out[0, 3] - params["out_proj"]["bias"]).max() > 1e-3
    assert all(np.isfinite(grad).all() for grad in grads)


def test_a_zero_vector_has_a_finite_cosine_gradient() -> None:
    function = create_attention("cosine_attention", D, HEADS)
    params = jax.tree.map(jnp.zeros_like, function.init(jax.random.key(0)))
    grads = fast_jit(jax.grad(lambda p: function.apply(p, *[jnp.ones((1, 3, D))] * 3).sum()))(params)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))


def test_equal_logits_at_the_threshold_are_all_kept() -> None:
    function = create_attention("sparse_attention", D, HEADS, top_k=2)
    params = function.init(jax.random.key(1))
    keys = jnp.tile(jax.random.normal(jax.random.key(2), (1, 1, D)), (1, 5, 1))
    values = jax.random.normal(jax.random.key(3), (1, 5, D))
    dense = create_attention("cross_attention", D, HEADS)
    q = jnp.ones((1, 2, D))
    np.testing.assert_allclose(
        function.apply(params, q, keys, values), dense.apply(params, q, keys, values), rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("cross_attention", {}),
        ("sigmoid_attention", {}),
        ("sparse_attention", {"top_k": 3}),
        ("local_attention", {"window_size": 2}),  # dense, with a mask
        ("random_fixed", {"n_random": 1}),  # gathered
    ],
)
def test_long_inputs_in_slices_give_the_same(
    name: str, options: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    function = create_attention(name, D, HEADS, **options)
    params = function.init(jax.random.key(0))
    if name == "random_fixed":
        monkeypatch.setattr("canvas_engineering.jax.patterned.GATHER_COST", 1)
    q, k, v, g = (jnp.asarray(x, jnp.float32) for x in inputs(11, 7))

    def run(q: Array, k: Array, v: Array) -> Any:
        out, pull = jax.vjp(lambda *operands: function.apply(params, *operands), q, k, v)
        return out, *pull(g)

    whole = fast_jit(run)(q, k, v)
    monkeypatch.setattr(base, "CHUNK_ELEMENTS", 4 * 2 * HEADS * 7)  # four rows at once, three slices
    for found, wanted in zip(fast_jit(lambda *x: run(*x))(q, k, v), whole, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)


def test_long_scans_in_segments_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = np.random.default_rng(0)
    x, b, c = (jnp.asarray(stream.standard_normal((2, 11, n)), jnp.float32) for n in (3, 4, 4))
    dt, a = jnp.abs(x) + 0.1, -jnp.asarray(stream.uniform(0.1, 2, (3, 4)), jnp.float32)

    def run(*operands: Array) -> Any:
        y, pull = jax.vjp(recurrent.selective_scan, *operands)
        return y, *pull(jnp.ones_like(y))

    whole = fast_jit(run)(x, dt, a, b, c)
    state, rows = np.zeros((2, 3, 4)), []
    for t in range(11):  # the definition
        state = np.exp(dt[:, t, :, None] * a) * state + (dt[:, t] * x[:, t])[..., None] * b[:, t, None]
        rows.append((state * np.asarray(c[:, t, None])).sum(-1))
    np.testing.assert_allclose(whole[0], np.stack(rows, 1), rtol=1e-5, atol=1e-5)
    monkeypatch.setattr(recurrent, "SEGMENT_ELEMENTS", 4 * 2 * 3 * 4)  # four steps at once, three segments
    for found, wanted in zip(fast_jit(lambda *x: run(*x))(x, dt, a, b, c), whole, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("n_in", "n_out"), [(9, 4), (4, 9), (12, 5), (7, 7), (1, 3)])
def test_average_pool_is_torch_adaptive_pooling(n_in: int, n_out: int) -> None:
    x = np.random.default_rng(0).standard_normal((2, n_in, 3)).astype(np.float32)
    wanted = torch.nn.functional.adaptive_avg_pool1d(torch.from_numpy(x).transpose(1, 2), n_out).transpose(1, 2)
    np.testing.assert_allclose(average_pool(jnp.asarray(x), n_out), wanted, rtol=1e-6, atol=1e-6)


def test_layer_norm_is_torch_layer_norm() -> None:
    x = np.random.default_rng(0).standard_normal((5, D)).astype(np.float32) * 3 + 1
    wanted = torch.nn.functional.layer_norm(torch.from_numpy(x), (D,))
    found = layer_norm({"weight": jnp.ones(D), "bias": jnp.zeros(D)}, jnp.asarray(x))
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)


# Dropout


@pytest.mark.parametrize("name", DROPPED)
def test_dropout_needs_a_key_and_follows_it(name: str) -> None:
    function = create_attention(name, D, HEADS, dropout=0.5)
    params = function.init(jax.random.key(0))
    q, k, v, _ = (jnp.asarray(x, jnp.float32) for x in inputs(6, 11))
    plain = fast_jit(create_attention(name, D, HEADS).apply)(params, q, k, v)
    np.testing.assert_array_equal(fast_jit(function.apply)(params, q, k, v), plain)
    dropped = fast_jit(lambda key: function.apply(params, q, k, v, rng=key))
    one, again, other = (dropped(jax.random.key(i)) for i in (1, 1, 2))
    np.testing.assert_array_equal(one, again)
    assert np.abs(one - plain).max() > 1e-3
    assert np.abs(one - other).max() > 1e-3


def test_dropout_keeps_the_expectation() -> None:
    function = create_attention("cross_attention", D, 1, dropout=0.25)
    params = function.init(jax.random.key(0))
    q, k, v, _ = (jnp.asarray(x, jnp.float32) for x in inputs(6, 11))
    keys = jax.random.split(jax.random.key(1), 500)
    samples = fast_jit(jax.vmap(lambda key: function.apply(params, q, k, v, rng=key)))(keys)
    error = np.abs(samples.mean(0) - function.apply(params, q, k, v))
    assert (error <= 5 * samples.std(0) / np.sqrt(500) + 1e-6).all()


# Arguments and registration


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("local_attention", {"window_size": -1}, "window_size must be at least 0, got window_size=-1"),
        ("random_fixed", {"n_random": 0}, "n_random must be at least 1, got n_random=0"),
        ("sparse_attention", {"top_k": 0}, "top_k must be at least 1, got top_k=0"),
        ("mixture", {"n_experts": 0}, "n_experts must be at least 1, got n_experts=0"),
        ("mixture", {"top_k_experts": 0}, "top_k_experts must be at least 1, got top_k_experts=0"),
        ("perceiver", {"n_latents": 0}, "n_latents must be at least 1, got n_latents=0"),
        ("mamba", {"state_size": 0}, "state_size must be at least 1, got state_size=0"),
        ("mamba", {"dt_rank": -1}, "dt_rank must be at least 0, got dt_rank=-1"),
        ("hyena", {"order": 0}, "order must be at least 1, got order=0"),
        ("hyena", {"max_len": 1}, "max_len must be at least 2, got max_len=1"),
        ("hyena", {"top_k": 1}, "options of 'hyena' must be among: order, max_len; got 'top_k'"),
        ("copy", {"top_k": 1}, "options of 'copy' must be among: none; got 'top_k'"),
        ("crossattention", {}, "unknown attention function 'crossattention'; known: .*cross_attention.*rwkv"),
        ("rwkv", {"n_heads": 3}, "d_model must be divisible by n_heads, got d_model=16, n_heads=3"),
        ("perceiver", {"n_heads": 3}, "d_model must be divisible by n_heads, got d_model=16, n_heads=3"),
        ("gated", {"n_heads": 0}, "n_heads must be at least 1, got n_heads=0"),
        ("gated", {"dropout": 1.0}, r"dropout must be in \[0, 1\), got dropout=1.0"),
    ],
)
def test_bad_arguments_are_refused(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(CanvasError, match=message):
        create_attention(name, D, **options)


def test_inputs_of_wrong_shape_are_refused() -> None:
    function = create_attention("copy", D)
    x, y = jnp.zeros((2, 3, D)), jnp.zeros((2, 5, D))
    with pytest.raises(CanvasError, match=rf"queries must have shape \(B, N, {D}\), got \(2, 3, 8\)"):
        function.apply({}, x[..., :8], y, y)
    with pytest.raises(CanvasError, match=r"keys and values in length.*keys \(2, 5, 16\), values \(2, 4, 16\)"):
        function.apply({}, x, y, y[:, :4])
    with pytest.raises(CanvasError, match=r"max_len=4, got 5 queries \(length 8\)"):
        create_attention("hyena", D, max_len=4).apply({}, y, x, x)


def test_a_registered_pair_is_created_with_its_options(monkeypatch: pytest.MonkeyPatch) -> None:
    def init(key: Array, d_model: int, n_heads: int, factor: float = 1.0) -> dict[str, Any]:
        return {"scale": jnp.full(d_model, factor)}

    def apply(params: Any, q: Array, k: Array, v: Array, *, n_heads: int, dropout: float, rng: Any, **_: Any) -> Array:
        assert (n_heads, dropout, rng is None) in ((2, 0.0, True), (2, 0.5, False))
        return q * params["scale"]

    monkeypatch.setitem(ATTENTION_REGISTRY, "scaled", ATTENTION_REGISTRY["none"])  # undoes the registration afterwards
    register_attention("scaled", init, apply)
    function = create_attention("scaled", D, 2, 0.5, factor=3.0)
    params = function.init(jax.random.key(0), jnp.bfloat16)
    assert params["scale"].dtype == jnp.bfloat16
    x = jnp.ones((1, 2, D), jnp.bfloat16)
    np.testing.assert_array_equal(function.apply(params, x, x, x), 3 * x)
    function.apply(params, x, x, x, rng=jax.random.key(0))
    assert not function.planned

    register_attention("scaled", init, lambda params, q, *_, **__: q[:, :1])
    with pytest.raises(CanvasError, match=r"apply must return the shape of queries, \(1, 2, 16\), got \(1, 1, 16\)"):
        create_attention("scaled", D).apply(params, x, x, x)


def test_bad_registrations_are_refused() -> None:
    with pytest.raises(CanvasError, match=r"name must be a non-empty string without dots, got name='my.own'"):
        register_attention("my.own", dict, jnp.add)
    with pytest.raises(CanvasError, match="apply must be a function, got None"):
        register_attention("mine", dict, None)  # type: ignore[arg-type]
