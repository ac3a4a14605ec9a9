"""Attention functions by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from canvas_engineering.attention.dense import (
    CogVideoXAttention,
    CosineAttention,
    CrossAttention,
    GatedAttention,
    SigmoidAttention,
)
from canvas_engineering.attention.hyena import HyenaAttention
from canvas_engineering.attention.linear import (
    CopyAttention,
    LinearAttention,
    NoneAttention,
    PerceiverAttention,
    PoolingAttention,
)
from canvas_engineering.attention.patterned import (
    LocalAttention,
    MixtureAttention,
    RandomFixedAttention,
    SparseAttention,
)
from canvas_engineering.attention.recurrent import MambaAttention, RWKVAttention
from canvas_engineering.errors import CanvasError

#: Name to class (or any callable ``(d_model, n_heads, dropout, **kwargs) -> nn.Module``).
ATTENTION_REGISTRY: dict[str, Callable[..., nn.Module]] = {
    "cross_attention": CrossAttention,
    "self_attention": CrossAttention,
    "linear_attention": LinearAttention,
    "cosine_attention": CosineAttention,
    "sigmoid_attention": SigmoidAttention,
    "gated": GatedAttention,
    "perceiver": PerceiverAttention,
    "pooling": PoolingAttention,
    "copy": CopyAttention,
    "sparse_attention": SparseAttention,
    "local_attention": LocalAttention,
    "random_fixed": RandomFixedAttention,
    "mixture": MixtureAttention,
    "mamba": MambaAttention,
    "rwkv": RWKVAttention,
    "hyena": HyenaAttention,
    "cogvideox": CogVideoXAttention,
    "none": NoneAttention,
}

#: The classes whose ``forward`` equals ``finish(kernel(heads_q, *heads_kv))`` over ``key_pattern`` (for the
#: mixture: expert by expert), so that it may run through a block-sparse plan.
PLAN_CLASSES: frozenset[type[nn.Module]] = frozenset(
    {
        CrossAttention,
        CogVideoXAttention,
        GatedAttention,
        CosineAttention,
        SigmoidAttention,
        LocalAttention,
        RandomFixedAttention,
        MixtureAttention,
    }
)


def is_plan_capable(module: nn.Module) -> bool:
    """Whether ``module`` may run through a block-sparse plan.

    Only the classes themselves: a subclass may have changed ``forward``.
    """
    return type(module) in PLAN_CLASSES


def create_attention(fn_name: str, d_model: int, n_heads: int = 4, dropout: float = 0.0, **kwargs: Any) -> nn.Module:
    """A new attention module by its registered name.

    Args:
        fn_name: a key of ``ATTENTION_REGISTRY``.
        d_model: width of queries, keys and values.
        n_heads: number of attention heads.
        dropout: dropout on attention probabilities, in training.
        **kwargs: further arguments of the class, such as ``top_k`` or ``window_size``.

    Raises:
        CanvasError: the name is unknown (the message lists the known ones), or the class refuses an argument.
    """
    if fn_name not in ATTENTION_REGISTRY:
        known = ", ".join(sorted(ATTENTION_REGISTRY))
        raise CanvasError(f"unknown attention function {fn_name!r}; known: {known}")
    return ATTENTION_REGISTRY[fn_name](d_model, n_heads, dropout, **kwargs)


def register_attention(name: str, cls: Callable[..., nn.Module]) -> None:
    """Make ``cls`` available under ``name``, replacing what the name stood for.

    Args:
        name: used in declarations and as part of parameter names, so it may hold no dot.
        cls: ``nn.Module`` class (or factory) called with ``(d_model, n_heads, dropout, **kwargs)``, whose
            modules have ``forward(queries, keys, values)`` with the shapes of this package and compute each
            batch element on its own.

    Raises:
        CanvasError: ``name`` is empty or holds a dot, or ``cls`` is not callable.
    """
    if not name or "." in name:
        raise CanvasError(f"name must be a non-empty string without dots, got name={name!r}")
    if not callable(cls):
        raise CanvasError(f"cls must be an nn.Module class or a factory, got {cls!r}")
    ATTENTION_REGISTRY[name] = cls
