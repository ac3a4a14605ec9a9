"""The reference for JAX arrays: a host callback both ways, so it works under ``jit`` and ``grad`` too."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

if TYPE_CHECKING:
    from canvas_engineering.kernels.reference.backend import Call


def jax_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, row_weight: jax.Array | None, call: Call
) -> tuple[jax.Array, jax.Array]:
    """Output in q's dtype and log-sum-exp in float32 (float64 for float64)."""
    weight = jnp.asarray(call.plan.row_weight) if row_weight is None else row_weight
    return _reference(call, q, k, v, weight)


def _cast(arrays: tuple[Any, ...], shapes: tuple[jax.ShapeDtypeStruct, ...]) -> tuple[Any, ...]:
    return tuple(np.asarray(array).astype(shape.dtype) for array, shape in zip(arrays, shapes, strict=True))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _reference(
    call: Call, q: jax.Array, k: jax.Array, v: jax.Array, row_weight: jax.Array
) -> tuple[jax.Array, jax.Array]:
    lse_dtype = jnp.float64 if q.dtype == jnp.float64 else jnp.float32
    shapes = (jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct(q.shape[:-1], lse_dtype))

    def on_host(*arrays: Any) -> tuple[Any, ...]:
        return _cast(call.forward(*map(np.asarray, arrays)), shapes)

    return jax.pure_callback(on_host, shapes, q, k, v, row_weight, vmap_method="sequential")


def _forward(call: Call, *operands: jax.Array) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, ...]]:
    return _reference(call, *operands), operands


def _backward(
    call: Call, operands: tuple[jax.Array, ...], cotangents: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, ...]:
    shapes = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in operands)

    def on_host(*arrays: Any) -> tuple[Any, ...]:
        return _cast(call.backward(*map(np.asarray, arrays)), shapes)

    return jax.pure_callback(on_host, shapes, *operands, *cotangents, vmap_method="sequential")


_reference.defvjp(_forward, _backward)
