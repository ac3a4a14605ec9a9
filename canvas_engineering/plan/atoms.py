"""Atoms: the classes of tokens that no index set of any group tells apart.

Everything the compiler does before it draws tiles happens on atoms: a region's frame is one atom (or a few,
where regions overlap), so a million positions are a few hundred atoms.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Tokens = NDArray[np.int64]
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def mix64(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """A bijective 64-bit mix (the finaliser of SplitMix64; Steele, Lea & Flood, OOPSLA 2014)."""
    z = values + _GOLDEN
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


@dataclass(frozen=True, eq=False)
class Atoms:
    """A partition of the tokens.

    Attributes:
        of_token: ``(num_tokens,)`` atom of each token; atoms are numbered by their first token.
        first: ``(num_atoms,)`` first token of each atom.
        size: ``(num_atoms,)`` tokens of each atom.
        kind: ``(num_atoms,)`` atoms of equal kind play the same parts in the same connections (the frames of one
            region, say); kinds are numbered by their first token too. Kind -1: tokens that nothing refers to.
    """

    of_token: NDArray[np.int64]
    first: Tokens
    size: Tokens
    kind: NDArray[np.int64]

    @property
    def count(self) -> int:
        return self.first.size

    def of_set(self, tokens: Tokens) -> NDArray[np.int64]:
        """Atoms that make up an index set, ascending. The set must be one of those the partition was made from."""
        present = np.zeros(self.count, np.bool_)
        present[self.of_token[tokens]] = True
        return np.flatnonzero(present)


def _dense_ranks(keys: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Number distinct keys by first appearance."""
    _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
    rank = np.empty(first.size, np.int64)
    rank[np.argsort(first, kind="stable")] = np.arange(first.size)
    return rank[inverse]


def partition(num_tokens: int, index_sets: Sequence[Tokens], roles: Sequence[int]) -> Atoms:
    """Split the tokens by membership in ``index_sets``; ``roles[i]`` is what set ``i`` is used for.

    Membership is kept as an exclusive-or of random 64-bit words, one per set: the cost is the total size of the
    sets, and two different memberships collide with probability 2^-64 per pair.
    """
    words = mix64(np.arange(1, len(index_sets) + 1, dtype=np.uint64))
    membership = np.zeros(num_tokens, np.uint64)
    for tokens, word in zip(index_sets, words, strict=True):
        membership[tokens] ^= word
    of_token = _dense_ranks(membership)
    count = int(of_token.max(initial=-1)) + 1
    size = np.bincount(of_token, minlength=count).astype(np.int64)
    first = np.full(count, num_tokens, np.int64)
    np.minimum.at(first, of_token, np.arange(num_tokens))
    used_by_role: dict[int, NDArray[np.bool_]] = {}
    for tokens, role in zip(index_sets, roles, strict=True):
        used_by_role.setdefault(role, np.zeros(count, np.bool_))[of_token[tokens]] = True
    part = np.zeros(count, np.uint64)
    for used, word in zip(
        used_by_role.values(), mix64(np.arange(1, len(used_by_role) + 1, dtype=np.uint64)), strict=True
    ):
        part[used] ^= word
    kind = _dense_ranks(part)
    kind[~np.logical_or.reduce([np.zeros(count, np.bool_), *used_by_role.values()])] = -1
    return Atoms(of_token, first, size, kind)
