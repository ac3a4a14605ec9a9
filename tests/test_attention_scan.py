"""The linear scan, and the functions built on it, against plain loops over time."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from canvas_engineering.attention import MambaAttention, RWKVAttention, selective_scan as selective_scan_module
from canvas_engineering.attention.scan import linear_scan, scan_into
from canvas_engineering.attention.selective_scan import selective_scan

EPS32 = torch.finfo(torch.float32).eps


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def loop_scan(a: Tensor, b: Tensor, initial: Tensor) -> Tensor:
    state, states = initial, []
    for t in range(b.shape[1]):
        state = a[:, t] * state + b[:, t]
        states.append(state)
    return torch.stack(states, 1)


@given(n_steps=st.integers(1, 70), batch=st.integers(1, 3), width=st.integers(1, 4), seed=st.integers(0, 99))
def test_scan_equals_the_loop_with_gradients(n_steps: int, batch: int, width: int, seed: int) -> None:
    a = randn(batch, n_steps, width, seed=seed).requires_grad_()
    b = randn(batch, n_steps, width, seed=seed + 1).requires_grad_()
    initial = randn(batch, width, seed=seed + 2).requires_grad_()
    weight = randn(batch, n_steps, width, seed=seed + 3)
    damping = 0.9 / a.detach().abs().clamp_min(1.0)  # keeps long products from growing
    found, expected = linear_scan(a * damping, b, initial), loop_scan(a * damping, b, initial)
    torch.testing.assert_close(found, expected)
    leaves = (a, b, initial)
    torch.testing.assert_close(
        torch.autograd.grad((found * weight).sum(), leaves), torch.autograd.grad((expected * weight).sum(), leaves)
    )


@pytest.mark.parametrize("n_steps", [1, 5, 20])
def test_scan_gradients_equal_finite_differences(n_steps: int) -> None:
    inputs = tuple(
        x.requires_grad_() for x in (randn(2, n_steps, 2), randn(2, n_steps, 2, seed=1), randn(2, 2, seed=2))
    )
    torch.autograd.gradcheck(linear_scan, inputs)
    (gradient,) = torch.autograd.grad(linear_scan(*inputs).square().sum(), inputs[1], create_graph=True)
    with pytest.raises(RuntimeError, match="linear_scan_backward"):  # refused, not silently wrong
        torch.autograd.grad(gradient.sum(), inputs[0])


def test_scan_broadcasts_its_factors_and_starts_from_zero() -> None:
    factor, b = randn(3).sigmoid().requires_grad_(), randn(2, 100, 3)
    found = linear_scan(factor, b)
    torch.testing.assert_close(found, loop_scan(factor.expand_as(b), b, torch.zeros(2, 3, dtype=torch.float64)))
    (gradient,) = torch.autograd.grad(found.sum(), factor)
    assert gradient.shape == (3,)


def test_scan_of_no_steps_is_empty() -> None:
    assert linear_scan(randn(2, 0, 3), randn(2, 0, 3)).shape == (2, 0, 3)


def test_scan_takes_inputs_that_are_not_contiguous() -> None:
    a, b = randn(3, 50, 2).sigmoid().transpose(0, 2), randn(3, 50, 2, seed=1).transpose(0, 2)
    torch.testing.assert_close(linear_scan(a, b), loop_scan(a, b, torch.zeros(2, 3, dtype=torch.float64)))


@pytest.mark.parametrize("factor", [0.0, 1e-30, 0.5, 1.0])
def test_long_scans_neither_overflow_nor_lose_digits(factor: float) -> None:
    # Factors whose products underflow at once: formulas that divide by cumulative products give inf or NaN here.
    b = randn(1, 2000, 2, seed=4).abs()
    found = linear_scan(torch.full((1, 2000, 2), factor), b.float())
    expected = loop_scan(torch.full((1, 2000, 2), factor, dtype=torch.float64), b, torch.zeros(1, 2).double())
    # All terms are positive: relative error grows with the number of additions that count, at most.
    additions = min(2000.0, 1.0 / (1.0 - factor) if factor < 1 else 2000.0) + 2
    torch.testing.assert_close(found.double(), expected, rtol=EPS32 * additions, atol=0)


def test_a_scan_of_many_steps_takes_few_operations() -> None:
    class Count(TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.calls += func.overloadpacket is torch.ops.aten.addcmul
            return func(*args, **(kwargs or {}))

    a, b = randn(1, 10_000, 2).sigmoid(), randn(1, 10_000, 2)
    with Count() as count:
        scan_into(torch.empty_like(b), a, b, torch.zeros(1, 2).double())
    assert 0 < count.calls <= 3 * 100


def test_scans_are_registered_as_operators() -> None:
    arguments = (randn(1, 20, 2).requires_grad_(), randn(1, 20, 2, seed=1).requires_grad_(), randn(1, 2, seed=2))
    checks = ("test_schema", "test_faketensor", "test_autograd_registration", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.canvas_engineering.linear_scan.default, arguments, test_utils=checks)
    inputs = tuple(t.requires_grad_() for t in scan_inputs(40))
    torch.library.opcheck(torch.ops.canvas_engineering.selective_scan.default, inputs, test_utils=checks)


# Mamba


def loop_selective_scan(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    state, outputs = x.new_zeros(x.shape[0], x.shape[2], a.shape[1]), []
    for t in range(x.shape[1]):
        state = torch.exp(dt[:, t, :, None] * a) * state + dt[:, t, :, None] * b[:, t, None] * x[:, t, :, None]
        outputs.append((state * c[:, t, None]).sum(-1))
    return torch.stack(outputs, 1)


def scan_inputs(n_steps: int, batch: int = 2, d: int = 4, s: int = 3) -> tuple[Tensor, ...]:
    x, dt = randn(batch, n_steps, d), torch.nn.functional.softplus(randn(batch, n_steps, d, seed=1))
    a = -torch.arange(1.0, s + 1, dtype=torch.float64).expand(d, s)
    return x, dt, a.clone(), randn(batch, n_steps, s, seed=2), randn(batch, n_steps, s, seed=3)


def test_selective_scan_of_2000_steps_equals_the_loop() -> None:
    inputs = tuple(t.requires_grad_() for t in scan_inputs(2000))
    found, expected = selective_scan(*inputs), loop_selective_scan(*inputs)
    torch.testing.assert_close(found, expected)
    weight = randn(*found.shape, seed=5)
    torch.testing.assert_close(
        torch.autograd.grad((found * weight).sum(), inputs), torch.autograd.grad((expected * weight).sum(), inputs)
    )
    single = selective_scan(*(t.detach().float() for t in inputs))
    loop_single = loop_selective_scan(*(t.detach().float() for t in inputs))
    loop_error = float((loop_single.double() - expected).detach().abs().max())
    torch.testing.assert_close(single.double(), expected.detach(), rtol=0, atol=2 * loop_error)


@pytest.mark.parametrize(("block_elements", "block_steps"), [(168, 7), (168, 32), (1, 1), (10**6, 1)])
def test_blocks_change_nothing(block_elements: int, block_steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = tuple(t.requires_grad_() for t in scan_inputs(50, batch=3))

    def run() -> list[Tensor]:
        y = selective_scan(*inputs)
        return [y, *torch.autograd.grad(y.square().sum(), inputs)]

    whole = run()
    monkeypatch.setattr(selective_scan_module, "BLOCK_ELEMENTS", block_elements)
    monkeypatch.setattr(selective_scan_module, "BLOCK_STEPS", block_steps)
    torch.testing.assert_close(run(), whole)
    with torch.no_grad():
        torch.testing.assert_close(selective_scan(*inputs), whole[0])


def test_selective_scan_gradients_equal_finite_differences() -> None:
    inputs = tuple(t.requires_grad_() for t in scan_inputs(18, batch=1, d=2, s=2))
    torch.autograd.gradcheck(selective_scan, inputs)


def test_a_long_mamba_does_not_keep_its_states(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selective_scan_module, "BLOCK_ELEMENTS", 1 << 12)
    saved = 0

    def pack(t: Tensor) -> Tensor:
        nonlocal saved
        saved += t.numel()
        return t

    module = MambaAttention(8, state_size=64)
    x = torch.randn(1, 4000, 8, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        module(x[:, :4], x, x)
    assert saved < 4000 * 8 * 64  # the states, of which plain autograd keeps several copies


# RWKV


def loop_rwkv(module: RWKVAttention, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    k, v = module.k_proj(keys).clamp(-10, 10), module.v_proj(values)
    decay, bonus = torch.exp(-torch.exp(module.decay.flatten())), module.bonus.flatten()
    numerator = denominator = torch.zeros_like(v[:, 0])
    read = []
    for t in range(k.shape[1]):
        now = torch.exp(bonus + k[:, t])
        read.append((numerator + now * v[:, t]) / (denominator + now + 1e-6))
        numerator = numerator * decay + torch.exp(k[:, t]) * v[:, t]
        denominator = denominator * decay + torch.exp(k[:, t])
    steps = [min(i, k.shape[1] - 1) for i in range(queries.shape[1])]
    wkv = torch.stack([read[t] for t in steps], 1)
    return module.out_proj(torch.sigmoid(module.r_proj(queries)) * wkv)


@pytest.mark.parametrize(("n_queries", "n_keys"), [(2000, 2000), (3, 2000), (30, 17), (1, 1)])
def test_rwkv_equals_the_loop(n_queries: int, n_keys: int) -> None:
    torch.manual_seed(0)
    module = RWKVAttention(8, 2).double()
    with torch.no_grad():
        module.bonus.normal_()
        module.decay.copy_(torch.linspace(-9.0, 3.0, 8).view(2, 4))  # from hardly any decay to forgetting at once
        module.k_proj.weight.mul_(20.0)  # some keys reach the clamp
    q, k, v = (randn(2, n, 8, seed=seed).requires_grad_() for seed, n in enumerate((n_queries, n_keys, n_keys)))
    found, expected = module(q, k, v), loop_rwkv(module, q, k, v)
    torch.testing.assert_close(found, expected)
    leaves = (q, k, v, *module.parameters())
    gradients = [
        torch.autograd.grad(out.square().sum(), leaves, allow_unused=True, materialize_grads=True)
        for out in (found, expected)
    ]
    torch.testing.assert_close(*gradients)
    module.float()
    inputs = [t.detach().float() for t in (q, k, v)]
    loop_error = float((loop_rwkv(module, *inputs).double() - expected).detach().abs().max())
    tolerance = 2 * max(loop_error, EPS32 * float(expected.detach().abs().max()))
    np.testing.assert_allclose(module(*inputs).detach().double(), expected.detach(), rtol=0, atol=tolerance)


def test_rwkv_reads_no_key_beyond_its_queries() -> None:
    module = RWKVAttention(8, 2)
    q, k = torch.randn(1, 5, 8), torch.randn(1, 9, 8)
    spoiled = k.clone()
    spoiled[:, 5:] = float("nan")
    torch.testing.assert_close(module(q, spoiled, spoiled), module(q, k, k), rtol=0, atol=0)
