"""Attention over all keys: softmax, cosine, sigmoid and gated attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import Array

from canvas_engineering.jax.base import ProjectedAttention, attention_logits, map_query_chunks
from canvas_engineering.jax.params import Params, dropout, full_precision


@dataclass(frozen=True)
class CrossAttention(ProjectedAttention):
    """Scaled dot-product attention, ``softmax(q kᵀ / sqrt(hd)) v`` (Vaswani et al., 2017, arXiv:1706.03762).

    Rows without keys give 0 before ``out_proj``. Parameters: the four projections.
    """

    planned: ClassVar[bool] = True


@dataclass(frozen=True)
class CosineAttention(ProjectedAttention):
    """Softmax over cosine similarities times a learned temperature, ``softmax(t cos(q, k)) v``.

    Parameters: the four projections and ``temperature``, a scalar starting at 10 (query-key normalisation,
    Henry et al., 2020, arXiv:2010.04245).
    """

    planned: ClassVar[bool] = True

    @property
    def kernel_scale(self) -> float:
        """1: the temperature is learned, so it is multiplied into the queries."""
        return 1.0

    def init(self, key: Array, dtype: Any = jnp.float32) -> Params:
        """The four projections and the temperature."""
        return {**super().init(key, dtype), "temperature": jnp.asarray(10.0, dtype)}

    def heads_q(self, params: Params, x: Array) -> Array:
        """``x (B, N, d)`` to unit-length queries times the temperature, ``(B, H, N, hd)``."""
        q = super().heads_q(params, x)
        return (_unit_length(q) * params["temperature"]).astype(q.dtype)

    def heads_kv(self, params: Params, x: Array, values: Array | None = None) -> tuple[Array, Array]:
        """``x (B, M, d)`` to unit-length keys and to values, each ``(B, H, M, hd)``."""
        k, v = super().heads_kv(params, x, values)
        return _unit_length(k).astype(k.dtype), v


def _unit_length(x: Array) -> Array:
    """``x / max(|x|, 1e-12)``; the bound is inside the root, where a zero vector has a gradient."""
    wide = full_precision(x)
    return wide / jnp.sqrt(jnp.maximum(jnp.square(wide).sum(-1, keepdims=True), 1e-24))


@dataclass(frozen=True)
class SigmoidAttention(ProjectedAttention):
    """Every query gates every key on its own, ``sigmoid(q kᵀ / sqrt(hd)) v``, without normalisation.

    Parameters: the four projections. Long inputs are computed over slices of the queries.
    """

    planned: ClassVar[bool] = True
    activation: ClassVar[str] = "sigmoid"

    def kernel(self, q: Array, k: Array, v: Array, rng: Array | None) -> Array:
        """``q (B, H, N, hd)``, ``k``, ``v (B, H, M, hd)`` to ``(B, H, N, hd)``."""

        def rows(q: Array, rng: Array | None) -> Array:
            gates = dropout(rng, self.dropout, jax.nn.sigmoid(attention_logits(q, k, self.kernel_scale)))
            return (gates @ full_precision(v)).astype(v.dtype)

        return map_query_chunks(rows, (q,), q.shape[0] * q.shape[1] * k.shape[-2], rng)


@dataclass(frozen=True)
class GatedAttention(ProjectedAttention):
    """Cross attention times a learned gate, ``sigmoid(gate) * cross_attn`` (Flamingo, arXiv:2204.14198).

    Parameters: ``cross_attn.*`` (the four projections) and ``gate`` of shape (1,), starting at 0.
    """

    planned: ClassVar[bool] = True

    def init(self, key: Array, dtype: Any = jnp.float32) -> Params:
        """The inner cross attention and the gate."""
        return {"gate": jnp.zeros(1, dtype), "cross_attn": super().init(key, dtype)}

    def projections(self, params: Params) -> Params:
        """Those of the inner cross attention."""
        inner: Params = params["cross_attn"]
        return inner

    def output_factor(self, params: Params) -> Array:
        """``sigmoid(gate)``."""
        return jax.nn.sigmoid(params["gate"])
