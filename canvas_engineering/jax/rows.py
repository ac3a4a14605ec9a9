"""Moving rows of a canvas: gathers whose gradients are gathers too.

JAX differentiates a gather into a scatter, which is far slower than a gather (about 20 times on a CPU). For rows
that are all different the inverse index is known, so here both directions gather. (Reverse mode only: these
operations have no forward-mode rule.)
"""

from __future__ import annotations

from functools import cached_property, partial

import jax
import numpy as np
from jax import Array
from numpy.typing import NDArray

#: Below this share of an axis, rows are added one by one; above it, the whole axis is gathered and added.
FEW = 0.1


class Rows:
    """Distinct row numbers of an axis of ``count`` rows, and where each row went.

    Attributes:
        index: ``(n,)`` int32 rows.
        inverse: ``(count,)`` int32: place of each row in ``index``, n for rows that are not in it.
    """

    def __init__(self, index: NDArray[np.integer], count: int) -> None:
        self.index = index.astype(np.int32)
        self.count = count

    @cached_property
    def inverse(self) -> NDArray[np.int32]:
        inverse = np.full(self.count, self.index.size, np.int32)
        inverse[self.index] = np.arange(self.index.size, dtype=np.int32)
        return inverse


def take(rows: Rows, x: Array) -> Array:
    """``x (B, count, d)`` to the rows ``(B, n, d)``."""
    return _take(rows, x)


def put(rows: Rows, part: Array) -> Array:
    """``part (B, n, d)`` to ``(B, count, d)``, zeros elsewhere."""
    return _put(rows, part)


def add(total: Array | None, rows: Rows, part: Array) -> Array:
    """``total (B, count, d)``, or zeros for None, plus ``part (B, n, d)`` at the rows."""
    if total is None:
        return put(rows, part)
    if rows.index.size < FEW * rows.count:
        return total.at[:, rows.index].add(part, mode="promise_in_bounds", unique_indices=True)
    return total + put(rows, part)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _take(rows: Rows, x: Array) -> Array:
    return x.at[:, rows.index].get(mode="promise_in_bounds", unique_indices=True)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _put(rows: Rows, part: Array) -> Array:
    if rows.index.size == rows.count:
        return part.at[:, rows.inverse].get(mode="promise_in_bounds", unique_indices=True)
    return part.at[:, rows.inverse].get(mode="fill", fill_value=0)


_take.defvjp(lambda rows, x: (_take(rows, x), None), lambda rows, _, grad: (_put(rows, grad),))
_put.defvjp(lambda rows, part: (_put(rows, part), None), lambda rows, _, grad: (_take(rows, grad),))


def has_duplicates(index: NDArray[np.integer]) -> bool:
    """Whether a row stands in ``index`` more than once."""
    return np.unique(index).size != index.size
