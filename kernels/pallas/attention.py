"""Block-sparse attention on a TPU: differentiable, in the order of tiles (``tiled_attention``) and of tokens.

``tiled_attention`` is the operation with a hand-written gradient. It knows nothing of tokens, so that a shard of a
plan can be run through it as well (see ``sharding``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.custom_derivatives import SymbolicZero

from canvas_engineering.errors import BackendError
from canvas_engineering.kernels.pallas.backward import SetRows, backward_cols, backward_rows
from canvas_engineering.kernels.pallas.config import Activation, KernelConfig, PlanArrays
from canvas_engineering.kernels.pallas.forward import forward
from canvas_engineering.kernels.pallas.launch import Interpret, read_field, vary, varying_axes, write_field
from canvas_engineering.kernels.pallas.lowering import FULL, MASKED, ListFormat, LoweredPlan, lower_plan
from canvas_engineering.kernels.pallas.order import TokenOrder, from_tiles, to_tiles
from canvas_engineering.kernels.pallas.tile_math import LOG2_E, fmix, times
from canvas_engineering.kernels.pallas.tiles import padded_head_dim
from canvas_engineering.plan import BlockSparsePlan

#: Stands for the log-sum-exp of a row without keys in the backward pass: every probability becomes 0.
NO_PROBABILITY = 1e30


@partial(
    jax.jit,
    static_argnames=("plan", "scale", "activation", "dropout_p", "return_lse", "interpret"),
)
def plan_attention(
    q: Array,  # (B, Hq, Nq, D)
    k: Array,  # (B, Hkv, Nkv, D)
    v: Array,  # (B, Hkv, Nkv, D)
    row_weight: Array | None,  # (num_sets, block_q) or None for the plan's
    seed: Array | None,  # (2,) uint32, low and high word
    *,
    plan: BlockSparsePlan,
    scale: float,
    activation: Activation,
    dropout_p: float,
    return_lse: bool,
    interpret: Interpret,
) -> Array | tuple[Array, Array]:
    """Output ``(B, Hq, Nq, D)``, and with ``return_lse`` the log-sum-exp ``(B, Hq, Nq)`` float32.

    The plan is static and hashed by its content: equal plans share one compilation.
    """
    lowered = plan.lowered("pallas", lower_plan)
    q_order = plan.lowered("pallas q order", lambda p: TokenOrder.of(p.q_tokens, p.num_q, p.digest))
    kv_order = plan.lowered("pallas kv order", lambda p: TokenOrder.of(p.kv_tokens, p.num_kv, p.digest))
    batch, heads_q, _, head_dim = q.shape
    if not batch or not lowered.row_format.length or not lowered.col_format.length:  # no batch, queries or keys
        out = jnp.zeros_like(q)
        return (out, jnp.full(q.shape[:3], -jnp.inf, jnp.float32)) if return_lse else out

    config = kernel_config(
        plan,
        lowered,
        scale=abs(scale) or 1.0,
        activation=activation,
        dropout_p=dropout_p,
        weighted=row_weight is not None or not lowered.unit_weight,
        interpret=interpret,
    )
    q_hash, kv_hash = dropout_hashes(plan, q_order, kv_order, q.shape, seed) if dropout_p else (None, None)
    if q_hash is not None:
        q_hash = q_hash.reshape(batch * heads_q, -1, 1, plan.block_q)
    arrays = plan_arrays(lowered, q_hash, kv_hash)
    operands = (
        kernel_operand(to_tiles(q_order, signed_query(q, scale))),
        kernel_operand(to_tiles(kv_order, k)),
        kernel_operand(to_tiles(kv_order, v)),
        pad_row_weight(lowered, row_weight),
    )
    # Under a caller's shard_map: what one operand is sharded over, all vary over.
    arrays, operands = vary((arrays, operands), varying_axes((arrays, operands)))
    out, lse = tiled_attention(config, row_weight is not None and not return_lse, arrays, *operands)
    out = from_tiles(q_order, out.reshape(batch, heads_q, -1, out.shape[-1]))[..., :head_dim]
    if not return_lse:
        return out
    if not lowered.one_set_each:
        lse = lse[:, lowered.tile_set]
    return out, from_tiles(q_order, lse.reshape(batch, heads_q, -1))


def kernel_config(
    plan: BlockSparsePlan,
    lowered: LoweredPlan,
    *,
    scale: float,
    activation: Activation,
    dropout_p: float,
    weighted: bool,
    interpret: Interpret,
) -> KernelConfig:
    return KernelConfig(
        block_q=plan.block_q,
        block_kv=plan.block_kv,
        num_sets=lowered.num_sets,
        multi_set=lowered.max_sets > 1,
        weighted=weighted,
        activation=activation,
        scale=scale,
        dropout_p=dropout_p,
        rows=lowered.row_format,
        cols=lowered.col_format,
        interpret=interpret,
    )


def plan_arrays(lowered: LoweredPlan, q_hash: Array | None, kv_hash: Array | None) -> PlanArrays:
    has_masks = lowered.row_masks.shape[0] > 0
    return PlanArrays(
        rows=tuple(jnp.asarray(word) for word in lowered.rows),
        cols=tuple(jnp.asarray(word) for word in lowered.cols),
        set_tile=None if lowered.one_set_each else jnp.asarray(lowered.set_tile),
        row_masks=jnp.asarray(lowered.row_masks) if has_masks else None,
        col_masks=jnp.asarray(lowered.col_masks) if has_masks else None,
        q_hash=q_hash,
        kv_hash=kv_hash,
    )


def pad_row_weight(lowered: LoweredPlan, row_weight: Array | None) -> Array:
    """``(num_sets, 1, block_q)`` float32, with the extra set's zeros where there is one."""
    if row_weight is None:
        return jnp.asarray(lowered.row_weight)
    extra = lowered.num_sets - row_weight.shape[0]
    return jnp.pad(row_weight.astype(jnp.float32), ((0, extra), (0, 0)))[:, None]


def dropout_hashes(
    plan: BlockSparsePlan, q_order: TokenOrder, kv_order: TokenOrder, q_shape: tuple[int, ...], seed: Array | None
) -> tuple[Array, Array]:
    """The parts of the dropout hash, int32: of seed, head and query, and of the key.

    Query part ``(B, Hq, q_tiles * block_q)``, key part ``(kv_tiles, 1, block_kv)``, both in plan order. The
    definition is in ``kernels/reference/dropout.py``.
    """
    if seed is None:
        raise BackendError("dropout needs a seed, got None")
    batch, heads, num_q = q_shape[:3]
    low, high = lax.bitcast_convert_type(jnp.asarray(seed), jnp.int32)
    bh = jnp.arange(batch * heads, dtype=jnp.int32).reshape(batch, heads, 1)
    head = fmix(low ^ times(bh, 0x9E3779B1))
    query = fmix(head ^ times(jnp.arange(num_q, dtype=jnp.int32), 0x85EBCA77) ^ times(high, 0x27D4EB2F))
    key = times(jnp.asarray(kv_order.tokens), 0xC2B2AE3D)
    return to_tiles(q_order, query), key.reshape(-1, 1, plan.block_kv)


# -- the differentiable operation ---------------------------------------------------------------------------


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def tiled_attention(
    config: KernelConfig,
    skip_zero_weight: bool,
    arrays: PlanArrays,
    q: Array,  # (B * Hq, q_tiles * block_q, D)
    k: Array,  # (B * Hkv, kv_tiles * block_kv, D)
    v: Array,  # (B * Hkv, kv_tiles * block_kv, D)
    weight: Array,  # (num_sets, 1, block_q) float32
) -> tuple[Array, Array]:
    """Output like ``q``, and the log-sum-exp of every set ``(B * Hq, num_sets, 1, block_q)`` float32.

    For sigmoid the log-sum-exp is ``-inf``.

    Args:
        skip_zero_weight: Sets whose weights are all 0 need not be computed, for nobody asks for their
            log-sum-exp. (Where the weights are differentiated, they are computed all the same.)
    """
    if skip_zero_weight:
        arrays = _skip_zero_weight(config, arrays, weight)
    out, lse, _ = forward(config, arrays, q, k, v, weight, by_set=False)
    return out, _or_no_lse(config, q, lse)


def _forward_rule(
    config: KernelConfig, skip_zero_weight: bool, arrays: Any, q: Any, k: Any, v: Any, weight: Any
) -> tuple[tuple[Array, Array], Any]:
    """Under ``symbolic_zeros`` every operand comes with whether it is being differentiated."""
    arrays = jax.tree.map(lambda leaf: leaf.value, arrays)
    if skip_zero_weight and not weight.perturbed:
        arrays = _skip_zero_weight(config, arrays, weight.value)
    operands = (q.value, k.value, v.value, weight.value)
    out, lse, set_out = forward(config, arrays, *operands, by_set=config.keeps_outputs_by_set)
    kept_out = out if set_out is None else set_out
    return (out, _or_no_lse(config, q.value, lse)), (arrays, *operands, kept_out, lse)


def _backward_rule(config: KernelConfig, skip_zero_weight: bool, saved: Any, grads: Any) -> tuple[Any, ...]:
    arrays, q, k, v, weight, out, lse = saved
    grad_out, grad_lse = grads
    if isinstance(grad_out, SymbolicZero):
        grad_out = jnp.zeros_like(q)
    if isinstance(grad_lse, SymbolicZero) or config.activation == "sigmoid":
        grad_lse = None
    if skip_zero_weight and grad_lse is None:  # without weight a set has no part in dQ, dK and dV
        arrays = _skip_zero_weight(config, arrays, weight)
    delta = _delta(config, arrays, out, grad_out)
    softmax = config.activation == "softmax"
    set_rows = SetRows(
        lse=jnp.where(jnp.isneginf(lse), NO_PROBABILITY, lse * LOG2_E) if softmax else None,
        delta=delta if softmax else None,
        weight=jnp.broadcast_to(weight, delta.shape) if config.weighted else None,
        grad_lse=grad_lse,
    )
    dq = backward_rows(config, arrays, q, k, v, grad_out, set_rows)
    dk, dv = backward_cols(config, arrays, q, k, v, grad_out, set_rows)
    return None, dq, dk, dv, delta.sum(axis=0)


def _delta(config: KernelConfig, arrays: PlanArrays, out: Array, grad_out: Array) -> Array:
    """``sum_d grad_out o`` of every set, ``(B * Hq, num_sets, 1, block_q)`` float32."""
    tiled = (grad_out.shape[0], -1, config.block_q, grad_out.shape[2])
    grad_out, out = grad_out.reshape(tiled), out.reshape(tiled)
    if config.keeps_outputs_by_set and arrays.set_tile is not None:
        grad_out = grad_out[:, arrays.set_tile]
    delta = (grad_out.astype(jnp.float32) * out.astype(jnp.float32)).sum(axis=-1)[:, :, None]
    if not config.keeps_outputs_by_set and arrays.set_tile is not None:
        delta = delta[:, arrays.set_tile]
    return delta


tiled_attention.defvjp(_forward_rule, _backward_rule, symbolic_zeros=True)


def _or_no_lse(config: KernelConfig, q: Array, lse: Array | None) -> Array:
    if lse is not None:
        return lse
    return jnp.full((q.shape[0], config.num_sets, 1, config.block_q), -jnp.inf, jnp.float32)


def _skip_zero_weight(config: KernelConfig, arrays: PlanArrays, weight: Array) -> PlanArrays:
    """Entries of sets without weight compute nothing, and name the blocks of the entry before: nothing is loaded."""
    active = (weight != 0).any(axis=(1, 2))  # (num_sets,)

    def skip(form: ListFormat, words: tuple[Array, ...], q_tile: str, repeated: Sequence[str]) -> tuple[Array, ...]:
        def read(name: str) -> Array:
            field = form.field(name)
            return jnp.zeros_like(words[0]) if field is None else read_field(field, words[field.word])

        computes = active[read(q_tile if form.field("softmax_set") is None else "softmax_set")]
        place = jnp.arange(form.length, dtype=jnp.int32)
        latest = lax.cummax(jnp.where(computes, place, 0), axis=1)
        changed = {name: jnp.take_along_axis(read(name), latest, axis=1) for name in repeated}
        changed["flags"] = jnp.where(computes, read("flags"), read("flags") & jnp.int32(~(FULL | MASKED)))
        result = list(words)
        for name, value in changed.items():
            field = form.field(name)
            if field is not None:
                result[field.word] = write_field(field, result[field.word], value)
        return tuple(result)

    return arrays._replace(
        # The row list writes results by set, so its sets stay; the column list only reads by set.
        rows=skip(config.rows, arrays.rows, "tile", ("other", "mask")),
        cols=skip(config.cols, arrays.cols, "other", ("other", "mask", "softmax_set")),
    )


# -- shapes -------------------------------------------------------------------------------------------------


def signed_query(q: Array, scale: float) -> Array:
    """Kernels take a positive scale: a sign, and a zero, go into q, where they are exact."""
    return q if scale > 0 else q * jnp.asarray(math.copysign(1.0, scale) if scale else 0.0, q.dtype)


def kernel_operand(x: Array) -> Array:
    """``(B, H, N, D)`` to ``(B * H, N, padded D)``."""
    padding = padded_head_dim(x.shape[-1]) - x.shape[-1]
    if padding:
        x = jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, padding)))
    return x.reshape(-1, *x.shape[2:])
