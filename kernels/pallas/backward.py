"""The backward kernels: dQ along the row list, dK and dV along the column list; no atomics, no second softmax.

For a set with probabilities ``p`` (recomputed from the log-sum-exp), weights ``w`` and dropout mask ``m``::

    dP = m (dO vᵀ)       dS = p (w (dP - delta) + dlse)       delta = sum_d dO o
    dQ = scale dS k      dK = scale dSᵀ q                     dV = (w p m)ᵀ dO

(sigmoid: ``dS = w p (1 - p) dP``). ``o`` is the set's own output, which the forward pass keeps where it differs
from the output of the call; summed over heads, ``delta`` is also the gradient of the row weights. The vectors that
belong to a set (log-sum-exp, delta, weight, dlse) come to the kernels as the rows of one array, because each array
costs a copy per step.

The row kernel has the keys along the lanes, the column kernel the queries: that way the product that each of them
accumulates needs no transposition, and in the column kernel the per-query vectors lie along the lanes already.
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
    LAST_OF_TILE,
    MASKED,
)
from canvas_engineering.kernels.pallas.tile_math import (
    LANES,
    LOG2_E,
    NATURAL,
    TRANSPOSED_RHS,
    column,
    kept,
    mask_bits,
    product,
    widen,
)
from canvas_engineering.kernels.pallas.tiles import vmem_bytes


class SetRows:
    """The per-query vectors of the sets, stacked: ``(B * Hq, num_sets, rows, block_q)`` float32, and their names."""

    def __init__(self, **rows: Array | None) -> None:
        given = {name: row for name, row in rows.items() if row is not None}  # each (B * Hq, num_sets, 1, block_q)
        self.names = tuple(given)
        self.array = jnp.concatenate(list(given.values()), axis=2) if given else None

    def operand(self, index: Any) -> list[Operand]:
        if self.array is None:
            return []
        return [Operand("set_rows", self.array, (None, None, *self.array.shape[2:]), index)]


def backward_rows(
    config: KernelConfig,
    arrays: PlanArrays,
    q: Array,  # (B * Hq, q_tiles * block_q, D)
    k: Array,  # (B * Hkv, kv_tiles * block_kv, D)
    v: Array,  # (B * Hkv, kv_tiles * block_kv, D)
    grad_out: Array,  # like q
    set_rows: SetRows,
) -> Array:
    """dQ like ``q``."""
    heads, _, head_dim = q.shape
    group = heads // k.shape[0]
    bq, bkv = config.block_q, config.block_kv
    operands = [
        Operand("q", q, (None, bq, head_dim), lambda s: (s.head, s.tile, 0)),
        Operand("k", k, (None, bkv, head_dim), lambda s: (s.kv_head(group), s.other, 0)),
        Operand("v", v, (None, bkv, head_dim), lambda s: (s.kv_head(group), s.other, 0)),
        Operand("grad_out", grad_out, (None, bq, head_dim), lambda s: (s.head, s.tile, 0)),
        *set_rows.operand(lambda s: (s.head, s.softmax_set(s.tile), 0, 0)),
    ]
    if arrays.row_masks is not None:
        words = arrays.row_masks.shape[1]
        operands.append(Operand("words", arrays.row_masks, (None, words, bkv), lambda s: (s.mask, 0, 0)))
    if arrays.q_hash is not None and arrays.kv_hash is not None:
        operands.append(Operand("q_hash", arrays.q_hash, (None, None, 1, bq), lambda s: (s.head, s.tile, 0, 0)))
        operands.append(Operand("kv_hash", arrays.kv_hash, (None, 1, bkv), lambda s: (s.other, 0, 0)))

    scratch: dict[str, tuple[tuple[int, ...], Any]] = {"acc": ((bq, head_dim), jnp.float32)}
    scratch |= {f"{name}_column": ((bq, LANES), jnp.float32) for name in set_rows.names}
    if config.dropout_p:
        scratch["q_hash_column"] = ((bq, LANES), jnp.int32)

    (dq,) = launch(
        partial(_rows_kernel, config, set_rows.names),
        name="canvas_attention_dq",
        heads=heads,
        form=config.rows,
        words=arrays.rows,
        operands=operands,
        results=[Result("dq", q.shape, q.dtype, (None, bq, head_dim), lambda s: (s.head, s.tile, 0))],
        scratch=scratch,
        cost=Cost(6 * bq * bkv * head_dim, bq * bkv, 2 * bkv * head_dim * k.dtype.itemsize),
        vmem_bytes=vmem_bytes(bq, bkv, head_dim, q.dtype.itemsize),
        interpret=config.interpret,
    )
    return dq


def _rows_kernel(config: KernelConfig, set_rows: tuple[str, ...], refs: Any, step: Step) -> None:
    flags = step.flags

    @pl.when(flags & FIRST_OF_TILE != 0)
    def _start_tile() -> None:
        refs.acc[...] = jnp.zeros_like(refs.acc)
        if config.dropout_p:
            refs.q_hash_column[...] = column(refs.q_hash[...])

    if set_rows:

        @pl.when(flags & FIRST_OF_SET != 0)
        def _start_set() -> None:
            for i, name in enumerate(set_rows):
                getattr(refs, f"{name}_column")[...] = column(refs.set_rows[i : i + 1])

    def accumulate(masked: bool) -> None:
        wide = {name: widen(getattr(refs, f"{name}_column")[...], config.block_kv) for name in set_rows}
        scores = product(refs.q[...], refs.k[...], TRANSPOSED_RHS)  # (block_q, block_kv)
        if masked:
            scores = jnp.where(mask_bits(refs.words[...], config.block_q), scores, -jnp.inf)
        prob = _probabilities(config, scores, wide)
        dp = product(refs.grad_out[...], refs.v[...], TRANSPOSED_RHS)
        if config.dropout_p:
            dp = _drop(config, dp, widen(refs.q_hash_column[...], config.block_kv), refs.kv_hash[...])
        ds = _score_gradient(config, prob, dp, wide)
        refs.acc[...] += product(ds.astype(refs.k.dtype), refs.k[...], NATURAL)

    _for_each_kind(config.rows.has_full, config.rows.has_masked, flags, accumulate)

    @pl.when(flags & LAST_OF_TILE != 0)
    def _finish_tile() -> None:
        refs.dq[...] = (refs.acc[...] * config.scale).astype(refs.dq.dtype)


def backward_cols(
    config: KernelConfig,
    arrays: PlanArrays,
    q: Array,  # (B * Hq, q_tiles * block_q, D)
    k: Array,  # (B * Hkv, kv_tiles * block_kv, D)
    v: Array,  # (B * Hkv, kv_tiles * block_kv, D)
    grad_out: Array,  # like q
    set_rows: SetRows,
) -> tuple[Array, Array]:
    """dK and dV, like ``k`` and ``v``: query heads that share a kv head are summed on chip."""
    heads, _, head_dim = k.shape
    group = q.shape[0] // heads
    bq, bkv = config.block_q, config.block_kv

    def q_head(s: Step) -> Any:
        return s.head if group == 1 else s.head * group + s.sub

    operands = [
        Operand("q", q, (None, bq, head_dim), lambda s: (q_head(s), s.other, 0)),
        Operand("k", k, (None, bkv, head_dim), lambda s: (s.head, s.tile, 0)),
        Operand("v", v, (None, bkv, head_dim), lambda s: (s.head, s.tile, 0)),
        Operand("grad_out", grad_out, (None, bq, head_dim), lambda s: (q_head(s), s.other, 0)),
        *set_rows.operand(lambda s: (q_head(s), s.softmax_set(s.other), 0, 0)),
    ]
    if arrays.col_masks is not None:
        words = arrays.col_masks.shape[1]
        operands.append(Operand("words", arrays.col_masks, (None, words, bq), lambda s: (s.mask, 0, 0)))
    if arrays.q_hash is not None and arrays.kv_hash is not None:
        operands.append(Operand("q_hash", arrays.q_hash, (None, None, 1, bq), lambda s: (q_head(s), s.other, 0, 0)))
        operands.append(Operand("kv_hash", arrays.kv_hash, (None, 1, bkv), lambda s: (s.tile, 0, 0)))

    scratch: dict[str, tuple[tuple[int, ...], Any]] = {
        "dk_acc": ((bkv, head_dim), jnp.float32),
        "dv_acc": ((bkv, head_dim), jnp.float32),
    }
    if config.dropout_p:
        scratch["kv_hash_column"] = ((bkv, LANES), jnp.int32)

    dk, dv = launch(
        partial(_cols_kernel, config, set_rows.names, group),
        name="canvas_attention_dkv",
        heads=heads,
        sub_heads=group,
        form=config.cols,
        words=arrays.cols,
        operands=operands,
        results=[
            Result("dk", k.shape, k.dtype, (None, bkv, head_dim), lambda s: (s.head, s.tile, 0)),
            Result("dv", v.shape, v.dtype, (None, bkv, head_dim), lambda s: (s.head, s.tile, 0)),
        ],
        scratch=scratch,
        cost=Cost(8 * bq * bkv * head_dim, bq * bkv, 2 * bq * head_dim * q.dtype.itemsize),
        vmem_bytes=vmem_bytes(bq, bkv, head_dim, q.dtype.itemsize),
        interpret=config.interpret,
    )
    return dk, dv


def _cols_kernel(config: KernelConfig, set_rows: tuple[str, ...], group: int, refs: Any, step: Step) -> None:
    flags = step.flags
    first = flags & FIRST_OF_TILE != 0
    last = flags & LAST_OF_TILE != 0

    @pl.when(first if group == 1 else first & (step.sub == 0))
    def _start_tile() -> None:
        refs.dk_acc[...] = jnp.zeros_like(refs.dk_acc)
        refs.dv_acc[...] = jnp.zeros_like(refs.dv_acc)
        if config.dropout_p:
            refs.kv_hash_column[...] = column(refs.kv_hash[...])

    def accumulate(masked: bool) -> None:
        # Transposed throughout: (block_kv, block_q); the per-query vectors are rows (1, block_q).
        rows = {name: refs.set_rows[i : i + 1] for i, name in enumerate(set_rows)}
        scores = product(refs.k[...], refs.q[...], TRANSPOSED_RHS)
        if masked:
            scores = jnp.where(mask_bits(refs.words[...], config.block_kv), scores, -jnp.inf)
        prob = _probabilities(config, scores, rows)
        dp = product(refs.v[...], refs.grad_out[...], TRANSPOSED_RHS)
        dropped = prob
        if config.dropout_p:
            hashes = (widen(refs.kv_hash_column[...], config.block_q), refs.q_hash[...])
            dp, dropped = _drop(config, dp, *hashes), _drop(config, prob, *hashes)
        ds = _score_gradient(config, prob, dp, rows)
        if config.weighted:
            dropped = dropped * rows["weight"]
        refs.dv_acc[...] += product(dropped.astype(refs.grad_out.dtype), refs.grad_out[...], NATURAL)
        refs.dk_acc[...] += product(ds.astype(refs.q.dtype), refs.q[...], NATURAL)

    _for_each_kind(config.cols.has_full, config.cols.has_masked, flags, accumulate)

    @pl.when(last if group == 1 else last & (step.sub == group - 1))
    def _finish_tile() -> None:
        refs.dk[...] = (refs.dk_acc[...] * config.scale).astype(refs.dk.dtype)
        refs.dv[...] = refs.dv_acc[...].astype(refs.dv.dtype)


def _for_each_kind(has_full: bool, has_masked: bool, flags: Any, accumulate: Any) -> None:
    """Full and partial tiles have a body each; a plan without one of them does not compile it."""
    if has_full:
        pl.when(flags & FULL != 0)(partial(accumulate, False))
    if has_masked:
        pl.when(flags & MASKED != 0)(partial(accumulate, True))


def _probabilities(config: KernelConfig, scores: Array, rows: dict[str, Array]) -> Array:
    """Probabilities from the scores; the log-sum-exp among the per-query vectors is in base 2."""
    factor = config.scale * LOG2_E
    if config.activation == "sigmoid":
        return 1 / (1 + jnp.exp2(scores * -factor))
    return jnp.exp2(scores * factor - rows["lse"])


def _drop(config: KernelConfig, x: Array, hash_a: Array, hash_b: Array) -> Array:
    return jnp.where(kept(hash_a, hash_b, config.dropout_p), x * (1 / (1 - config.dropout_p)), 0.0)


def _score_gradient(config: KernelConfig, prob: Array, dp: Array, rows: dict[str, Array]) -> Array:
    """dS; the per-query vectors are broadcast against the tile."""
    if config.activation == "sigmoid":
        ds = prob * (1 - prob) * dp
        return ds * rows["weight"] if config.weighted else ds
    ds = dp - rows["delta"]
    if config.weighted:
        ds = ds * rows["weight"]
    if "grad_lse" in rows:
        ds = ds + rows["grad_lse"]
    return prob * ds
