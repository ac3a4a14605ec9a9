"""Attention over all keys: softmax, cosine, sigmoid and gated attention."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from canvas_engineering.attention.base import (
    AttentionFunction,
    ProjectedAttention,
    full_precision,
    map_query_chunks,
)
from canvas_engineering.attention.key_pattern import KeyPattern


class CrossAttention(ProjectedAttention):
    """Scaled dot-product attention, ``softmax(q kᵀ / sqrt(hd)) v`` (Vaswani et al., 2017, arXiv:1706.03762).

    Rows without keys give 0 before ``out_proj``. Parameters: the four projections.
    """


class CogVideoXAttention(CrossAttention):
    """Marks connections that a CogVideoX backbone takes over; on a canvas the same as ``CrossAttention``."""


class CosineAttention(ProjectedAttention):
    """Softmax over cosine similarities times a learned temperature, ``softmax(t cos(q, k)) v``.

    Parameters: the four projections and ``temperature``, a scalar starting at 10 (query-key normalisation,
    Henry et al., 2020, arXiv:2010.04245).
    """

    def __init__(self, d_model: int, n_heads: int = 4, dropout: float = 0.0) -> None:
        super().__init__(d_model, n_heads, dropout)
        self.temperature = nn.Parameter(torch.tensor(10.0))
        self.kernel_scale = 1.0  # the temperature is learned, so it is multiplied into the queries

    def heads_q(self, x: Tensor) -> Tensor:
        """``x (B, N, d)`` to unit-length queries times the temperature, ``(B, H, N, hd)``."""
        q = super().heads_q(x)
        return (_unit_length(q) * self.temperature).to(q.dtype)

    def heads_kv(self, x: Tensor, values: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """``x (B, M, d)`` to unit-length keys and to values, each ``(B, H, M, hd)``."""
        k, v = super().heads_kv(x, values)
        return _unit_length(k).to(k.dtype), v


def _unit_length(x: Tensor) -> Tensor:
    return F.normalize(full_precision(x), dim=-1)


class SigmoidAttention(ProjectedAttention):
    """Every query gates every key on its own, ``sigmoid(q kᵀ / sqrt(hd)) v``, without normalisation.

    Parameters: the four projections. Long inputs are computed over slices of the queries.
    """

    activation: Literal["softmax", "sigmoid"] = "sigmoid"

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The kernel: ``q (B, H, N, hd)``, ``k``, ``v (B, H, M, hd)`` to ``(B, H, N, hd)``."""
        dropout_p = self.active_dropout

        def rows(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            gates = torch.sigmoid((q @ k.transpose(-2, -1)) * self.kernel_scale)  # (B, H, rows, M)
            return F.dropout(gates, dropout_p) @ v

        return map_query_chunks(rows, (q,), (k, v), q.shape[0] * q.shape[1] * k.shape[-2], draws_random=dropout_p > 0)


class GatedAttention(AttentionFunction):
    """Cross attention times a learned gate, ``sigmoid(gate) * cross_attn`` (Flamingo, arXiv:2204.14198).

    Parameters: ``cross_attn.*`` (the four projections) and ``gate`` of shape (1,), starting at 0.
    """

    activation: Literal["softmax", "sigmoid"] = "softmax"

    def __init__(self, d_model: int, n_heads: int = 4, dropout: float = 0.0) -> None:
        super().__init__(d_model, n_heads, dropout)
        self.cross_attn = CrossAttention(d_model, n_heads, dropout)
        self.dropout = self.cross_attn.dropout  # one place to change the rate
        self.gate = nn.Parameter(torch.zeros(1))
        self.head_dim = self.cross_attn.head_dim
        self.kernel_scale: float = self.cross_attn.kernel_scale

    @property
    def out_proj(self) -> nn.Linear:
        """The output projection of the inner cross attention."""
        return self.cross_attn.out_proj

    def project_q(self, x: Tensor) -> Tensor:
        """``x (B, N, d)`` to queries ``(B, N, d)``, heads side by side."""
        return self.cross_attn.project_q(x)

    def project_kv(self, x: Tensor, values: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """``x (B, M, d)`` to keys and values ``(B, M, d)``."""
        return self.cross_attn.project_kv(x, values)

    def heads_q(self, x: Tensor) -> Tensor:
        """``x (B, N, d)`` to the kernel's queries ``(B, H, N, hd)``."""
        return self.cross_attn.heads_q(x)

    def heads_kv(self, x: Tensor, values: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """``x (B, M, d)`` to the kernel's keys and values, each ``(B, H, M, hd)``."""
        return self.cross_attn.heads_kv(x, values)

    def merge(self, out: Tensor) -> Tensor:
        """The kernel's result ``(B, H, N, hd)`` to ``(B, N, d)``, before ``out_proj``."""
        return self.cross_attn.merge(out)

    def finish(self, out: Tensor) -> Tensor:
        """The kernel's result ``(B, H, N, hd)`` to the gated output ``(B, N, d)``."""
        return torch.sigmoid(self.gate) * self.cross_attn.finish(out)

    def key_pattern(self, n_queries: int, n_keys: int, group_id: int = 0) -> KeyPattern | None:
        """None: every query reads every key."""
        return None

    def forward(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """``queries (B, N, d)``, ``keys (B, M, d)``, ``values (B, M, d)`` to ``(B, N, d)``."""
        self.check_inputs(queries, keys, values)
        k, v = self.heads_kv(keys, values)
        return self.finish(self.cross_attn.attend(self.heads_q(queries), k, v))
