"""The reference for JAX arrays: a host callback both ways, so it works under ``jit`` and ``grad`` too."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

if TYPE_CHECKING:
    from canvas_engineering.kernels.reference.backend import Call


def jax_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, row_weight: jax.Array | None, seed: Any, call: Call
) -> tuple[jax.Array, jax.Array]:
    """Output in q's dtype and log-sum-exp in float32 (float64 for float64).

    ``seed`` is an int or two uint32 words; ``call`` carries none, so that a traced seed does not recompile.
    """
    weight = jnp.asarray(call.plan.row_weight) if row_weight is None else row_weight
    if not isinstance(seed, jax.Array):
        number = 0 if seed is None else int(seed)
        seed = jnp.asarray(np.array([number & 0xFFFFFFFF, number >> 32], np.uint32))
    return _reference(call, q, k, v, weight, seed)


def _with_seed(call: Call, words: Any) -> Call:
    low, high = (int(word) for word in np.asarray(words))
    return replace(call, seed=low | high << 32)


def _cast(arrays: tuple[Any, ...], shapes: tuple[jax.ShapeDtypeStruct, ...]) -> tuple[Any, ...]:
    return tuple(np.asarray(array).astype(shape.dtype) for array, shape in zip(arrays, shapes, strict=True))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _reference(
    call: Call, q: jax.Array, k: jax.Array, v: jax.Array, row_weight: jax.Array, seed: jax.Array
) -> tuple[jax.Array, jax.Array]:
    lse_dtype = jnp.float64 if q.dtype == jnp.float64 else jnp.float32
    shapes = (jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct(q.shape[:-1], lse_dtype))

    def on_host(*arrays: Any) -> tuple[Any, ...]:
        *operands, words = map(np.asarray, arrays)
        return _cast(_with_seed(call, words).forward(*operands), shapes)

    return jax.pure_callback(on_host, shapes, q, k, v, row_weight, seed, vmap_method="sequential")


def _forward(call: Call, *operands: jax.Array) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, ...]]:
    return _reference(call, *operands), operands


def _backward(
    call: Call, saved: tuple[jax.Array, ...], cotangents: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array | None, ...]:
    shapes = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in saved[:4])

    def on_host(*arrays: Any) -> tuple[Any, ...]:
        q, k, v, row_weight, words, grad_out, grad_lse = map(np.asarray, arrays)
        return _cast(_with_seed(call, words).backward(q, k, v, row_weight, grad_out, grad_lse), shapes)

    grads = jax.pure_callback(on_host, shapes, *saved, *cotangents, vmap_method="sequential")
    return (*grads, None)


_reference.defvjp(_forward, _backward)
