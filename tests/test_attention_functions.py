"""The attention functions by themselves: definitions, edge cases, gradients, precision, memory, random patterns."""

from __future__ import annotations

import copy
import io
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from canvas_engineering.attention import (
    ATTENTION_REGISTRY,
    CrossAttention,
    GatedAttention,
    LocalAttention,
    MixtureAttention,
    RandomFixedAttention,
    SigmoidAttention,
    SparseAttention,
    base,
    create_attention,
)
from canvas_engineering.attention.key_pattern import KeyIndices, KeyPattern, KeyRanges

NAMES = sorted(ATTENTION_REGISTRY)
WITH_PROBABILITIES = sorted(set(NAMES) - {"pooling", "copy", "none", "rwkv", "hyena", "linear_attention"})
PLAN = ("cross_attention", "self_attention", "cogvideox", "gated", "cosine_attention", "sigmoid_attention",
        "local_attention", "random_fixed", "mixture")  # fmt: skip
D = 16


def make(name: str, seed: int = 0, **arguments: Any) -> nn.Module:
    """A float64 module in which every parameter matters."""
    torch.manual_seed(seed)
    if name == "hyena":
        arguments = {"max_len": 64, **arguments}
    module = create_attention(name, D, 4, **arguments).double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return module


def qkv(n_queries: int, n_keys: int, batch: int = 2, seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    stream = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(batch, n, D, generator=stream, dtype=torch.float64) for n in (n_queries, n_keys, n_keys))
    return q, k, v


# The definitions that fixtures of 0.5.0 do not reach


def dense(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, scale: float, activation: str = "softmax") -> Tensor:
    """The plain definition over an (N, M) mask; rows without keys are 0."""
    logits = (q @ k.transpose(-2, -1)) * scale
    if activation == "sigmoid":
        return (logits.sigmoid() * allowed) @ v
    weights = logits.masked_fill(~allowed, float("-inf")).softmax(-1)
    return weights.masked_fill(~allowed, 0.0) @ v  # a row without keys is NaN before the fill, 0 after


def to_mask(pattern: KeyPattern | None, n_queries: int, n_keys: int) -> Tensor:
    mask = np.zeros((n_queries, n_keys), dtype=bool)
    match pattern:
        case None:
            mask[:] = True
        case KeyRanges(lo, hi):
            assert lo.dtype == hi.dtype == np.int64
            for row in range(n_queries):
                mask[row, lo[row] : hi[row]] = True
        case KeyIndices(index):
            assert index.dtype == np.int64
            mask[np.arange(n_queries)[:, None], index] = True
    return torch.from_numpy(mask)


@pytest.mark.parametrize(("n_queries", "n_keys"), [(6, 6), (5, 9), (70, 70), (9, 70), (70, 9), (150, 100), (90, 500)])
@pytest.mark.parametrize("name", sorted(set(PLAN) - {"mixture"}))
def test_split_methods_and_a_dense_kernel_equal_forward(name: str, n_queries: int, n_keys: int) -> None:
    arguments = {"local_attention": {"window_size": 5}, "random_fixed": {"n_random": 3}}.get(name, {})
    module: Any = make(name, **arguments)
    q, k, v = qkv(n_queries, n_keys)
    for x in (q, k, v):
        x.requires_grad_()
    heads = module.heads_q(q)
    keys, values = module.heads_kv(k, v)
    assert heads.shape == (2, 4, n_queries, 4)
    assert keys.shape == values.shape == (2, 4, n_keys, 4)
    mask = to_mask(module.key_pattern(n_queries, n_keys, 0), n_queries, n_keys)
    out = dense(heads, keys, values, mask, module.kernel_scale, module.activation)
    by_parts, whole = module.finish(out), module(q, k, v)
    torch.testing.assert_close(by_parts, whole)
    if name != "gated":
        torch.testing.assert_close(module.out_proj(module.merge(out)), whole)
    weight = torch.randn_like(whole)
    for a, b in zip(
        torch.autograd.grad((by_parts * weight).sum(), (q, k, v)),
        torch.autograd.grad((whole * weight).sum(), (q, k, v)),
        strict=True,
    ):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(module.heads_kv(k), module.heads_kv(k, k))


def test_gate_scales_the_output() -> None:
    module = GatedAttention(D).double()
    q, k, v = qkv(3, 4)
    torch.testing.assert_close(module(q, k, v), 0.5 * module.cross_attn(q, k, v))
    assert module.out_proj is module.cross_attn.out_proj


def test_cosine_kernel_needs_no_scale() -> None:
    module: Any = make("cosine_attention")
    q, k = module.heads_q(qkv(3, 4)[0]), module.heads_kv(qkv(3, 4)[1])[0]
    torch.testing.assert_close(q.norm(dim=-1), module.temperature.detach().abs().expand(2, 4, 3))
    torch.testing.assert_close(k.norm(dim=-1), torch.ones(2, 4, 4, dtype=torch.float64))
    assert module.kernel_scale == 1.0


@pytest.mark.parametrize("n_keys", [0, 1, 2, 3, 4, 7, 8, 30])
def test_mixture_is_the_weighted_sum_of_its_experts(n_keys: int) -> None:
    module = MixtureAttention(D).double()
    q, k, v = qkv(5, n_keys)
    ranges = module.expert_ranges(n_keys)
    size = max(1, n_keys // 4)
    assert [stop - start for start, stop in ranges[:3]] == [min(size, max(0, n_keys - e * size)) for e in range(3)]
    assert sorted(j for start, stop in ranges for j in range(start, stop)) == list(range(n_keys))
    weights = module.mixing_weights(q)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 5, dtype=torch.float64))
    assert (weights > 0).sum(-1).eq(2).all()
    logits = module.router(q)
    assert (
        logits.masked_fill(weights == 0, float("inf")).amin(-1)
        >= logits.masked_fill(weights > 0, float("-inf")).amax(-1)
    ).all()
    outputs = [e(q, k[:, a:b], v[:, a:b]) for e, (a, b) in zip(module.experts, ranges, strict=True)]
    expected = sum(weights[..., e, None] * out for e, out in enumerate(outputs))
    torch.testing.assert_close(module.combine(outputs, weights), expected)
    torch.testing.assert_close(module(q, k, v), expected)


def test_sparse_attention_keeps_ties_at_the_threshold() -> None:
    module = SparseAttention(4, 1, top_k=2).double()
    q = torch.zeros(1, 1, 1, 4, dtype=torch.float64)  # all logits are equal, so all are kept
    v = torch.randn(1, 1, 5, 4, dtype=torch.float64)
    torch.testing.assert_close(module.attend(q, v, v), v.mean(2, keepdim=True))
    k = torch.tensor([3.0, 2.0, 2.0, 1.0, 0.0], dtype=torch.float64).view(1, 1, 5, 1).expand(1, 1, 5, 4)
    q = torch.ones(1, 1, 1, 4, dtype=torch.float64)
    expected = torch.softmax(torch.tensor([6.0, 4.0, 4.0], dtype=torch.float64), 0) @ v[0, 0, :3]
    torch.testing.assert_close(module.attend(q, k, v)[0, 0, 0], expected)


@pytest.mark.parametrize(("n_queries", "length"), [(1, 2), (2, 2), (3, 4), (4, 4), (8, 8), (9, 16)])
def test_hyena_convolves_circularly_over_the_next_power_of_two(n_queries: int, length: int) -> None:
    module: Any = make("hyena")
    values = qkv(n_queries, n_queries)[2]
    v, *streams = module.in_proj(values).unflatten(-1, (3, D)).unbind(2)
    for stream, gate, filter_params in zip(streams, module.gates, module.filter_params, strict=True):
        signal = torch.nn.functional.pad(v * torch.sigmoid(gate(stream)), (0, 0, 0, length - n_queries))
        response = torch.complex(*filter_params[:, : length // 2 + 1].unbind(-1))
        impulse = torch.fft.irfft(response, n=length)  # (D, length)
        v = torch.stack(
            [sum(impulse[:, (t - s) % length] * signal[:, s] for s in range(length)) for t in range(n_queries)], dim=1
        )
    torch.testing.assert_close(module(values, values, values), module.out_proj(v))


def test_copy_pads_with_zeros_and_cuts() -> None:
    module = create_attention("copy", D)
    q, _, v = qkv(5, 3)
    torch.testing.assert_close(module(q, v, v)[:, :3], v)
    assert not module(q, v, v)[:, 3:].any()
    torch.testing.assert_close(module(q[:, :2], v, v), v[:, :2])


# Edge cases that hold for every function


@pytest.mark.parametrize("name", NAMES)
def test_batch_elements_do_not_see_each_other(name: str) -> None:
    module = make(name)
    q, k, v = qkv(6, 9, batch=3)
    together = module(q, k, v)
    alone = torch.cat([module(q[i : i + 1], k[i : i + 1], v[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(together, alone, rtol=1e-13, atol=1e-13)
    spoiled = [x.clone() for x in (q, k, v)]
    for x in spoiled:
        x[1] = float("nan")
    torch.testing.assert_close(module(*spoiled)[[0, 2]], together[[0, 2]], rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("name", NAMES)
def test_no_keys_give_zero_before_the_output_projection(name: str) -> None:
    module: Any = make(name)
    q, k, v = (x.requires_grad_() for x in qkv(5, 0))
    out = module(q, k, v)
    assert out.shape == (2, 5, D)
    match name:
        case "copy" | "none":
            expected = torch.zeros(D)
        case "pooling":
            expected = module.proj.bias
        case "gated":
            expected = torch.sigmoid(module.gate) * module.out_proj.bias
        case "mixture":
            weights = module.mixing_weights(q)
            expected = weights @ torch.stack([e.out_proj.bias for e in module.experts])
        case "perceiver":
            nothing = module.compress.out_proj.bias.expand(2, 8, D)
            expected = module.readout(q, nothing, nothing)
        case _:
            expected = module.out_proj.bias
    torch.testing.assert_close(out, expected.expand_as(out).to(out.dtype))
    if out.requires_grad:
        out.sum().backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in (q, k, v, *module.parameters()))
        if name not in ("perceiver", "mixture") and q.grad is not None:
            assert not q.grad.any()


@pytest.mark.parametrize("name", NAMES)
def test_no_queries_and_no_batch_give_empty_outputs(name: str) -> None:
    module = make(name)
    q, k, v = qkv(0, 4)
    assert module(q, k, v).shape == (2, 0, D)
    q, k, v = qkv(3, 4, batch=0)
    assert module(q, k, v).shape == (0, 3, D)


@pytest.mark.parametrize("n_queries", [40, 200])
def test_rows_whose_window_is_empty_are_zero_with_zero_gradients(n_queries: int) -> None:
    module = LocalAttention(D, window_size=3).double()
    n_keys = n_queries // 10
    pattern = module.key_pattern(n_queries, n_keys)
    empty = torch.from_numpy(pattern.lo == pattern.hi)
    assert 0 < empty.sum() < n_queries
    q, k, v = (x.requires_grad_() for x in qkv(n_queries, n_keys))
    out = module.attend(module.heads_q(q), *module.heads_kv(k, v))
    assert not out[:, :, empty].any()
    assert out.isfinite().all()
    module.finish(out).square().sum().backward()
    assert q.grad is not None
    assert k.grad is not None
    assert not q.grad[:, empty].any()
    assert q.grad.isfinite().all()
    assert k.grad.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_gradients_equal_finite_differences(name: str) -> None:
    arguments = {
        "sparse_attention": {"top_k": 2},
        "local_attention": {"window_size": 3},
        "random_fixed": {"n_random": 2},
    }
    module = make(name, **{"mamba": {"state_size": 3}, "hyena": {"max_len": 8}, **arguments}.get(name, {}))
    q, k, v = (x[..., :].requires_grad_() for x in qkv(4, 5, batch=1))
    if name == "none":
        assert not module(q, k, v).any()
        return
    parameters = tuple(module.parameters())

    def forward(*_: Tensor) -> Tensor:
        return module(q, k, v)

    inputs = tuple(x for x in (q, k, v) if torch.autograd.grad(forward().sum(), x, allow_unused=True)[0] is not None)
    torch.autograd.gradcheck(forward, (*inputs, *parameters), fast_mode=True)


# Dropout


@pytest.mark.parametrize("name", NAMES)
def test_dropout_acts_in_training_only(name: str) -> None:
    module = make(name, dropout=0.5)
    q, k, v = qkv(24, 30)
    without = make(name, dropout=0.0)
    without.load_state_dict(module.state_dict())
    module.eval()
    torch.testing.assert_close(module(q, k, v), without(q, k, v), rtol=0, atol=0)
    module.train()
    torch.manual_seed(3)
    first = module(q, k, v)
    torch.manual_seed(3)
    torch.testing.assert_close(module(q, k, v), first, rtol=0, atol=0)
    changed = not torch.allclose(first, without(q, k, v))
    assert changed == (name in WITH_PROBABILITIES)


@pytest.mark.parametrize("name", ["cross_attention", "sparse_attention", "sigmoid_attention", "random_fixed"])
def test_dropout_keeps_the_expected_output(name: str) -> None:
    torch.manual_seed(0)
    module: Any = make(name, dropout=0.25)
    q, k, v = (x.expand(4000, -1, -1) for x in qkv(1, 9, batch=1))
    with torch.no_grad():
        samples = module.attend(module.heads_q(q), *module.heads_kv(k, v))
        expected = module.eval().attend(module.heads_q(q[:1]), *module.heads_kv(k[:1], v[:1]))
    spread = samples.std(0) / 4000**0.5
    assert ((samples.mean(0) - expected[0]).abs() < 6 * spread + 1e-12).all()


# Precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", NAMES)
def test_half_precision_stays_close(name: str, dtype: torch.dtype) -> None:
    exact = make(name)
    with torch.no_grad():  # weights and inputs that half precision holds exactly
        for parameter in exact.parameters():
            parameter.copy_(parameter.to(dtype))
    inputs = [x.to(dtype) for x in qkv(12, 20)]
    half = make(name)
    half.load_state_dict(exact.state_dict())
    half.to(dtype)
    if name == "mamba":  # its decay rates are a buffer, which half precision rounds
        exact.load_state_dict(half.state_dict())
    found = half(*inputs)
    assert found.dtype == dtype
    expected = exact(*(x.double() for x in inputs))
    if name in ("sparse_attention", "mixture"):  # a choice among near ties may fall differently in some rows
        agrees = ((found.double() - expected).abs() < 64 * torch.finfo(dtype).eps * expected.abs().max()).all(-1)
        assert agrees.double().mean() > 0.7
        return
    # About ten rounded operations lie between input and output, none of which amplifies errors by more than the
    # logits' spread.
    tolerance = 32 * torch.finfo(dtype).eps * float(expected.detach().abs().max())
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", ["linear_attention", "rwkv", "pooling"])
def test_long_half_precision_sums_do_not_overflow(name: str) -> None:
    module = create_attention(name, D, 2).to(torch.float16)
    x = torch.full((1, 70_000, D), 3.0, dtype=torch.float16)
    assert module(x[:, :8] if name != "rwkv" else x, x, x).isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_autocast_runs_forward_and_backward(name: str) -> None:
    module = make(name).float()
    inputs = [x.float().requires_grad_() for x in qkv(8, 11)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = module(*inputs)
    assert out.isfinite().all()
    if out.requires_grad:
        out.float().sum().backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in module.parameters())


# Memory: slices of the queries


@pytest.mark.parametrize("name", ["sparse_attention", "sigmoid_attention", "random_fixed"])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_slices_of_the_queries_change_nothing(name: str, dropout: float, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = {"n_random": 2} if name == "random_fixed" else {}
    module = make(name, dropout=dropout, **arguments).train()
    q, k, v = (x.requires_grad_() for x in qkv(50, 200))
    weight = torch.randn(2, 50, D, dtype=torch.float64)

    def run() -> list[Tensor]:
        torch.manual_seed(5)
        out = module(q, k, v)
        return [out, *torch.autograd.grad((out * weight).sum(), (q, k, v, *module.parameters()))]

    whole = run()
    monkeypatch.setattr(base, "CHUNK_ELEMENTS", 7 * 2 * 4 * 200)
    sliced = run()
    if dropout:  # other random numbers, but the backward pass must see those of the forward pass
        monkeypatch.setattr(base, "CHUNK_ELEMENTS", 1)
        again = run()
        torch.testing.assert_close(run(), again)
        direction = torch.randn_like(v)
        torch.manual_seed(5)
        plus = (module(q, k, v + 1e-6 * direction) * weight).sum()
        torch.manual_seed(5)
        minus = (module(q, k, v - 1e-6 * direction) * weight).sum()
        torch.testing.assert_close((plus - minus) / 2e-6, (again[3] * direction).sum(), rtol=1e-6, atol=1e-6)
    else:
        torch.testing.assert_close(sliced, whole)


@pytest.mark.parametrize("name", ["local_attention", "random_fixed"])
def test_long_inputs_need_no_dense_mask(name: str) -> None:
    module: Any = create_attention(name, 4, 1)
    x = torch.randn(1, 20_000, 4)
    with torch.no_grad():
        assert module(x, x, x).isfinite().all()
    (lowered,) = module._lowered.values()
    assert sum(t.numel() for t in lowered) < 100 * 20_000


# Random patterns


def test_random_pattern_follows_torchs_seed_and_is_saved() -> None:
    torch.manual_seed(11)
    first = RandomFixedAttention(D)
    second = RandomFixedAttention(D)
    torch.manual_seed(11)
    again = RandomFixedAttention(D)
    assert first.seed == again.seed != second.seed
    index = first.key_pattern(20, 50).index
    np.testing.assert_array_equal(index, again.key_pattern(20, 50).index)
    assert (index != second.key_pattern(20, 50).index).any()

    stored = io.BytesIO()
    torch.save(first.state_dict(), stored)
    stored.seek(0)
    second.key_pattern(20, 50)
    second.load_state_dict(torch.load(stored, weights_only=True), strict=True)
    assert second.seed == first.seed
    np.testing.assert_array_equal(index, second.key_pattern(20, 50).index)
    np.testing.assert_array_equal(index, copy.deepcopy(first).key_pattern(20, 50).index)
    x = torch.randn(1, 50, D)
    torch.testing.assert_close(second(x, x, x), first(x, x, x), rtol=0, atol=0)


def test_a_checkpoint_without_a_pattern_keeps_the_modules_own() -> None:
    module = RandomFixedAttention(D)
    seed = module.seed
    state = {key: value for key, value in RandomFixedAttention(D).state_dict().items() if key != "pattern_seed"}
    nn.Sequential(module).load_state_dict({f"0.{key}": value for key, value in state.items()}, strict=True)
    assert module.seed == seed
    torch.testing.assert_close(module.q_proj.weight.detach(), state["q_proj.weight"], rtol=0, atol=0)


def test_random_pattern_does_not_change_between_shapes_or_dtypes() -> None:
    module = RandomFixedAttention(D, n_random=3).double()
    q, k, v = qkv(20, 300)
    first = module(q, k, v)
    module(q[:, :7], k, v)
    module.pattern_seed.add_(0)  # a new version of the same seed
    torch.testing.assert_close(module(q, k, v), first, rtol=0, atol=0)
    module.pattern_seed.add_(1)
    assert not torch.allclose(module(q, k, v), first)


def test_a_module_made_in_inference_mode_keeps_its_pattern() -> None:
    with torch.inference_mode():
        module = RandomFixedAttention(D, n_random=2)
        x = torch.randn(1, 40, D)
        torch.testing.assert_close(module(x, x, x), module(x, x, x), rtol=0, atol=0)


def test_local_window_widens_with_its_argument_after_construction() -> None:
    module = LocalAttention(D, window_size=2).double()
    q, k, v = qkv(9, 9)
    narrow = module(q, k, v)
    module.window_size = 100
    wide = module(q, k, v)
    assert not torch.allclose(narrow, wide)
    full = CrossAttention(D).double()
    full.load_state_dict(module.state_dict())
    torch.testing.assert_close(wide, full(q, k, v))


def test_sigmoid_weights_are_not_normalised() -> None:
    module = SigmoidAttention(D).double()
    q = torch.zeros(1, 4, 2, 4, dtype=torch.float64)
    ones = torch.ones(1, 4, 10, 4, dtype=torch.float64)
    torch.testing.assert_close(module.attend(q, ones, ones), torch.full_like(q, 5.0))
