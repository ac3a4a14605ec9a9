"""The portable backend on JAX: the same batches of equally shaped problems, in ``jax.numpy``.

Pure functions of the operands with the plan as a constant, so ``jit``, ``grad``, ``vmap`` and ``shard_map`` work.
Scores exist in pieces, and the backward pass makes them again (``jax.checkpoint``).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from canvas_engineering.kernels.portable.access import Access, Read, lower
from canvas_engineering.plan import BlockSparsePlan

#: Scores that exist at once, in elements: on a CPU what its caches hold, elsewhere what keeps a device busy.
CPU_SCORES, DEVICE_SCORES = 1 << 20, 1 << 26


@dataclass(frozen=True)
class _Call:
    """The arguments of a call but its operands."""

    group: int  # query heads per kv head
    scale: float
    sigmoid: bool
    dropout_p: float
    seed: Array | None  # (2,) uint32, low and high word
    wide: Any  # dtype of scores and sums


def attention(
    q: Array,  # (B, Hq, Nq, D)
    k: Array,  # (B, Hkv, Nkv, D)
    v: Array,  # (B, Hkv, Nkv, D)
    plan: BlockSparsePlan,
    *,
    scale: float,
    row_weight: Array | None,
    activation: str,
    dropout_p: float,
    seed: Any,
    return_lse: bool,
) -> Array | tuple[Array, Array]:
    """Output in q's dtype, or output and log-sum-exp."""
    batch, heads_q, num_q, head_dim = q.shape
    heads_kv = k.shape[1]
    call = _Call(
        group=heads_q // heads_kv,
        scale=scale,
        sigmoid=activation == "sigmoid",
        dropout_p=dropout_p,
        seed=_seed_words(seed) if dropout_p > 0 else None,
        wide=jnp.float64 if q.dtype == jnp.float64 else jnp.float32,
    )
    lowering = lower(plan)
    # Query heads of one kv head lie beside each other in a row: (B * Hkv, Nq, group, D).
    q_rows = q.reshape(batch * heads_kv, call.group, num_q, head_dim).swapaxes(1, 2)
    k_rows, v_rows = (x.reshape(batch * heads_kv, plan.num_kv, head_dim) for x in (k, v))
    if lowering.q_order is not None and lowering.kv_order is not None:
        q_rows, k_rows, v_rows = (
            q_rows[:, lowering.q_order],
            k_rows[:, lowering.kv_order],
            v_rows[:, lowering.kv_order],
        )
    out = jnp.zeros(q_rows.shape, call.wide)
    lse = jnp.full(q_rows.shape[:-1], -jnp.inf, call.wide)
    for one in lowering.problems if q.size else ():
        q_one = _take(q_rows, one.rows)
        total: Any = 0
        for read in one.reads:
            k_one, v_one = _take(k_rows, read.keys), _take(v_rows, read.keys)
            out_one, lse_one = _attend(q_one, k_one, v_one, read, call)
            total = total + _weighted(out_one, read, row_weight)
        out = _put(out, total, one.rows)
        if return_lse:
            lse = _put(lse, lse_one, one.rows, replace=True)
    if lowering.q_order is not None:
        place = np.argsort(lowering.q_order)
        out, lse = out[:, place], lse[:, place]
    out = out.swapaxes(1, 2).reshape(q.shape).astype(q.dtype)
    return (out, lse.swapaxes(1, 2).reshape(q.shape[:-1])) if return_lse else out


def _seed_words(seed: Any) -> Array:
    if isinstance(seed, jax.Array):
        return seed
    return jnp.asarray(np.array([int(seed) & 0xFFFFFFFF, int(seed) >> 32], np.uint32))


# -- rows in and out ----------------------------------------------------------------------------------------


def _take(x: Array, access: Access) -> Array:
    """``(C, N, ...)`` to ``(C, G, L, ...)``."""
    count, length = access.index.shape
    if access.run is None:
        return x.at[:, access.index].get(mode="promise_in_bounds")
    start, step = access.run
    # One slice over all problems, cut into steps; the last one may be shorter than a step.
    whole = lax.slice_in_dim(x, start, start + step * (count - 1) + length, axis=1)
    if step > length:
        whole = jnp.pad(whole, [(0, 0), (0, step - length)] + [(0, 0)] * (x.ndim - 2))
    return whole.reshape(x.shape[0], count, step, *x.shape[2:])[:, :, :length]


def _put(x: Array, values: Array, access: Access, replace: bool = False) -> Array:
    """Add (or write) ``(C, G, L, ...)`` at the places of ``x (C, N, ...)``."""
    count, length = access.index.shape
    flat = values.reshape(x.shape[0], count * length, *x.shape[2:])
    if access.run is not None and (access.run[1] == length or count == 1):
        if flat.shape == x.shape and access.assign:
            return flat
        target = x.at[:, access.run[0] : access.run[0] + count * length]
    else:
        target = x.at[:, access.index.ravel()]
    unique = access.assign or bool(np.bincount(access.index.ravel()).max() == 1)
    if replace or access.assign:
        return target.set(flat, mode="promise_in_bounds", unique_indices=unique)
    return target.add(flat, mode="promise_in_bounds", unique_indices=unique)


def _weighted(out: Array, one: Read, row_weight: Array | None) -> Array:
    """``(C, G, R, group, D)`` times the weights of its rows."""
    if row_weight is not None:
        weight: Any = row_weight.ravel()[one.batch.slots]
    elif one.weight is not None:
        weight = one.weight
    else:
        return out
    return out * jnp.asarray(weight, out.dtype)[:, :, None, None]


# -- one batch ----------------------------------------------------------------------------------------------


def _attend(q: Array, k: Array, v: Array, one: Read, call: _Call) -> tuple[Array, Array]:
    """Output and log-sum-exp of ``q (C, G, R, group, D)`` over ``k``, ``v (C, G, K, D)``, in pieces."""
    count, num_rows, num_keys = one.batch.shape
    lanes = q.shape[0] * call.group
    masks, mask_index = one.batch.masks, one.batch.mask_index
    # As many rows of one problem, or as many whole problems, as the scores allow.
    limit = CPU_SCORES if jax.default_backend() == "cpu" else DEVICE_SCORES
    rows = max(1, min(num_rows, limit // (lanes * num_keys)))
    blocks = -(-num_rows // rows)
    rows = -(-num_rows // blocks)
    together = max(1, limit // (lanes * num_rows * num_keys)) if blocks == 1 else 1
    head = np.arange(lanes, dtype=np.uint32).reshape(-1, call.group)

    def piece(problem: dict[str, Any]) -> tuple[Array, Array]:
        """One problem: ``q (C, R, group, D)``, ``k``, ``v (C, K, D)``."""
        allowed = None
        if masks is not None:
            allowed = jnp.asarray(masks)[problem["mask"]]
            if blocks > 1:
                allowed = lax.dynamic_slice_in_dim(allowed, problem["block"] * rows, rows)
        return _problem(problem, allowed, head, call)

    operands: dict[str, Any] = {"k": k.swapaxes(0, 1), "v": v.swapaxes(0, 1)}  # problems first
    q_all = q.swapaxes(0, 1)
    if masks is not None and mask_index is not None:
        operands["mask"] = jnp.asarray(mask_index)
    if call.dropout_p > 0:
        operands["key_token"] = jnp.asarray(one.batch.keys.astype(np.uint32))
    row_token = one.batch.rows.astype(np.uint32)
    if blocks == 1:
        problems = {**operands, "q": q_all, "row_token": jnp.asarray(row_token)}
        run = jax.vmap(piece)
        if together >= count:
            out, lse = run(problems)
        else:
            out, lse = lax.map(jax.checkpoint(piece), problems, batch_size=together)
    else:
        # The rows of each problem in equal blocks; rows that fill the last block are computed and cut off.
        fill = blocks * rows - num_rows
        q_all = jnp.pad(q_all, [(0, 0), (0, 0), (0, fill), (0, 0), (0, 0)])
        row_token = np.pad(row_token, [(0, 0), (0, fill)])
        if masks is not None:
            masks = np.pad(masks, [(0, 0), (0, fill), (0, 0)], constant_values=True)

        def whole(problem: dict[str, Any]) -> tuple[Array, Array]:
            q_problem, tokens = problem.pop("q"), problem.pop("row_token")

            def block(number: Array) -> tuple[Array, Array]:
                start = number * rows
                return piece(
                    {
                        **problem,
                        "q": lax.dynamic_slice_in_dim(q_problem, start, rows, axis=1),
                        "row_token": lax.dynamic_slice_in_dim(tokens, start, rows),
                        "block": number,
                    }
                )

            out, lse = lax.map(jax.checkpoint(block), jnp.arange(blocks))  # (blocks, C, rows, ...)
            out, lse = (jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1, *x.shape[3:]) for x in (out, lse))
            return out[:, :num_rows], lse[:, :num_rows]

        out, lse = lax.map(whole, {**operands, "q": q_all, "row_token": jnp.asarray(row_token)})
    return out.swapaxes(0, 1), lse.swapaxes(0, 1)


def _problem(problem: dict[str, Any], allowed: Any, head: Any, call: _Call) -> tuple[Array, Array]:
    """Attention of ``q (C, R, group, D)`` over ``k``, ``v (C, K, D)``, output and log-sum-exp in the wide dtype."""
    q, k, v = (problem[name].astype(call.wide) for name in ("q", "k", "v"))
    scores = jnp.einsum("crhd,ckd->crhk", q, k, precision="highest") * call.scale
    if allowed is not None:
        scores = jnp.where(allowed[:, None], scores, -jnp.inf)
    if call.sigmoid:
        prob, lse = jax.nn.sigmoid(scores), jnp.zeros(scores.shape[:-1], scores.dtype)
    else:
        largest = lax.stop_gradient(scores.max(axis=-1, keepdims=True))
        exponential = jnp.exp(scores - largest)
        total = exponential.sum(axis=-1, keepdims=True)
        prob, lse = exponential / total, (largest + jnp.log(total))[..., 0]
    if call.dropout_p > 0:
        prob = prob * _keep(problem, head, call).astype(prob.dtype) / (1 - call.dropout_p)
    return jnp.einsum("crhk,ckd->crhd", prob, v, precision="highest"), lse


def _keep(problem: dict[str, Any], head: Any, call: _Call) -> Array:
    """``(C, R, group, K)`` bool: the portable dropout mask, defined in ``kernels/reference/dropout.py``."""
    words: Any = call.seed
    low, high = words[0], words[1]
    of_head = _fmix(low ^ jnp.asarray(head) * np.uint32(0x9E3779B1))[:, None, :, None]
    of_row = problem["row_token"][:, None, None] * np.uint32(0x85EBCA77)
    row = _fmix(of_head ^ of_row ^ high * np.uint32(0x27D4EB2F))
    bits = _fmix(row ^ problem["key_token"] * np.uint32(0xC2B2AE3D))
    return bits >= np.uint32(min(math.floor(call.dropout_p * 2**32), 0xFFFFFFFF))


def _fmix(h: Array) -> Array:
    """Murmur3's finaliser."""
    h = (h ^ h >> 16) * np.uint32(0x85EBCA6B)
    h = (h ^ h >> 13) * np.uint32(0xC2B2AE35)
    return h ^ h >> 16
