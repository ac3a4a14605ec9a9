"""Attention functions by name; the names and defaults are those of the torch functions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any

import jax.numpy as jnp
from jax import Array

from canvas_engineering.errors import CanvasError
from canvas_engineering.jax.base import AttentionFunction
from canvas_engineering.jax.dense import CosineAttention, CrossAttention, GatedAttention, SigmoidAttention
from canvas_engineering.jax.hyena import HyenaAttention
from canvas_engineering.jax.linear import (
    CopyAttention,
    LinearAttention,
    NoneAttention,
    PerceiverAttention,
    PoolingAttention,
)
from canvas_engineering.jax.params import Params
from canvas_engineering.jax.patterned import LocalAttention, MixtureAttention, RandomFixedAttention, SparseAttention
from canvas_engineering.jax.recurrent import MambaAttention, RWKVAttention

#: Name to class (or any callable ``(d_model, n_heads, dropout, **options) -> AttentionFunction``).
ATTENTION_REGISTRY: dict[str, Callable[..., AttentionFunction]] = {
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
    "cogvideox": CrossAttention,
    "none": NoneAttention,
}


@dataclass(frozen=True)
class _UserFunction(AttentionFunction):
    """A pair of functions given to ``register_attention``."""

    init_function: Callable[..., Params] = field(kw_only=True)
    apply_function: Callable[..., Array] = field(kw_only=True)
    options: Mapping[str, Any] = field(default_factory=dict, kw_only=True)

    def init(self, key: Array, dtype: Any = jnp.float32) -> Params:
        """The user's parameters, floating-point ones in ``dtype``."""
        return _cast(self.init_function(key, self.d_model, self.n_heads, **self.options), dtype)

    def _attend(self, params: Params, queries: Array, keys: Array, values: Array, rng: Array | None) -> Array:
        rate = 0.0 if rng is None else self.dropout
        out = self.apply_function(
            params, queries, keys, values, n_heads=self.n_heads, dropout=rate, rng=rng, **self.options
        )
        if out.shape != queries.shape:
            raise CanvasError(f"apply must return the shape of queries, {queries.shape}, got {out.shape}")
        return out


def _cast(tree: Mapping[str, Any], dtype: Any) -> Params:
    return {
        name: _cast(value, dtype) if isinstance(value, Mapping) else jnp.asarray(value, dtype)
        for name, value in tree.items()
    }


def create_attention(
    fn_name: str, d_model: int, n_heads: int = 4, dropout: float = 0.0, **options: Any
) -> AttentionFunction:
    """A function's static description by its registered name.

    Args:
        fn_name: a key of ``ATTENTION_REGISTRY``.
        d_model: width of queries, keys and values.
        n_heads: number of attention heads.
        dropout: dropout on attention probabilities, in training.
        **options: further arguments of the class, such as ``top_k`` or ``window_size``.

    Raises:
        CanvasError: the name or an option is unknown (the message lists the known ones), or a value is refused.
    """
    if fn_name not in ATTENTION_REGISTRY:
        known = ", ".join(sorted(ATTENTION_REGISTRY))
        raise CanvasError(f"unknown attention function {fn_name!r}; known: {known}")
    make = ATTENTION_REGISTRY[fn_name]
    if isinstance(make, type):
        known_options = [one.name for one in fields(make)][3:]
        unknown = [name for name in options if name not in known_options]
        if unknown:
            listed = ", ".join(known_options) or "none"
            raise CanvasError(f"options of {fn_name!r} must be among: {listed}; got {unknown[0]!r}")
    return make(d_model, n_heads, dropout, **options)


def register_attention(name: str, init: Callable[..., Params], apply: Callable[..., Array]) -> None:
    """Make a pair of pure functions available under ``name``, replacing what the name stood for.

    Args:
        name: used in declarations and as part of parameter names, so it may hold no dot.
        init: ``init(key, d_model, n_heads, **options)`` to a nested dictionary of arrays (empty if none).
        apply: ``apply(params, queries, keys, values, *, n_heads, dropout, rng, **options)`` to ``(B, N, d)``, from
            ``(B, N, d)``, ``(B, M, d)``, ``(B, M, d)``; it computes each batch element on its own. ``dropout``
            is 0 and ``rng`` None outside training.

    Raises:
        CanvasError: ``name`` is empty or holds a dot, or ``init`` or ``apply`` is not callable.
    """
    if not name or "." in name:
        raise CanvasError(f"name must be a non-empty string without dots, got name={name!r}")
    for argument, value in (("init", init), ("apply", apply)):
        if not callable(value):
            raise CanvasError(f"{argument} must be a function, got {value!r}")
    ATTENTION_REGISTRY[name] = partial(_create_user_function, init, apply)


def _create_user_function(
    init: Callable[..., Params],
    apply: Callable[..., Array],
    d_model: int,
    n_heads: int,
    dropout: float,
    **options: Any,
) -> AttentionFunction:
    return _UserFunction(d_model, n_heads, dropout, init_function=init, apply_function=apply, options=options)
