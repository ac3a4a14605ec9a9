"""What the kernels do to one tile of scores: masks, dropout, products, and vectors turned from rows to columns."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from canvas_engineering.kernels.pallas.lowering import SUBLANES

LANES = 128
LOG2_E = math.log2(math.e)
#: The running maximum of a row that has seen no key. Finite, so that ``-inf - NO_KEY`` is not NaN.
NO_KEY = -1e30
SIGN_BIT = -(2**31)

NATURAL = (((1,), (0,)), ((), ()))  # (m, k) x (k, n)
TRANSPOSED_RHS = (((1,), (1,)), ((), ()))  # (m, k) x (n, k)


def product(a: Array, b: Array, dimensions: Any) -> Array:
    """A float32 matrix product on the matrix unit.

    float32 operands are multiplied at full precision, as everywhere but on TPUs; a session that has set
    ``jax_default_matmul_precision`` to something faster gets that.
    """
    fast = jax.config.jax_default_matmul_precision in ("default", "bfloat16", "fastest")  # type: ignore[attr-defined]
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 and not fast else lax.Precision.DEFAULT
    return lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=jnp.float32)


def mask_bits(words: Array, rows: int) -> Array:
    """``(words, n)`` packed along the sublanes to ``(rows, n)`` bool (see ``lowering``)."""
    shifted = [
        # The wanted bit becomes the sign: one comparison less than extracting it.
        lax.shift_left(words[SUBLANES * (g // 32) : SUBLANES * (g // 32 + 1)], jnp.int32(31 - g % 32))
        for g in range(rows // SUBLANES)
    ]
    return jnp.concatenate(shifted, axis=0) < jnp.int32(0)


def column(row: Array) -> Array:
    """``(1, n)`` to ``(n, 128)``, every lane the same: a vector along the sublanes."""
    return jnp.broadcast_to(row, (LANES, row.shape[1])).T


def as_row(columns: Array) -> Array:
    """``(n, 128)`` to ``(1, n)``: the first lane, as a vector along the lanes."""
    return columns.T[:1]


def widen(columns: Array, width: int) -> Array:
    """``(n, 128)`` with equal lanes to ``(n, width)``."""
    if width <= LANES:
        return columns[:, :width]
    return jnp.tile(columns, (1, -(-width // LANES)))[:, :width]


def fmix(h: Array) -> Array:
    """Murmur3's finaliser on int32 words taken as unsigned."""
    h = h ^ lax.shift_right_logical(h, jnp.int32(16))
    h = h * jnp.int32(_signed(0x85EBCA6B))
    h = h ^ lax.shift_right_logical(h, jnp.int32(13))
    h = h * jnp.int32(_signed(0xC2B2AE35))
    return h ^ lax.shift_right_logical(h, jnp.int32(16))


def times(x: Array, factor: int) -> Array:
    """``x * factor`` modulo 2**32, as int32."""
    return x.astype(jnp.int32) * jnp.int32(_signed(factor))


def kept(row_hash: Array, key_hash: Array, dropout_p: float) -> Array:
    """Which pairs dropout keeps; the two hashes are broadcast against each other."""
    threshold = min(math.floor(dropout_p * 2**32), 2**32 - 1)
    bits = fmix(row_hash ^ key_hash) ^ jnp.int32(SIGN_BIT)  # unsigned order is signed order with the sign flipped
    return bits >= jnp.int32(_signed(threshold ^ 2**31))


def _signed(word: int) -> int:
    """The int32 with the same bits."""
    return word - 2**32 if word >= 2**31 else word
