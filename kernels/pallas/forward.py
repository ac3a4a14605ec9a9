"""The forward kernel: online softmax over the entries of a set, weighted sum over the sets of a q tile.

Scores are ``(block_q, block_kv)`` with the keys along the lanes, as in JAX's Splash kernel. Four things differ.
The grid visits listed entries only. The running sum is kept per lane, so that a tile costs one reduction across
lanes (the maximum) instead of two. Tiles that need no mask have a body of their own. And the normalised output of
a set is added to the tile's output with its row weights, so several softmaxes per row cost one kernel.

Method: M. Milakov, N. Gimelshein, "Online normalizer calculation for softmax" (2018); T. Dao, "FlashAttention-2"
(2023).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl

from canvas_engineering.kernels.pallas.config import KernelConfig, PlanArrays
from canvas_engineering.kernels.pallas.launch import Cost, Operand, Result, Step, launch
from canvas_engineering.kernels.pallas.lowering import (
    FIRST_OF_SET,
    FIRST_OF_TILE,
    FULL,
    LAST_OF_SET,
    LAST_OF_TILE,
    MASKED,
)
from canvas_engineering.kernels.pallas.tile_math import (
    LANES,
    LOG2_E,
    NATURAL,
    NO_KEY,
    TRANSPOSED_RHS,
    as_row,
    column,
    kept,
    mask_bits,
    product,
    widen,
)
from canvas_engineering.kernels.pallas.tiles import vmem_bytes


def forward(
    config: KernelConfig,
    arrays: PlanArrays,
    q: Array,  # (B * Hq, q_tiles * block_q, D)
    k: Array,  # (B * Hkv, kv_tiles * block_kv, D)
    v: Array,  # (B * Hkv, kv_tiles * block_kv, D)
    weight: Array,  # (num_sets, 1, block_q)
    *,
    by_set: bool,
) -> tuple[Array, Array | None, Array | None]:
    """Output like ``q``; log-sum-exp ``(B * Hq, num_sets, 1, block_q)`` (None for sigmoid); outputs by set.

    Args:
        by_set: Also return the unweighted output of every set, ``(B * Hq, num_sets, block_q, D)``, in q's dtype.
    """
    heads, _, head_dim = q.shape
    group = heads // k.shape[0]
    bq, bkv = config.block_q, config.block_kv
    softmax = config.activation == "softmax"

    operands = [
        Operand("q", q, (None, bq, head_dim), lambda s: (s.head, s.tile, 0)),
        Operand("k", k, (None, bkv, head_dim), lambda s: (s.kv_head(group), s.other, 0)),
        Operand("v", v, (None, bkv, head_dim), lambda s: (s.kv_head(group), s.other, 0)),
    ]
    if arrays.row_masks is not None:
        words = arrays.row_masks.shape[1]
        operands.append(Operand("words", arrays.row_masks, (None, words, bkv), lambda s: (s.mask, 0, 0)))
    if config.weighted:
        operands.append(Operand("weight", weight, (None, 1, bq), lambda s: (s.softmax_set(s.tile), 0, 0)))
    if arrays.q_hash is not None and arrays.kv_hash is not None:
        operands.append(Operand("q_hash", arrays.q_hash, (None, None, 1, bq), lambda s: (s.head, s.tile, 0, 0)))
        operands.append(Operand("kv_hash", arrays.kv_hash, (None, 1, bkv), lambda s: (s.other, 0, 0)))

    results = [Result("out", q.shape, q.dtype, (None, bq, head_dim), lambda s: (s.head, s.tile, 0))]
    if softmax:
        shape = (heads, config.num_sets, 1, bq)
        results.append(
            Result("lse", shape, jnp.float32, (None, None, 1, bq), lambda s: (s.head, s.softmax_set(s.tile), 0, 0))
        )
    if by_set:
        shape = (heads, config.num_sets, bq, head_dim)
        results.append(
            Result(
                "set_out", shape, q.dtype, (None, None, bq, head_dim), lambda s: (s.head, s.softmax_set(s.tile), 0, 0)
            )
        )

    scratch: dict[str, tuple[tuple[int, ...], Any]] = {"acc": ((bq, head_dim), jnp.float32)}
    if softmax:
        scratch |= {"row_max": ((bq, LANES), jnp.float32), "row_sum": ((bq, LANES), jnp.float32)}
    if config.multi_set:
        scratch["total"] = ((bq, head_dim), jnp.float32)
    if config.dropout_p:
        scratch["q_hash_column"] = ((bq, LANES), jnp.int32)

    outputs = launch(
        partial(_kernel, config, by_set),
        name="canvas_attention_forward",
        heads=heads,
        form=config.rows,
        words=arrays.rows,
        operands=operands,
        results=results,
        scratch=scratch,
        cost=Cost(
            flops=4 * bq * bkv * head_dim,
            transcendentals=bq * bkv,
            bytes_accessed=2 * bkv * head_dim * k.dtype.itemsize,
        ),
        vmem_bytes=vmem_bytes(bq, bkv, head_dim, q.dtype.itemsize),
        interpret=config.interpret,
    )
    named = dict(zip([r.name for r in results], outputs, strict=True))
    return named["out"], named.get("lse"), named.get("set_out")


def _kernel(config: KernelConfig, by_set: bool, refs: Any, step: Step) -> None:
    flags = step.flags
    softmax = config.activation == "softmax"

    @pl.when(flags & FIRST_OF_SET != 0)
    def _start_set() -> None:
        refs.acc[...] = jnp.zeros_like(refs.acc)
        if softmax:
            refs.row_max[...] = jnp.full_like(refs.row_max, NO_KEY)
            refs.row_sum[...] = jnp.zeros_like(refs.row_sum)

    if config.multi_set or config.dropout_p:

        @pl.when(flags & FIRST_OF_TILE != 0)
        def _start_tile() -> None:
            if config.multi_set:
                refs.total[...] = jnp.zeros_like(refs.total)
            if config.dropout_p:
                refs.q_hash_column[...] = column(refs.q_hash[...])

    if config.rows.has_full:
        pl.when(flags & FULL != 0)(partial(_accumulate, config, refs, masked=False))
    if config.rows.has_masked:
        pl.when(flags & MASKED != 0)(partial(_accumulate, config, refs, masked=True))

    @pl.when(flags & LAST_OF_SET != 0)
    def _finish_set() -> None:
        factor = 1 / (1 - config.dropout_p)  # dropped probabilities are replaced by scaling up the others
        if softmax:
            row_sum = jnp.broadcast_to(refs.row_sum[...].sum(axis=1, keepdims=True), refs.row_sum.shape)
            has_key = row_sum > 0
            refs.lse[...] = as_row(jnp.where(has_key, refs.row_max[...] * config.scale + jnp.log(row_sum), -jnp.inf))
            out = refs.acc[...] * widen(jnp.where(has_key, factor / row_sum, 0.0), refs.acc.shape[1])
        else:
            out = refs.acc[...] * factor if config.dropout_p else refs.acc[...]
        if by_set:
            refs.set_out[...] = out.astype(refs.set_out.dtype)
        if config.weighted:
            out = out * widen(column(refs.weight[...]), out.shape[1])
        if config.multi_set:
            refs.total[...] += out
        else:
            refs.out[...] = out.astype(refs.out.dtype)

    if config.multi_set:

        @pl.when(flags & LAST_OF_TILE != 0)
        def _finish_tile() -> None:
            refs.out[...] = refs.total[...].astype(refs.out.dtype)


def _accumulate(config: KernelConfig, refs: Any, *, masked: bool) -> None:
    """One tile of scores into the running maximum, sum and output of its set."""
    bq, bkv = config.block_q, config.block_kv
    # Scores stay in units of q k; the scale enters in the exponent, where a factor log2(e) is due anyway.
    factor = config.scale * LOG2_E
    scores = product(refs.q[...], refs.k[...], TRANSPOSED_RHS)  # (block_q, block_kv)
    if masked:
        scores = jnp.where(mask_bits(refs.words[...], bq), scores, -jnp.inf)
    if config.activation == "softmax":
        before = refs.row_max[...]  # (block_q, 128), lanes equal
        row_max = jnp.maximum(before, _fold(jnp.maximum, scores).max(axis=1, keepdims=True))
        prob = jnp.exp2((scores - widen(row_max, bkv)) * factor)
        decay = jnp.exp2((before - row_max) * factor)
        refs.row_max[...] = row_max
        refs.row_sum[...] = refs.row_sum[...] * decay + _fold(jnp.add, prob)
        kept_output = refs.acc[...] * widen(decay, refs.acc.shape[1])
    else:
        prob = 1 / (1 + jnp.exp2(scores * -factor))
        kept_output = refs.acc[...]
    if config.dropout_p:
        keep = kept(widen(refs.q_hash_column[...], bkv), refs.kv_hash[...], config.dropout_p)
        prob = jnp.where(keep, prob, 0.0)
    refs.acc[...] = kept_output + product(prob.astype(refs.v.dtype), refs.v[...], NATURAL)


def _fold(operation: Any, x: Array) -> Array:
    """``(n, m * 128)`` to ``(n, 128)``: lane by lane, which needs no exchange between lanes."""
    folded = x[:, :LANES]
    for start in range(LANES, x.shape[1], LANES):
        folded = operation(folded, x[:, start : start + LANES])
    return folded
