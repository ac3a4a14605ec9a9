"""The registry of attention functions, what their constructors and inputs refuse, and lazy loading."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import canvas_engineering.attention as attention
from canvas_engineering.attention import (
    ATTENTION_REGISTRY,
    CrossAttention,
    create_attention,
    is_plan_capable,
    register_attention,
)
from canvas_engineering.errors import CanvasError

NAMES = sorted(ATTENTION_REGISTRY)
WITH_HEADS = sorted(set(NAMES) - {"pooling", "copy", "none", "mamba", "hyena"})
PLAN = (
    "cross_attention",
    "self_attention",
    "cogvideox",
    "gated",
    "cosine_attention",
    "sigmoid_attention",
    "local_attention",
    "random_fixed",
    "mixture",
)
D = 16


def test_registry_holds_the_functions_of_the_specification() -> None:
    expected = {
        "cross_attention", "self_attention", "cogvideox", "gated", "cosine_attention", "sigmoid_attention",
        "local_attention", "random_fixed", "mixture", "sparse_attention", "linear_attention", "perceiver", "pooling",
        "copy", "none", "mamba", "rwkv", "hyena",
    }  # fmt: skip
    assert set(ATTENTION_REGISTRY) == expected
    assert {name for name in NAMES if is_plan_capable(create_attention(name, D))} == set(PLAN)


def test_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(
        ValueError, match=r"unknown attention function 'crossattention'; known: .*cross_attention.*rwkv"
    ):
        create_attention("crossattention", D)


def test_a_registered_function_is_created_with_its_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    class Scaled(nn.Module):
        def __init__(self, d_model: int, n_heads: int = 4, dropout: float = 0.0, factor: float = 1.0) -> None:
            super().__init__()
            self.factor = factor

        def forward(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
            return queries * self.factor

    monkeypatch.setitem(ATTENTION_REGISTRY, "scaled", Scaled)  # undoes the registration afterwards
    register_attention("scaled", Scaled)
    module = create_attention("scaled", D, factor=3.0)
    torch.testing.assert_close(
        module(torch.ones(1, 2, D), torch.ones(1, 1, D), torch.ones(1, 1, D)), torch.full((1, 2, D), 3.0)
    )
    assert not is_plan_capable(module)


def test_a_subclass_does_not_run_through_a_plan() -> None:
    class Doubled(CrossAttention):
        def forward(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
            return 2 * super().forward(queries, keys, values)

    assert not is_plan_capable(Doubled(D))


@pytest.mark.parametrize(("name", "cls", "message"), [
    ("", CrossAttention, "name must be a non-empty string without dots, got name=''"),
    ("my.own", CrossAttention, "name must be a non-empty string without dots, got name='my.own'"),
    ("mine", "CrossAttention", "cls must be an nn.Module class or a factory, got 'CrossAttention'"),
])  # fmt: skip
def test_bad_registrations_are_refused(name: str, cls: Any, message: str) -> None:
    with pytest.raises(CanvasError, match=message):
        register_attention(name, cls)


@pytest.mark.parametrize("name", WITH_HEADS)
def test_heads_must_divide_the_width(name: str) -> None:
    with pytest.raises(ValueError, match="d_model must be divisible by n_heads, got d_model=10, n_heads=4"):
        create_attention(name, 10, 4)


@pytest.mark.parametrize("name", NAMES)
def test_bad_sizes_and_dropout_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="n_heads must be at least 1, got n_heads=0"):
        create_attention(name, D, 0)
    with pytest.raises(ValueError, match="d_model must be at least 1, got d_model=0"):
        create_attention(name, 0)
    for rate in (-0.1, 1.0, float("nan")):
        with pytest.raises(ValueError, match=rf"dropout must be in \[0, 1\), got dropout={rate}"):
            create_attention(name, D, dropout=rate)


@pytest.mark.parametrize(("name", "arguments", "message"), [
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
])  # fmt: skip
def test_bad_arguments_are_refused(name: str, arguments: dict[str, int], message: str) -> None:
    with pytest.raises(CanvasError, match=message):
        create_attention(name, D, **arguments)


@pytest.mark.parametrize("name", NAMES)
def test_inputs_of_wrong_shape_are_refused(name: str) -> None:
    module = create_attention(name, D)
    x, y = torch.zeros(2, 3, D), torch.zeros(2, 5, D)
    with pytest.raises(CanvasError, match=rf"queries must have shape \(B, N, {D}\), got \(2, 3, 8\)"):
        module(x[..., :8], y, y)
    with pytest.raises(CanvasError, match=rf"keys must have shape \(B, N, {D}\), got \(5, {D}\)"):
        module(x, y[0], y)
    with pytest.raises(CanvasError, match=r"must agree in batch.*queries .2, 3, 16., keys .1, 5, 16."):
        module(x, y[:1], y[:1])
    with pytest.raises(CanvasError, match=r"keys and values in length.*keys .2, 5, 16., values .2, 4, 16."):
        module(x, y, y[:, :4])


def test_hyena_refuses_more_queries_than_its_filters_reach() -> None:
    module = create_attention("hyena", D, max_len=8)
    module(torch.zeros(1, 8, D), torch.zeros(1, 3, D), torch.zeros(1, 3, D))
    with pytest.raises(CanvasError, match=r"at most max_len=8, got 9 queries \(length 16\)"):
        module(torch.zeros(1, 9, D), torch.zeros(1, 3, D), torch.zeros(1, 3, D))


# Without torch


def test_without_torch_functions_say_what_to_install_and_the_rest_works() -> None:
    script = """
import sys
sys.modules["torch"] = None  # find_spec then reports it as missing
import canvas_engineering.attention as attention
from canvas_engineering.errors import MissingDependencyError
for name in ("CrossAttention", "create_attention", "ATTENTION_REGISTRY"):
    try:
        getattr(attention, name)
    except MissingDependencyError as error:
        assert "canvas-engineering[torch]" in str(error) and name in str(error), error
    else:
        raise SystemExit(f"{name} did not raise")
attention.block_sparse_attention
try:
    import canvas_engineering.nn
except MissingDependencyError as error:
    assert "canvas-engineering[torch]" in str(error), error
else:
    raise SystemExit("nn did not raise")
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


def test_every_exported_name_exists() -> None:
    for name in attention.__all__:
        assert getattr(attention, name) is not None
        assert name in dir(attention)
    with pytest.raises(AttributeError, match="has no attribute 'CrossAtention'"):
        attention.CrossAtention  # noqa: B018
