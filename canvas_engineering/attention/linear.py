"""Functions whose cost grows with N + M: linear attention, perceiver, pooling, copy, none."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from canvas_engineering.attention.base import (
    AttentionFunction,
    ProjectedAttention,
    check_positive,
    full_precision,
    no_autocast,
    split_heads,
)
from canvas_engineering.attention.dense import CrossAttention


class LinearAttention(ProjectedAttention):
    """Kernel attention ``φ(q)(φ(k)ᵀ v) / (φ(q) Σ φ(k) + 1e-6)``, ``φ = elu + 1`` (arXiv:2006.16236).

    O(N + M). Parameters: the four projections. Half precision is summed in float32; ``dropout`` is unused,
    there are no attention probabilities.
    """

    def heads_q(self, x: Tensor) -> Tensor:
        """``x (B, N, d)`` to the features of the queries, ``(B, H, N, hd)``."""
        return split_heads(_features(self.project_q(x)), self.n_heads)

    def heads_kv(self, x: Tensor, values: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """``x (B, M, d)`` to the features of the keys and to values, each ``(B, H, M, hd)``."""
        k, v = self.project_kv(x, values)
        return split_heads(_features(k), self.n_heads), split_heads(v, self.n_heads)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The kernel on features: ``q (B, H, N, hd)``, ``k, v (B, H, M, hd)`` to ``(B, H, N, hd)``."""
        with no_autocast(q):
            context = k.transpose(-2, -1) @ full_precision(v)  # (B, H, hd, hd)
            total = k.sum(dim=-2).unsqueeze(-1)  # (B, H, hd, 1)
            return (q @ context / (q @ total + 1e-6)).to(v.dtype)


def _features(x: Tensor) -> Tensor:
    """``elu(x) + 1``, positive, in float32 at least."""
    return F.elu(full_precision(x)) + 1


class PerceiverAttention(AttentionFunction):
    """Learned latents read the keys, the queries read the latents (Perceiver IO, arXiv:2107.14795).

    O((N + M) n_latents). Parameters: ``latents`` (1, n_latents, d), ``compress.*`` and ``readout.*``
    (the four projections each).

    Raises:
        CanvasError: ``n_latents`` below 1.
    """

    def __init__(self, d_model: int, n_heads: int = 4, dropout: float = 0.0, n_latents: int = 8) -> None:
        super().__init__(d_model, n_heads, dropout)
        check_positive("n_latents", n_latents)
        self.latents = nn.Parameter(torch.randn(1, n_latents, d_model) * 0.02)
        self.compress = CrossAttention(d_model, n_heads, dropout)
        self.readout = CrossAttention(d_model, n_heads, dropout)

    def forward(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """``queries (B, N, d)``, ``keys (B, M, d)``, ``values (B, M, d)`` to ``(B, N, d)``."""
        self.check_inputs(queries, keys, values)
        # The latents' queries are the same for the whole batch, so they are projected once.
        q = self.compress.heads_q(self.latents).expand(queries.shape[0], -1, -1, -1)
        compressed = self.compress.finish(self.compress.attend(q, *self.compress.heads_kv(keys, values)))
        return self.readout(queries, compressed, compressed)


class PoolingAttention(AttentionFunction):
    """``proj(mean(values))``, the same for every query; ``proj(0)`` when there are no keys.

    O(N + M). Parameters: ``proj``, Linear(d, d). The result is an expanded view: write to a copy of it.
    """

    def __init__(self, d_model: int, n_heads: int = 4, dropout: float = 0.0) -> None:
        super().__init__(d_model, n_heads, dropout)
        self.proj = nn.Linear(d_model, d_model)

    def forward(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """``queries (B, N, d)``, ``keys (B, M, d)``, ``values (B, M, d)`` to ``(B, N, d)``."""
        self.check_inputs(queries, keys, values)
        # The mean of nothing is NaN, the sum of nothing is 0.
        pooled = values.mean(1, keepdim=True) if values.shape[1] else values.sum(1, keepdim=True)
        return self.proj(pooled).expand(-1, queries.shape[1], -1)


class CopyAttention(AttentionFunction):
    """The first N values, zeros where there are fewer. No parameters. May be a view of ``values``."""

    def forward(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """``queries (B, N, d)``, ``keys (B, M, d)``, ``values (B, M, d)`` to ``(B, N, d)``."""
        self.check_inputs(queries, keys, values)
        missing = queries.shape[1] - values.shape[1]
        return F.pad(values, (0, 0, 0, missing)) if missing > 0 else values[:, : queries.shape[1]]


class NoneAttention(AttentionFunction):
    """Zeros: the connection is declared and switched off. No parameters."""

    def forward(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """``queries (B, N, d)``, ``keys (B, M, d)``, ``values (B, M, d)`` to zeros ``(B, N, d)``."""
        self.check_inputs(queries, keys, values)
        return torch.zeros_like(queries)
