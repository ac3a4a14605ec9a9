"""Identity slots: a region's observations gathered into a fixed number of learned slots."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from canvas_engineering.errors import CanvasError
from canvas_engineering.jax.base import check_positive
from canvas_engineering.jax.dense import CrossAttention
from canvas_engineering.jax.params import Params, init_linear, init_norm, layer_norm, linear


@dataclass(frozen=True)
class SlotBinding:
    """Learned slots read the observations by cross attention and keep what they held, layer-normalised.

    ``slots' = layer_norm(slots + binding_attn(slots, observations))``, times a gate in (0, 1) per slot with
    ``birth_death`` (slots as object memory: Locatello et al., 2020, arXiv:2006.15055).

    Parameters: ``slots`` (n_slots, d), ``binding_attn.*`` (the four projections), ``layer_norm``, and with
    ``birth_death`` ``life_gate.0`` Linear(d, d // 2), ``life_gate.2`` Linear(d // 2, 1).

    Raises:
        CanvasError: ``n_slots`` below 1, or ``n_heads`` does not divide ``d_model``.
    """

    d_model: int
    n_slots: int
    n_heads: int = 4
    birth_death: bool = False

    def __post_init__(self) -> None:
        check_positive("n_slots", self.n_slots)
        _ = self._attention

    @property
    def _attention(self) -> CrossAttention:
        return CrossAttention(self.d_model, self.n_heads)

    def init(self, key: Array, dtype: Any = jnp.float32) -> Params:
        """All of the above."""
        key_slots, key_attention, key_in, key_out = jax.random.split(key, 4)
        params: Params = {
            "slots": jax.random.normal(key_slots, (self.n_slots, self.d_model), dtype) * 0.02,
            "binding_attn": self._attention.init(key_attention, dtype),
            "layer_norm": init_norm(self.d_model, dtype),
        }
        if self.birth_death:
            half = self.d_model // 2
            params["life_gate"] = {
                "0": init_linear(key_in, self.d_model, half, dtype),
                "2": init_linear(key_out, half, 1, dtype),
            }
        return params

    def apply(self, params: Params, observations: Array) -> Array:
        """``observations (B, n, d_model)`` to slots ``(B, n_slots, d_model)``; dead slots are scaled towards 0."""
        if observations.ndim != 3 or observations.shape[2] != self.d_model:
            raise CanvasError(
                f"observations must have shape (B, n, d_model) = (B, n, {self.d_model}), "
                f"got {tuple(observations.shape)}"
            )
        attention, binding = self._attention, params["binding_attn"]
        # The slots are the same for the whole batch, so their queries are projected once.
        q = attention.heads_q(binding, params["slots"][None])
        q = jnp.broadcast_to(q, (observations.shape[0], *q.shape[1:]))
        read = attention.finish(binding, attention.kernel(q, *attention.heads_kv(binding, observations), None))
        slots = layer_norm(params["layer_norm"], read + params["slots"])
        if not self.birth_death:
            return slots
        hidden = jax.nn.gelu(linear(params["life_gate"]["0"], slots), approximate=False)
        return slots * jax.nn.sigmoid(linear(params["life_gate"]["2"], hidden))
