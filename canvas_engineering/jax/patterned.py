"""Attention over a part of the keys: local windows, fixed random subsets, the largest logits, expert chunks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from canvas_engineering.attention.key_pattern import (
    IntArray,
    KeyIndices,
    KeyRanges,
    local_key_ranges,
    random_key_indices,
)
from canvas_engineering.errors import CanvasError
from canvas_engineering.jax.base import (
    AttentionFunction,
    ProjectedAttention,
    attention_logits,
    check_positive,
    map_query_chunks,
    masked_softmax,
    softmax_attention,
)
from canvas_engineering.jax.dense import CrossAttention
from canvas_engineering.jax.params import Params, dropout, full_precision, init_linear, linear

#: A gathered key costs about as much as this many keys of a dense, masked row.
GATHER_COST = 64


@dataclass(frozen=True)
class LocalAttention(ProjectedAttention):
    """Softmax attention in a window around the query's own place (Beltagy et al., 2020, arXiv:2004.05150).

    Key ``j`` of ``M`` stands at place ``floor(j N / M)`` among ``N`` queries (at ``j`` when ``M == N``), and
    query ``i`` reads the places within ``window_size // 2`` of ``i``. A query whose window holds no key gives
    0 before ``out_proj``. Parameters: the four projections.

    Raises:
        CanvasError: ``window_size`` below 0.
    """

    window_size: int = 8
    planned: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window_size < 0:
            raise CanvasError(f"window_size must be at least 0, got window_size={self.window_size}")

    def key_pattern(self, n_queries: int, n_keys: int, group_id: int = 0) -> KeyRanges:
        """The half-open range of keys of every query; the same for every group."""
        return local_key_ranges(n_queries, n_keys, self.window_size // 2)

    def kernel(self, q: Array, k: Array, v: Array, rng: Array | None) -> Array:
        """The window: ``q (B, H, N, hd)``, ``k``, ``v (B, H, M, hd)`` to ``(B, H, N, hd)``."""
        pattern = self.key_pattern(q.shape[-2], k.shape[-2])
        widest = int((pattern.hi - pattern.lo).max(initial=0))
        if widest == 0:
            return jnp.zeros_like(q)
        index = np.minimum(pattern.lo[:, None] + np.arange(widest), k.shape[-2] - 1)
        allowed = np.arange(widest) < (pattern.hi - pattern.lo)[:, None]
        return _indexed_attention(q, k, v, index, allowed, self.kernel_scale, self.dropout, rng)


@dataclass(frozen=True)
class RandomFixedAttention(ProjectedAttention):
    """Softmax attention of every query over a fixed random subset of ``min(n_random, M)`` keys.

    The subsets are a pure function of ``pattern_seed``, the number of queries and keys and the group: the same
    ones as in torch for the same seed. They decide which pairs are computed, so the seed is part of the static
    description rather than of the parameters; ``AttentionDispatcher.from_torch`` takes it from the torch module.

    Parameters: the four projections.

    Raises:
        CanvasError: ``n_random`` below 1.
    """

    n_random: int = 8
    pattern_seed: int = 0
    planned: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("n_random", self.n_random)

    def key_pattern(self, n_queries: int, n_keys: int, group_id: int = 0) -> KeyIndices:
        """The ``min(n_random, n_keys)`` keys of every query of the group ``group_id``."""
        return random_key_indices(self.pattern_seed, n_queries, n_keys, self.n_random, group_id)

    def kernel(self, q: Array, k: Array, v: Array, rng: Array | None) -> Array:
        """Group 0's subsets: ``q (B, H, N, hd)``, ``k``, ``v (B, H, M, hd)`` to ``(B, H, N, hd)``."""
        if k.shape[-2] <= self.n_random:
            return softmax_attention(q, k, v, scale=self.kernel_scale, rate=self.dropout, rng=rng)
        index = self.key_pattern(q.shape[-2], k.shape[-2]).index
        allowed = np.ones(index.shape, np.bool_)
        return _indexed_attention(q, k, v, index, allowed, self.kernel_scale, self.dropout, rng)


def _indexed_attention(
    q: Array,
    k: Array,
    v: Array,
    index: IntArray,
    allowed: np.ndarray[Any, np.dtype[np.bool_]],
    scale: float,
    rate: float,
    rng: Array | None,
) -> Array:
    """Query ``i`` of ``q (B, H, N, hd)`` reads the keys ``index[i, j]`` where ``allowed[i, j]``, both ``(N, w)``."""
    n_queries, n_keys = q.shape[-2], k.shape[-2]
    lanes = q.shape[0] * q.shape[1]
    if n_keys <= GATHER_COST * index.shape[1]:
        dense = np.zeros((n_queries, n_keys), np.bool_)
        row, place = np.nonzero(allowed)
        dense[row, index[row, place]] = True

        def masked(q: Array, mask: Array, rng: Array | None) -> Array:
            weights = masked_softmax(attention_logits(q, k, scale), mask)
            return (dropout(rng, rate, weights) @ full_precision(v)).astype(v.dtype)

        return map_query_chunks(masked, (q, jnp.asarray(dense)), lanes * n_keys, rng)

    def gathered(q: Array, index: Array, mask: Array, rng: Array | None) -> Array:
        keys, values = (full_precision(x[:, :, index]) for x in (k, v))  # (B, H, rows, w, hd)
        logits = (keys @ full_precision(q)[..., None])[..., 0] * scale  # (B, H, rows, w)
        weights = dropout(rng, rate, masked_softmax(logits, mask))
        return (weights[..., None, :] @ values)[..., 0, :].astype(v.dtype)

    by_row = (q, jnp.asarray(index.astype(np.int32)), jnp.asarray(allowed))
    return map_query_chunks(gathered, by_row, lanes * index.shape[1] * q.shape[-1], rng)


@dataclass(frozen=True)
class SparseAttention(ProjectedAttention):
    """Softmax attention over the logits that reach the row's ``top_k``-th largest (Zhao et al., arXiv:1912.11637).

    Equal logits at the threshold are all kept. Long inputs are computed over slices of the queries.
    Parameters: the four projections.

    Raises:
        CanvasError: ``top_k`` below 1.
    """

    top_k: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("top_k", self.top_k)

    def kernel(self, q: Array, k: Array, v: Array, rng: Array | None) -> Array:
        """``q (B, H, N, hd)``, ``k``, ``v (B, H, M, hd)`` to ``(B, H, N, hd)``."""
        n_keys = k.shape[-2]
        if n_keys <= self.top_k:  # every logit is kept
            return softmax_attention(q, k, v, scale=self.kernel_scale, rate=self.dropout, rng=rng)

        def rows(q: Array, rng: Array | None) -> Array:
            logits = attention_logits(q, k, self.kernel_scale)  # (B, H, rows, M)
            threshold = lax.top_k(lax.stop_gradient(logits), self.top_k)[0][..., -1:]
            weights = masked_softmax(logits, logits >= threshold)
            return (dropout(rng, self.dropout, weights) @ full_precision(v)).astype(v.dtype)

        return map_query_chunks(rows, (q,), q.shape[0] * q.shape[1] * n_keys, rng)


@dataclass(frozen=True)
class MixtureAttention(AttentionFunction):
    """Each expert attends to its own chunk of the keys; a router mixes the best experts of every query.

    The keys are cut into ``n_experts`` contiguous chunks. The ``top_k_experts`` largest router logits of a
    query, through a softmax, weight the outputs of those experts (Shazeer et al., 2017, arXiv:1701.06538).
    Parameters: ``experts.{i}.*`` (the four projections each) and ``router``, Linear(d, n_experts).

    Raises:
        CanvasError: ``n_experts`` or ``top_k_experts`` below 1.
    """

    n_experts: int = 4
    top_k_experts: int = 2
    planned: ClassVar[bool] = True
    activation: ClassVar[str] = CrossAttention.activation

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("n_experts", self.n_experts)
        check_positive("top_k_experts", self.top_k_experts)
        _ = self.expert  # checks the heads

    @property
    def expert(self) -> CrossAttention:
        """What every expert is."""
        return CrossAttention(self.d_model, self.n_heads, self.dropout)

    def init(self, key: Array, dtype: Any = jnp.float32) -> Params:
        """Experts and router."""
        key_router, *keys = jax.random.split(key, self.n_experts + 1)
        return {
            "experts": {str(e): self.expert.init(k, dtype) for e, k in enumerate(keys)},
            "router": init_linear(key_router, self.d_model, self.n_experts, dtype),
        }

    def expert_ranges(self, n_keys: int) -> list[tuple[int, int]]:
        """The half-open chunk ``(start, stop)`` of the keys of every expert; the last takes the rest."""
        size = max(1, n_keys // self.n_experts)
        starts = [min(e * size, n_keys) for e in range(self.n_experts)]
        return list(zip(starts, [*starts[1:], n_keys], strict=True))

    def mixing_weights(self, params: Params, queries: Array) -> Array:
        """``queries (B, N, d)`` to the weight of every expert ``(B, N, n_experts)``, 0 for those not chosen."""
        logits = linear(params["router"], queries)
        best, chosen = lax.top_k(logits, min(self.top_k_experts, self.n_experts))
        one_hot = jax.nn.one_hot(chosen, self.n_experts, dtype=logits.dtype)  # (B, N, k, n_experts)
        return (jax.nn.softmax(best, axis=-1)[..., None] * one_hot).sum(-2)

    def _attend(self, params: Params, queries: Array, keys: Array, values: Array, rng: Array | None) -> Array:
        mixing = self.mixing_weights(params, queries)
        total = jnp.zeros_like(queries)
        for e, (start, stop) in enumerate(self.expert_ranges(keys.shape[1])):
            out = self.expert.apply(
                params["experts"][str(e)],
                queries,
                keys[:, start:stop],
                values[:, start:stop],
                rng=None if rng is None else jax.random.fold_in(rng, e),
            )
            total = total + mixing[..., e : e + 1] * out
        return total
