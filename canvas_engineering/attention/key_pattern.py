"""Which keys each query of a group may read, described without an N x M array (NumPy only)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int64]


@dataclass(frozen=True)
class KeyRanges:
    """Query ``i`` reads the keys ``lo[i] <= j < hi[i]``; none where ``lo[i] == hi[i]``. Both never decrease.

    Attributes:
        lo: (N,) int64, first key of each query.
        hi: (N,) int64, one past the last key of each query.
    """

    lo: IntArray
    hi: IntArray


@dataclass(frozen=True)
class KeyIndices:
    """Query ``i`` reads the keys ``index[i]``.

    Attributes:
        index: (N, k) int64, ascending in each row, no repetition.
    """

    index: IntArray


KeyPattern = KeyRanges | KeyIndices


def local_key_ranges(n_queries: int, n_keys: int, radius: int) -> KeyRanges:
    """The keys ``j`` with ``abs(i - floor(j * N / M)) <= radius`` for every query ``i``.

    ``floor(j * N / M)`` never decreases with ``j``, so these keys are one range: ``j`` counts as at least
    ``p`` exactly when ``j >= ceil(p * M / N)``. Integers only, so no rounding at the window's edge.
    """
    row = np.arange(n_queries, dtype=np.int64)
    n = max(n_queries, 1)

    def first_key_at(position: IntArray) -> IntArray:
        return np.clip(-((-position * n_keys) // n), 0, n_keys)

    return KeyRanges(first_key_at(row - radius), first_key_at(row + radius + 1))


def random_key_indices(seed: int, n_queries: int, n_keys: int, k: int, group_id: int = 0) -> KeyIndices:
    """A uniform random ``k``-subset of ``n_keys`` keys for every query, a pure function of the arguments.

    The numbers come from the counter-based generator Philox-4x64-10 (Salmon et al., "Parallel random
    numbers: as easy as 1, 2, 3", SC 2011): its key is the seed, its counter starts at
    ``(0, n_queries, n_keys, group_id)``. Only the raw 64-bit stream is used, which NumPy keeps stable
    between releases.

    Returns:
        Indices of shape ``(n_queries, min(k, n_keys))``.
    """
    k = min(k, n_keys)
    if k == n_keys:
        return KeyIndices(np.tile(np.arange(n_keys, dtype=np.int64), (n_queries, 1)))
    stream = np.random.Philox(counter=[0, n_queries, n_keys, group_id], key=[seed % 2**64, 0])
    if 2 * k > n_keys:  # dense: the first k of a random order; the N x M array is at most twice the result
        order = np.argsort(_raw(stream, n_queries * n_keys).reshape(n_queries, n_keys), axis=1, kind="stable")
        return KeyIndices(np.sort(order[:, :k], axis=1))
    # Sparse: draw until k different keys are found. Never drawing more than are missing makes the result the
    # set of the first k distinct values of a uniform sequence, which is a uniform subset.
    index = np.sort(_uniform_below(stream, n_keys, n_queries * k).reshape(n_queries, k), axis=1)
    pending = np.arange(n_queries)
    while pending.size:
        rows = index[pending]
        repeated = np.zeros(rows.shape, dtype=bool)
        repeated[:, 1:] = rows[:, 1:] == rows[:, :-1]
        again = repeated.any(axis=1)
        pending, rows, repeated = pending[again], rows[again], repeated[again]
        rows[repeated] = _uniform_below(stream, n_keys, int(repeated.sum()))
        index[pending] = np.sort(rows, axis=1)
    return KeyIndices(index)


def _raw(stream: np.random.Philox, count: int) -> NDArray[np.uint64]:
    """``count`` uniform 64-bit words."""
    return np.asarray(stream.random_raw(count), dtype=np.uint64)


def _uniform_below(stream: np.random.Philox, bound: int, count: int) -> IntArray:
    """``count`` unbiased integers in ``[0, bound)``: words from the incomplete last interval are redrawn."""
    limit = np.uint64((2**64 // bound) * bound - 1)
    words = _raw(stream, count)
    while (rejected := words > limit).any():
        words[rejected] = _raw(stream, int(rejected.sum()))
    return (words % np.uint64(bound)).astype(np.int64)
