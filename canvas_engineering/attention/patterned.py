"""Attention over a part of the keys: local windows, fixed random subsets, the largest logits, expert chunks."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from canvas_engineering.attention.base import (
    AttentionFunction,
    ProjectedAttention,
    check_positive,
    map_query_chunks,
    softmax_attention,
)
from canvas_engineering.attention.dense import CrossAttention
from canvas_engineering.attention.key_pattern import (
    KeyIndices,
    KeyRanges,
    local_key_ranges,
    random_key_indices,
)
from canvas_engineering.errors import CanvasError

#: Queries of one tile of the banded computation, at least.
BAND_ROWS = 32
#: A gathered key costs about as much as this many keys of a dense, masked row.
GATHER_COST = 64
#: Lowered patterns that a module keeps on the device.
KEPT_PATTERNS = 8


class _Lowered(dict[Hashable, tuple[Tensor, ...]]):
    """Key patterns as device tensors; the oldest goes when there are too many."""

    def keep(self, key: Hashable, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if len(self) >= KEPT_PATTERNS:
            del self[next(iter(self))]
        self[key] = tensors
        return tensors


class LocalAttention(ProjectedAttention):
    """Softmax attention in a window around the query's own place (Beltagy et al., 2020, arXiv:2004.05150).

    Key ``j`` of ``M`` stands at place ``floor(j N / M)`` among ``N`` queries (at ``j`` when ``M == N``), and
    query ``i`` reads the places within ``window_size // 2`` of ``i``. A query whose window holds no key gives
    0 before ``out_proj``. Parameters: the four projections.

    Raises:
        CanvasError: ``window_size`` below 0.
    """

    def __init__(self, d_model: int, n_heads: int = 4, dropout: float = 0.0, window_size: int = 8) -> None:
        super().__init__(d_model, n_heads, dropout)
        if window_size < 0:
            raise CanvasError(f"window_size must be at least 0, got window_size={window_size}")
        self.window_size = window_size
        self._lowered = _Lowered()

    def key_pattern(self, n_queries: int, n_keys: int, group_id: int = 0) -> KeyRanges:
        """The half-open range of keys of every query; the same for every group."""
        return local_key_ranges(n_queries, n_keys, self.window_size // 2)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The kernel over the window: ``q (B, H, N, hd)``, ``k``, ``v (B, H, M, hd)`` to ``(B, H, N, hd)``."""
        if q.numel() == 0 or k.shape[-2] == 0:
            return softmax_attention(q, k, v, scale=self.kernel_scale)
        n_queries = q.shape[-2]
        key_index, mask, empty = self._tiles(n_queries, k.shape[-2], q.device)
        n_tiles, rows, span = mask.shape
        if n_tiles == 1:
            out = softmax_attention(q, k, v, scale=self.kernel_scale, dropout_p=self.active_dropout, mask=mask)
            return out.masked_fill(empty, 0.0)
        # Tiles of queries, each with the keys that its windows cover: (B * H, tiles, rows | span, hd).
        q_tiles = F.pad(q.flatten(0, 1), (0, 0, 0, n_tiles * rows - n_queries)).unflatten(1, (n_tiles, rows))
        k_tiles, v_tiles = (x.flatten(0, 1).index_select(1, key_index).unflatten(1, (n_tiles, span)) for x in (k, v))
        out = softmax_attention(
            q_tiles, k_tiles, v_tiles, scale=self.kernel_scale, dropout_p=self.active_dropout, mask=mask
        )
        return out.flatten(1, 2)[:, :n_queries].unflatten(0, q.shape[:2]).masked_fill(empty, 0.0)

    @torch.compiler.disable  # NumPy, once per shape
    def _tiles(self, n_queries: int, n_keys: int, device: torch.device) -> tuple[Tensor, ...]:
        """(key_index (tiles * span,), mask (tiles, rows, span), empty (N, 1)) of the banded computation."""
        cache_key = (n_queries, n_keys, self.window_size, device)
        if cache_key in self._lowered:
            return self._lowered[cache_key]
        pattern = self.key_pattern(n_queries, n_keys)
        rows = max(BAND_ROWS, self.window_size)
        n_tiles = -(-n_queries // rows)
        # Rows that pad the last tile repeat its last query.
        row = np.minimum(np.arange(n_tiles * rows), n_queries - 1).reshape(n_tiles, rows)
        lo, hi = pattern.lo[row], pattern.hi[row]
        span = int((hi[:, -1] - lo[:, 0]).max())
        if 2 * span > n_keys:  # tiles would repeat most keys
            row, lo, hi = np.arange(n_queries)[None], pattern.lo[None], pattern.hi[None]
            n_tiles, span = 1, n_keys
        first = np.minimum(lo[:, :1], n_keys - span)  # (tiles, 1)
        key_index = first + np.arange(span)  # (tiles, span)
        mask = (key_index[:, None] >= lo[..., None]) & (key_index[:, None] < hi[..., None])
        # Softmax needs one key per row; the rows that have none are set to 0 afterwards.
        mask |= (lo == hi)[..., None]
        empty = (pattern.lo == pattern.hi)[:, None]
        lowered = tuple(torch.from_numpy(x).to(device) for x in (key_index.reshape(-1), mask, empty))
        return self._lowered.keep(cache_key, lowered)


class RandomFixedAttention(ProjectedAttention):
    """Softmax attention of every query over a fixed random subset of ``min(n_random, M)`` keys.

    The subsets are a pure function of ``pattern_seed``, the number of queries and keys and the group, so they
    never change between calls, devices or processes. The seed is drawn from torch's default generator at
    construction and saved with the module. Checkpoints of 0.5.0, which did not save its pattern, load with
    ``strict=True`` and leave the seed as it is.

    Parameters: the four projections; buffer ``pattern_seed``, () int64.

    Raises:
        CanvasError: ``n_random`` below 1.
    """

    pattern_seed: Tensor

    def __init__(self, d_model: int, n_heads: int = 4, dropout: float = 0.0, n_random: int = 8) -> None:
        super().__init__(d_model, n_heads, dropout)
        check_positive("n_random", n_random)
        self.n_random = n_random
        self.register_buffer("pattern_seed", torch.empty((), dtype=torch.int64, device="cpu").random_())
        self._seed_read: tuple[Tensor, int, int] | None = None
        self._lowered = _Lowered()

    @property
    def seed(self) -> int:
        """The value of ``pattern_seed``, read from its device only after it changed."""
        buffer = self.pattern_seed
        if buffer.is_inference():  # such tensors keep no version, so a change cannot be noticed
            return int(buffer)
        if self._seed_read is None or self._seed_read[0] is not buffer or self._seed_read[1] != buffer._version:
            self._seed_read = (buffer, buffer._version, int(buffer))
        return self._seed_read[2]

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if prefix + "pattern_seed" in missing_keys:  # a checkpoint of 0.5.0
            missing_keys.remove(prefix + "pattern_seed")

    def key_pattern(self, n_queries: int, n_keys: int, group_id: int = 0) -> KeyIndices:
        """The ``min(n_random, n_keys)`` keys of every query of the group ``group_id``."""
        return random_key_indices(self.seed, n_queries, n_keys, self.n_random, group_id)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The kernel over group 0's subsets: ``q (B, H, N, hd)``, ``k``, ``v (B, H, M, hd)`` to ``(B, H, N, hd)``."""
        n_queries, n_keys = q.shape[-2], k.shape[-2]
        dropout_p, scale = self.active_dropout, self.kernel_scale
        if q.numel() == 0 or n_keys <= self.n_random:
            return softmax_attention(q, k, v, scale=scale, dropout_p=dropout_p)
        dense = n_keys <= GATHER_COST * self.n_random
        pattern = self._lower(n_queries, n_keys, dense, q.device)
        if dense:
            return softmax_attention(q, k, v, scale=scale, dropout_p=dropout_p, mask=pattern)

        def rows(q: Tensor, index: Tensor, k: Tensor, v: Tensor) -> Tensor:
            keys, values = (x[:, :, index] for x in (k, v))  # (B, H, rows, k, hd)
            logits = (keys @ q.unsqueeze(-1)).squeeze(-1) * scale  # (B, H, rows, k)
            weights = F.dropout(logits.softmax(-1), dropout_p)
            return (weights.unsqueeze(-2) @ values).squeeze(-2)

        row_elements = q.shape[0] * q.shape[1] * self.n_random * self.head_dim
        return map_query_chunks(rows, (q, pattern), (k, v), row_elements, draws_random=dropout_p > 0)

    @torch.compiler.disable  # NumPy, once per shape and seed
    def _lower(self, n_queries: int, n_keys: int, dense: bool, device: torch.device) -> Tensor:
        """The pattern of group 0 on the device: (N, M) bool where ``dense``, else (N, k) key indices."""
        cache_key = (self.seed, self.n_random, n_queries, n_keys, dense, device)
        if cache_key in self._lowered:
            return self._lowered[cache_key][0]
        index = torch.from_numpy(self.key_pattern(n_queries, n_keys).index).to(device)
        if dense:
            allowed = torch.zeros(n_queries, n_keys, dtype=torch.bool, device=device)
            index = allowed.scatter_(1, index, True)
        return self._lowered.keep(cache_key, (index,))[0]


class SparseAttention(ProjectedAttention):
    """Softmax attention over the logits that reach the row's ``top_k``-th largest (Zhao et al., arXiv:1912.11637).

    Equal logits at the threshold are all kept. Long inputs are computed over slices of the queries.
    Parameters: the four projections.

    Raises:
        CanvasError: ``top_k`` below 1.
    """

    def __init__(self, d_model: int, n_heads: int = 4, dropout: float = 0.0, top_k: int = 8) -> None:
        super().__init__(d_model, n_heads, dropout)
        check_positive("top_k", top_k)
        self.top_k = top_k

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The kernel: ``q (B, H, N, hd)``, ``k``, ``v (B, H, M, hd)`` to ``(B, H, N, hd)``."""
        dropout_p, n_keys = self.active_dropout, k.shape[-2]
        if q.numel() == 0 or n_keys <= self.top_k:  # every logit is kept
            return softmax_attention(q, k, v, scale=self.kernel_scale, dropout_p=dropout_p)

        def rows(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            logits = (q @ k.transpose(-2, -1)) * self.kernel_scale  # (B, H, rows, M)
            threshold = logits.detach().topk(self.top_k, dim=-1, sorted=False).values.amin(-1, keepdim=True)
            weights = logits.masked_fill(logits < threshold, float("-inf")).softmax(-1)
            return F.dropout(weights, dropout_p) @ v

        return map_query_chunks(rows, (q,), (k, v), q.shape[0] * q.shape[1] * n_keys, draws_random=dropout_p > 0)


class MixtureAttention(AttentionFunction):
    """Each expert attends to its own chunk of the keys; a router mixes the best experts of every query.

    The keys are cut into ``n_experts`` contiguous chunks. The ``top_k_experts`` largest router logits of a
    query, through a softmax, weight the outputs of those experts (Shazeer et al., 2017, arXiv:1701.06538).
    Parameters: ``experts.{i}.*`` (the four projections each) and ``router``, Linear(d, n_experts).

    Raises:
        CanvasError: ``n_experts`` or ``top_k_experts`` below 1.
    """

    activation = CrossAttention.activation

    def __init__(
        self,
        d_model: int,
        n_heads: int = 4,
        dropout: float = 0.0,
        n_experts: int = 4,
        top_k_experts: int = 2,
    ) -> None:
        super().__init__(d_model, n_heads, dropout)
        check_positive("n_experts", n_experts)
        check_positive("top_k_experts", top_k_experts)
        self.n_experts = n_experts
        self.top_k_experts = min(top_k_experts, n_experts)
        self.experts = nn.ModuleList(CrossAttention(d_model, n_heads, dropout) for _ in range(n_experts))
        self.router = nn.Linear(d_model, n_experts)
        self.head_dim = d_model // n_heads
        self.kernel_scale: float = self.head_dim**-0.5

    def expert_ranges(self, n_keys: int) -> list[tuple[int, int]]:
        """The half-open chunk ``(start, stop)`` of the keys of every expert; the last takes the rest."""
        size = max(1, n_keys // self.n_experts)
        starts = [min(e * size, n_keys) for e in range(self.n_experts)]
        return list(zip(starts, [*starts[1:], n_keys], strict=True))

    def mixing_weights(self, queries: Tensor) -> Tensor:
        """``queries (B, N, d)`` to the weight of every expert ``(B, N, n_experts)``, 0 for those not chosen."""
        logits = self.router(queries)
        best, expert = logits.topk(self.top_k_experts, dim=-1)
        weights = best.softmax(-1)
        return torch.zeros_like(logits, dtype=weights.dtype).scatter(-1, expert, weights)

    def combine(self, expert_outputs: Sequence[Tensor], weights: Tensor) -> Tensor:
        """Finished outputs of the experts, each ``(B, N, d)``, and ``weights (B, N, n_experts)`` to ``(B, N, d)``."""
        total = weights[..., :1] * expert_outputs[0]
        for e, out in enumerate(expert_outputs[1:], start=1):
            total = torch.addcmul(total, weights[..., e : e + 1], out.to(total.dtype))
        return total

    def forward(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """``queries (B, N, d)``, ``keys (B, M, d)``, ``values (B, M, d)`` to ``(B, N, d)``."""
        self.check_inputs(queries, keys, values)
        outputs = [
            expert(queries, keys[:, start:stop], values[:, start:stop])
            for expert, (start, stop) in zip(self.experts, self.expert_ranges(keys.shape[1]), strict=True)
        ]
        return self.combine(outputs, self.mixing_weights(queries))
