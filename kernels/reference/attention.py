"""Block-sparse attention by the decode loop of a plan, forward and backward, in float64.

Nothing here is fast on purpose: it is what the other backends are compared with.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from canvas_engineering.kernels.reference.dropout import keep_mask
from canvas_engineering.plan import BlockSparsePlan

Activation = Literal["softmax", "sigmoid"]
Float64 = NDArray[np.float64]


class Gradients(NamedTuple):
    """Gradients of one call, all float64."""

    q: Float64  # (B, Hq, Nq, D)
    k: Float64  # (B, Hkv, Nkv, D)
    v: Float64  # (B, Hkv, Nkv, D)
    row_weight: Float64  # (num_sets, block_q)


@dataclass(frozen=True)
class _SoftmaxSet:
    """One softmax set of one q tile with its operands; heads are grouped by the kv head that they read."""

    index: int
    rows: NDArray[np.int32]  # (R,) query tokens
    keys: NDArray[np.int32]  # (K,) key tokens of all visited tiles
    q: Float64  # (B, Hkv, group, R, D)
    k: Float64  # (B, Hkv, 1, K, D)
    v: Float64  # (B, Hkv, 1, K, D)
    prob: Float64  # (B, Hkv, group, R, K) softmax or sigmoid, 0 where not allowed
    keep: Float64  # same shape: 0 where dropped, 1 / (1 - p) where kept
    lse: Float64  # (B, Hkv, group, R)
    weight: Float64  # (R,)


@dataclass(frozen=True)
class _Call:
    """The arguments of one call."""

    q: NDArray[Any]
    k: NDArray[Any]
    v: NDArray[Any]
    plan: BlockSparsePlan
    scale: float
    weight: Float64  # (num_sets, block_q)
    activation: Activation
    dropout_p: float
    seed: int
    tiles: list[int]

    @property
    def grouped(self) -> tuple[int, int, int]:
        """Batch, kv heads, query heads per kv head."""
        return self.q.shape[0], self.k.shape[1], self.q.shape[1] // max(self.k.shape[1], 1)


def _call(
    q: NDArray[Any],
    k: NDArray[Any],
    v: NDArray[Any],
    plan: BlockSparsePlan,
    scale: float | None,
    row_weight: NDArray[Any] | None,
    activation: Activation,
    dropout_p: float,
    seed: int | None,
    tiles: Iterable[int] | None,
) -> _Call:
    return _Call(
        q,
        k,
        v,
        plan,
        q.shape[-1] ** -0.5 if scale is None else float(scale),
        np.asarray(plan.row_weight if row_weight is None else row_weight).astype(np.float64),
        activation,
        dropout_p,
        0 if seed is None else seed,
        list(range(plan.num_q_tiles)) if tiles is None else [int(tile) for tile in tiles],
    )


def attention_forward(
    q: NDArray[Any],  # (B, Hq, Nq, D)
    k: NDArray[Any],  # (B, Hkv, Nkv, D)
    v: NDArray[Any],  # (B, Hkv, Nkv, D)
    plan: BlockSparsePlan,
    *,
    scale: float | None = None,
    row_weight: NDArray[Any] | None = None,
    activation: Activation = "softmax",
    dropout_p: float = 0.0,
    seed: int | None = None,
    tiles: Iterable[int] | None = None,
) -> tuple[Float64, Float64]:
    """Output ``(B, Hq, Nq, D)`` and log-sum-exp ``(B, Hq, Nq)``, both float64.

    Args:
        tiles: Compute only the rows of these q tiles, to spot-check large canvases; other rows stay 0.

    The log-sum-exp is that of a row's last softmax set that has a key, so it means something only for plans
    with one set per row; it is ``-inf`` for rows without keys, and for ``activation="sigmoid"``.
    """
    call = _call(q, k, v, plan, scale, row_weight, activation, dropout_p, seed, tiles)
    batch, kv_heads, group = call.grouped
    out = np.zeros((batch, kv_heads, group, *q.shape[2:]))
    lse = np.full((batch, kv_heads, group, q.shape[2]), -np.inf)
    for s in _softmax_sets(call):
        out[..., s.rows, :] += s.weight[:, None] * ((s.prob * s.keep) @ s.v)
        lse[..., s.rows] = np.where(np.isneginf(s.lse), lse[..., s.rows], s.lse)
    return out.reshape(q.shape), lse.reshape(q.shape[:-1])


def attention_backward(
    q: NDArray[Any],
    k: NDArray[Any],
    v: NDArray[Any],
    plan: BlockSparsePlan,
    grad_out: NDArray[Any],  # (B, Hq, Nq, D)
    grad_lse: NDArray[Any] | None = None,  # (B, Hq, Nq), plans with one set per row
    *,
    scale: float | None = None,
    row_weight: NDArray[Any] | None = None,
    activation: Activation = "softmax",
    dropout_p: float = 0.0,
    seed: int | None = None,
    tiles: Iterable[int] | None = None,
) -> Gradients:
    """Gradients of ``sum(out * grad_out) + sum(lse * grad_lse)``, by hand.

    With ``z = scale q kᵀ``, ``p`` the probabilities, ``m`` the scaled dropout mask and ``o = (p m) v``::

        dweight = sum(grad_out o)         do = weight grad_out        dv = (p m)ᵀ do        dp = (do vᵀ) m
        softmax: dz = p (dp - sum_k(p dp) + grad_lse)                 sigmoid: dz = p (1 - p) dp
        dq = scale dz k                   dk = scale dzᵀ q

    Args:
        tiles: Only the contributions of these q tiles.
    """
    call = _call(q, k, v, plan, scale, row_weight, activation, dropout_p, seed, tiles)
    batch, kv_heads, group = call.grouped
    grad = np.asarray(grad_out).astype(np.float64).reshape(batch, kv_heads, group, *q.shape[2:])
    dlse = np.zeros(grad.shape[:-1])
    if grad_lse is not None:
        dlse += np.asarray(grad_lse).astype(np.float64).reshape(dlse.shape)
    dq = np.zeros(grad.shape)
    dk = np.zeros(k.shape)
    dv = np.zeros(v.shape)
    dweight = np.zeros(call.weight.shape)
    for s in _softmax_sets(call):
        dropped = s.prob * s.keep
        grad_rows = grad[..., s.rows, :]
        dweight[s.index, : s.rows.size] = (grad_rows * (dropped @ s.v)).sum(axis=(0, 1, 2, 4))
        do = s.weight[:, None] * grad_rows
        dp = (do @ np.swapaxes(s.v, -1, -2)) * s.keep
        if activation == "softmax":
            dz = s.prob * (dp - (s.prob * dp).sum(-1, keepdims=True) + dlse[..., s.rows, None])
        else:
            dz = s.prob * (1 - s.prob) * dp
        dq[..., s.rows, :] += call.scale * (dz @ s.k)
        # A kv head collects from every query head that reads it: the sum over axis 2.
        dk[:, :, s.keys] += call.scale * (np.swapaxes(dz, -1, -2) @ s.q).sum(axis=2)
        dv[:, :, s.keys] += (np.swapaxes(dropped, -1, -2) @ do).sum(axis=2)
    return Gradients(dq.reshape(q.shape), dk, dv, dweight)


def _softmax_sets(call: _Call) -> Iterator[_SoftmaxSet]:
    """The decode loop: every softmax set of the wanted q tiles with its probabilities."""
    plan = call.plan
    batch, kv_heads, group = call.grouped
    q = call.q.reshape(batch, kv_heads, group, *call.q.shape[2:])
    batch_head = np.arange(batch * kv_heads * group).reshape(batch, kv_heads, group, 1, 1)
    for tile in call.tiles:
        rows = plan.q_tokens[tile][: plan.q_count[tile]]
        q_rows = q[..., rows, :].astype(np.float64)
        for s in range(plan.set_ptr[tile], plan.set_ptr[tile + 1]):
            entries = range(plan.entry_ptr[s], plan.entry_ptr[s + 1])
            counts = [plan.kv_count[plan.entry_kv[e]] for e in entries]
            keys = [plan.kv_tokens[plan.entry_kv[e]][:count] for e, count in zip(entries, counts, strict=True)]
            masks = [
                plan.tile_mask(plan.entry_mask[e])[: rows.size, :count]
                for e, count in zip(entries, counts, strict=True)
            ]
            all_keys = np.concatenate([np.zeros(0, np.int32), *keys])
            allowed = np.concatenate([np.zeros((rows.size, 0), np.bool_), *masks], axis=1)
            k_set = call.k[:, :, None, all_keys].astype(np.float64)
            prob, lse = _probabilities(call.scale * (q_rows @ np.swapaxes(k_set, -1, -2)), allowed, call.activation)
            keep = np.ones(prob.shape)
            if call.dropout_p > 0:
                kept = keep_mask(call.seed, call.dropout_p, batch_head, rows[:, None], all_keys)
                keep = kept / (1 - call.dropout_p)
            yield _SoftmaxSet(
                index=s,
                rows=rows,
                keys=all_keys,
                q=q_rows,
                k=k_set,
                v=call.v[:, :, None, all_keys].astype(np.float64),
                prob=prob,
                keep=keep,
                lse=lse,
                weight=call.weight[s, : rows.size],
            )


def _probabilities(scores: Float64, allowed: NDArray[np.bool_], activation: Activation) -> tuple[Float64, Float64]:
    """Softmax (or sigmoid) over the allowed keys and its log-sum-exp; a row without keys gets 0 and -inf."""
    if activation == "sigmoid":
        # tanh never overflows, unlike exp
        prob = np.where(allowed, 0.5 * (1 + np.tanh(0.5 * scores)), 0.0)
        return prob, np.full(scores.shape[:-1], -np.inf)
    largest = np.max(scores, axis=-1, initial=-np.inf, where=allowed, keepdims=True)
    largest = np.where(np.isneginf(largest), 0.0, largest)
    exponential = np.exp(np.where(allowed, scores - largest, -np.inf))
    total = exponential.sum(axis=-1, keepdims=True)
    with np.errstate(divide="ignore"):
        lse = largest + np.log(total)
    return exponential / np.where(total == 0, 1.0, total), lse[..., 0]
