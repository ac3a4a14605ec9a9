"""The dropout mask: a pure function of (seed, batch and head, query token, key token).

Every backend drops the same pairs, and the backward pass recomputes the mask instead of storing it. The hash
is a chain of murmur3's 32-bit finaliser (A. Appleby, 2011, https://github.com/aappleby/smhasher, public
domain), a counter-based generator in the sense of Salmon et al., "Parallel random numbers: as easy as
1, 2, 3" (SC 2011). All arithmetic is unsigned, modulo 2**32::

    fmix(h):  h ^= h >> 16;  h *= 0x85EBCA6B;  h ^= h >> 13;  h *= 0xC2B2AE35;  h ^= h >> 16
    row  = fmix(fmix(seed_lo ^ bh * 0x9E3779B1) ^ q_token * 0x85EBCA77 ^ seed_hi * 0x27D4EB2F)
    bits = fmix(row ^ k_token * 0xC2B2AE3D)
    kept = bits >= threshold,  threshold = min(floor(dropout_p * 2**32), 2**32 - 1)

with ``bh = batch_index * num_query_heads + query_head``, ``seed_lo`` and ``seed_hi`` the low and high 32 bits
of the seed, and the tokens as numbered by the plan that the caller passed. Kept probabilities are scaled by
``1 / (1 - dropout_p)``.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

UInt32 = NDArray[np.uint32]
MASK_32 = 0xFFFFFFFF


def fmix(value: UInt32) -> UInt32:
    """Murmur3's finaliser: a bijection of 32-bit words in which every input bit flips half of the output bits."""
    h = np.asarray(value, np.uint32)
    with np.errstate(over="ignore"):  # NumPy warns when a scalar wraps around; wrapping is the definition
        h = h ^ (h >> np.uint32(16))
        h = h * np.uint32(0x85EBCA6B)
        h = h ^ (h >> np.uint32(13))
        h = h * np.uint32(0xC2B2AE35)
        return np.asarray(h ^ (h >> np.uint32(16)), np.uint32)


def split_seed(seed: int) -> tuple[int, int]:
    """Low and high 32 bits of a seed in ``[0, 2**64)``."""
    return seed & MASK_32, (seed >> 32) & MASK_32


def threshold(dropout_p: float) -> int:
    """Bits below this are dropped."""
    return min(math.floor(dropout_p * 2**32), MASK_32)


def dropout_bits(seed: int, batch_head: ArrayLike, q_token: ArrayLike, k_token: ArrayLike) -> UInt32:
    """The 32 random bits of each pair; the three index arrays are broadcast against each other."""

    def times(index: ArrayLike, factor: int) -> Any:
        return np.asarray(index).astype(np.uint32) * np.uint32(factor)

    low, high = split_seed(seed)
    with np.errstate(over="ignore"):
        head = fmix(np.uint32(low) ^ times(batch_head, 0x9E3779B1))
        row = fmix(head ^ times(q_token, 0x85EBCA77) ^ times(high, 0x27D4EB2F))
        return fmix(row ^ times(k_token, 0xC2B2AE3D))


def keep_mask(
    seed: int, dropout_p: float, batch_head: ArrayLike, q_token: ArrayLike, k_token: ArrayLike
) -> NDArray[np.bool_]:
    """True where a pair's probability is kept."""
    return dropout_bits(seed, batch_head, q_token, k_token) >= np.uint32(threshold(dropout_p))
