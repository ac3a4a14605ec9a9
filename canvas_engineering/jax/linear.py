"""Functions whose cost grows with N + M: linear attention, perceiver, pooling, copy, none."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from canvas_engineering.jax.base import AttentionFunction, ProjectedAttention, check_positive
from canvas_engineering.jax.dense import CrossAttention
from canvas_engineering.jax.params import Params, full_precision, init_linear, linear


@dataclass(frozen=True)
class LinearAttention(ProjectedAttention):
    """Kernel attention ``φ(q)(φ(k)ᵀ v) / (φ(q) Σ φ(k) + 1e-6)``, ``φ = elu + 1`` (arXiv:2006.16236).

    O(N + M). Parameters: the four projections. Half precision is summed in float32; ``dropout`` is unused,
    there are no attention probabilities.
    """

    def kernel(self, q: Array, k: Array, v: Array, rng: Array | None) -> Array:
        """``q (B, H, N, hd)``, ``k``, ``v (B, H, M, hd)`` to ``(B, H, N, hd)``."""
        q_features, k_features = (jax.nn.elu(full_precision(x)) + 1 for x in (q, k))
        context = k_features.swapaxes(-1, -2) @ full_precision(v)  # (B, H, hd, hd)
        total = k_features.sum(-2)[..., None]  # (B, H, hd, 1)
        return (q_features @ context / (q_features @ total + 1e-6)).astype(q.dtype)


@dataclass(frozen=True)
class PerceiverAttention(AttentionFunction):
    """Learned latents read the keys, the queries read the latents (Perceiver IO, arXiv:2107.14795).

    O((N + M) n_latents). Parameters: ``latents`` (1, n_latents, d), ``compress.*`` and ``readout.*``
    (the four projections each).

    Raises:
        CanvasError: ``n_latents`` below 1.
    """

    n_latents: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("n_latents", self.n_latents)
        self._inner()  # checks the heads

    def _inner(self) -> CrossAttention:
        return CrossAttention(self.d_model, self.n_heads, self.dropout)

    def init(self, key: Array, dtype: Any = jnp.float32) -> Params:
        """Latents and both cross attentions."""
        key_latents, key_compress, key_readout = jax.random.split(key, 3)
        return {
            "latents": jax.random.normal(key_latents, (1, self.n_latents, self.d_model), dtype) * 0.02,
            "compress": self._inner().init(key_compress, dtype),
            "readout": self._inner().init(key_readout, dtype),
        }

    def _attend(self, params: Params, queries: Array, keys: Array, values: Array, rng: Array | None) -> Array:
        rng_compress, rng_readout = (None, None) if rng is None else jax.random.split(rng)
        inner = self._inner()
        compress, readout = params["compress"], params["readout"]
        # The latents' queries are the same for the whole batch, so they are projected once.
        q = inner.heads_q(compress, params["latents"])
        q = jnp.broadcast_to(q, (queries.shape[0], *q.shape[1:]))
        read = inner.kernel(q, *inner.heads_kv(compress, keys, values), rng_compress)
        compressed = inner.finish(compress, read)
        return inner.apply(readout, queries, compressed, compressed, rng=rng_readout)


@dataclass(frozen=True)
class PoolingAttention(AttentionFunction):
    """``proj(mean(values))``, the same for every query; ``proj(0)`` when there are no keys.

    O(N + M). Parameters: ``proj``, Linear(d, d).
    """

    def init(self, key: Array, dtype: Any = jnp.float32) -> Params:
        """The projection."""
        return {"proj": init_linear(key, self.d_model, self.d_model, dtype)}

    def _attend(self, params: Params, queries: Array, keys: Array, values: Array, rng: Array | None) -> Array:
        # The mean of nothing is NaN, the sum of nothing is 0.
        pooled = values.mean(1, keepdims=True) if values.shape[1] else values.sum(1, keepdims=True)
        return jnp.broadcast_to(linear(params["proj"], pooled), queries.shape)


@dataclass(frozen=True)
class CopyAttention(AttentionFunction):
    """The first N values, zeros where there are fewer. No parameters."""

    def _attend(self, params: Params, queries: Array, keys: Array, values: Array, rng: Array | None) -> Array:
        missing = max(0, queries.shape[1] - values.shape[1])
        return jnp.pad(values[:, : queries.shape[1]], ((0, 0), (0, missing), (0, 0)))


@dataclass(frozen=True)
class NoneAttention(AttentionFunction):
    """Zeros: the connection is declared and switched off. No parameters."""

    def _attend(self, params: Params, queries: Array, keys: Array, values: Array, rng: Array | None) -> Array:
        return jnp.zeros_like(queries)
