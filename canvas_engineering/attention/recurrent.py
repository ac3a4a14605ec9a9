"""Functions that run a recurrence over the keys: Mamba's selective scan and RWKV's decayed sums."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from canvas_engineering.attention.base import (
    AttentionFunction,
    check_head_count,
    check_positive,
    full_precision,
    no_autocast,
    softmax_attention,
)
from canvas_engineering.attention.scan import linear_scan
from canvas_engineering.attention.selective_scan import selective_scan
from canvas_engineering.errors import CanvasError


class MambaAttention(AttentionFunction):
    """A selective state-space model runs over the values; the queries read its outputs by softmax attention.

    ``y = (scan(x) + D x) silu(z)``, then ``out_proj(softmax(norm(queries) yᵀ / sqrt(d)) y)``, one head
    (Gu and Dao, arXiv:2312.00752). ``keys`` are not used. Scans in float32 when the input is half precision.

    Parameters: ``in_proj`` Linear(d, 2d), ``x_proj`` Linear(d, r + 2 s), ``dt_proj`` Linear(r, d), ``D`` (d),
    ``norm`` LayerNorm(d), ``out_proj``; buffer ``A_log`` (d, s) = log(1..s); ``s = state_size``,
    ``r = dt_rank``, ``max(1, d // 16)`` when 0.

    Raises:
        CanvasError: ``state_size`` below 1 or ``dt_rank`` below 0.
    """

    A_log: Tensor

    def __init__(
        self,
        d_model: int,
        n_heads: int = 4,
        dropout: float = 0.0,
        state_size: int = 16,
        dt_rank: int = 0,
    ) -> None:
        super().__init__(d_model, n_heads, dropout)
        check_positive("state_size", state_size)
        if dt_rank < 0:
            raise CanvasError(f"dt_rank must be at least 0, got dt_rank={dt_rank}")
        self.state_size = state_size
        self.dt_rank = dt_rank or max(1, d_model // 16)
        self.in_proj = nn.Linear(d_model, 2 * d_model)
        self.dt_proj = nn.Linear(self.dt_rank, d_model)
        self.x_proj = nn.Linear(d_model, self.dt_rank + 2 * state_size)
        rates = torch.arange(1, state_size + 1, dtype=torch.float32)
        self.register_buffer("A_log", rates.log().repeat(d_model, 1))
        self.D = nn.Parameter(torch.ones(d_model))
        self.out_proj = nn.Linear(d_model, d_model)
        self.norm = nn.LayerNorm(d_model)

    def forward(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """``queries (B, N, d)``, ``keys (B, M, d)`` (unused), ``values (B, M, d)`` to ``(B, N, d)``."""
        self.check_inputs(queries, keys, values)
        x, z = self.in_proj(values).chunk(2, dim=-1)  # (B, M, d) each
        step, b, c = self.x_proj(x).split([self.dt_rank, self.state_size, self.state_size], dim=-1)
        dt = F.softplus(full_precision(self.dt_proj(step)))
        with no_autocast(values):
            x, z, b, c = (full_precision(t) for t in (x, z, b, c))
            rates = -torch.exp(full_precision(self.A_log))
            y = (selective_scan(x, dt, rates, b, c) + full_precision(self.D) * x) * F.silu(z)
        read = self.norm(queries)
        y = y.to(read.dtype).unsqueeze(1)  # one head: (B, 1, M, d)
        out = softmax_attention(read.unsqueeze(1), y, y, scale=self.d_model**-0.5, dropout_p=self.active_dropout)
        return self.out_proj(out.squeeze(1).to(values.dtype))


class RWKVAttention(AttentionFunction):
    """Exponentially decayed sums over the past keys and values, gated by the queries (RWKV, arXiv:2305.13048).

    With ``w = exp(-exp(decay))`` and ``e = exp(clamp(k, -10, 10))``, step ``t`` reads
    ``(Σ_{s<t} w^(t-1-s) e_s v_s + exp(bonus) e_t v_t) / (Σ_{s<t} w^(t-1-s) e_s + exp(bonus) e_t + 1e-6)``.
    Row ``i`` of the queries reads step ``min(i, M-1)``, times ``sigmoid(r)``; so only the first ``N`` keys
    count. Scans in float32 when the input is half precision; ``dropout`` is unused.

    Parameters: ``r_proj``, ``k_proj``, ``v_proj``, ``out_proj``; ``decay`` and ``bonus`` (H, hd).

    Raises:
        CanvasError: ``n_heads`` does not divide ``d_model``.
    """

    def __init__(self, d_model: int, n_heads: int = 4, dropout: float = 0.0) -> None:
        super().__init__(d_model, n_heads, dropout)
        check_head_count(d_model, n_heads)
        self.head_dim = d_model // n_heads
        self.r_proj = nn.Linear(d_model, d_model)
        self.k_proj = nn.Linear(d_model, d_model)
        self.v_proj = nn.Linear(d_model, d_model)
        self.out_proj = nn.Linear(d_model, d_model)
        self.decay = nn.Parameter(torch.randn(n_heads, self.head_dim) * 0.01 - 5.0)
        self.bonus = nn.Parameter(torch.zeros(n_heads, self.head_dim))

    def forward(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """``queries (B, N, d)``, ``keys (B, M, d)``, ``values (B, M, d)`` to ``(B, N, d)``."""
        self.check_inputs(queries, keys, values)
        n_queries = queries.shape[1]
        r = self.r_proj(queries)
        k = full_precision(self.k_proj(keys[:, :n_queries]))
        v = full_precision(self.v_proj(values[:, :n_queries]))
        n_steps = k.shape[1]
        if n_steps == 0:
            wkv = v.sum(1, keepdim=True).expand(-1, n_queries, -1)  # zeros
            return self.out_proj(torch.sigmoid(r) * wkv.to(r.dtype))
        # Heads lie side by side in the width, so (H, hd) parameters flatten to (d,).
        strength = torch.exp(k.clamp(-10.0, 10.0))
        factor = torch.exp(-torch.exp(full_precision(self.decay))).flatten()
        inputs = torch.cat((strength * v, strength), dim=-1)  # (B, M, 2 d)
        sums = linear_scan(factor.repeat(2), inputs)
        past = F.pad(sums[:, :-1], (0, 0, 1, 0))  # what lies before each step
        past_values, past_strength = past.chunk(2, dim=-1)
        now = torch.exp(full_precision(self.bonus)).flatten() * strength
        wkv = (past_values + now * v) / (past_strength + now + 1e-6)
        if n_queries > n_steps:
            wkv = torch.cat((wkv, wkv[:, -1:].expand(-1, n_queries - n_steps, -1)), dim=1)
        return self.out_proj(torch.sigmoid(r) * wkv.to(r.dtype))
