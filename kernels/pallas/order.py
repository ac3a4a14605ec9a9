"""Moving tokens into plan order, padded to whole tiles, and back; each is the gradient of the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from numpy.typing import NDArray

#: An order with at most this many runs of consecutive tokens is a concatenation of slices; with more, a gather.
MAX_SLICES = 64


@dataclass(frozen=True, eq=False)
class TokenOrder:
    """Where each token stands in the padded tiles.

    Attributes:
        num_tokens: Tokens.
        tokens: ``(num_tiles * block,)`` int32, token ids in plan order, ``num_tokens`` for padding.
        places: ``(num_tokens,)`` int32, the inverse.
        key: What distinguishes this order from others of the same length; makes it hashable.
    """

    num_tokens: int
    tokens: NDArray[np.int32]
    places: NDArray[np.int32]
    key: str

    @classmethod
    def of(cls, tokens: NDArray[np.integer], num_tokens: int, key: str) -> TokenOrder:
        """From token ids ``(num_tiles, block)`` with -1 for padding."""
        flat = tokens.ravel()
        places = np.zeros(num_tokens, np.int32)
        real = flat >= 0
        places[flat[real]] = np.flatnonzero(real)
        return cls(num_tokens, np.where(real, flat, num_tokens).astype(np.int32), places, key)

    def __hash__(self) -> int:
        return hash((self.key, self.num_tokens, self.tokens.size))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TokenOrder) and (self.key, self.num_tokens, self.tokens.size) == (
            other.key,
            other.num_tokens,
            other.tokens.size,
        )


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def to_tiles(order: TokenOrder, x: Array) -> Array:
    """``(B, H, num_tokens, ...)`` to ``(B, H, num_tiles * block, ...)`` in plan order, zeros at padding."""
    return _pick(x, order.tokens, x.shape[2])


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def from_tiles(order: TokenOrder, x: Array) -> Array:
    """The inverse of :func:`to_tiles`; padding is dropped."""
    return _pick(x, order.places, x.shape[2])


to_tiles.defvjp(
    lambda order, x: (to_tiles(order, x), None),
    lambda order, _, grad: (from_tiles(order, grad),),
)
from_tiles.defvjp(
    lambda order, x: (from_tiles(order, x), None),
    lambda order, _, grad: (to_tiles(order, grad),),
)


def _pick(x: Array, index: NDArray[np.int32], size: int) -> Array:
    """``x[:, :, index]``, zeros where ``index == size``."""
    runs = _runs(index, size)
    if len(runs) > MAX_SLICES:
        return x.at[:, :, index].get(mode="fill", fill_value=0)
    if runs == [(0, size)]:
        return x
    pieces = [
        jnp.zeros((*x.shape[:2], length, *x.shape[3:]), x.dtype)
        if start < 0
        else lax.slice_in_dim(x, start, start + length, axis=2)
        for start, length in runs
    ]
    return jnp.concatenate(pieces, axis=2) if pieces else x[:, :, :0]


def _runs(index: NDArray[np.int32], size: int) -> Sequence[tuple[int, int]]:
    """Maximal runs ``(start, length)`` of consecutive values; start -1 for a run of padding."""
    if not index.size:
        return []
    padding = index == size
    joined = np.where(padding[1:], padding[:-1], ~padding[:-1] & (np.diff(index) == 1))
    starts = np.flatnonzero(np.append(True, ~joined))
    lengths = np.diff(np.append(starts, index.size))
    if starts.size > MAX_SLICES:
        return [(0, 0)] * starts.size  # only their number matters then
    return [(-1 if padding[s] else int(index[s]), int(n)) for s, n in zip(starts, lengths, strict=True)]
