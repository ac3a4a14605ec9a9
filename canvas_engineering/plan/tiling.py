"""Where each token goes: an order of the tokens, cut into tiles with padding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from canvas_engineering.plan.atoms import Atoms

Tokens = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Order:
    """The tokens in sequence, and the stretches that a tiling may align to tile boundaries.

    Attributes:
        tokens: ``(num_tokens,)`` a permutation.
        run_sizes: Lengths of consecutive runs (atoms in this order).
        run_group: Short runs of equal group may share a tile with each other; unused tokens (-1) come last.
        name: For messages and tests.
    """

    tokens: Tokens
    run_sizes: Tokens
    run_group: NDArray[np.int64]
    name: str


@dataclass(frozen=True, eq=False)
class Tiling:
    """Tokens laid out in tiles.

    Attributes:
        block: Tile size.
        tiles: ``(num_tiles, block)`` int32 token ids, -1 = padding at a tile's end.
        place: ``(num_tokens,)`` int64, ``tile * block + row`` of each token.
        count: ``(num_tiles,)`` tokens of each tile.
    """

    block: int
    tiles: NDArray[np.int32]
    place: Tokens
    count: Tokens


#: Atoms below this size are the small ones of the ``"mixed"`` order.
_SMALL_ATOM = 64

OrderName = Literal["kind", "canvas", "mixed"]


def order_atoms(atoms: Atoms, name: OrderName, inner: NDArray[np.int64] | None = None) -> Order:
    """Sequence the atoms; ``inner`` ranks the tokens within an atom.

    ``"kind"`` puts all frames of a region side by side, ``"canvas"`` keeps whole frames together, and ``"mixed"``
    does the first for large atoms and the second for small ones: the pointer, the keys and the text of one frame
    then share a tile, whose rows read the same frames.
    """
    unused = atoms.kind < 0
    if name == "kind":
        group = atoms.kind
        sequence = np.lexsort((atoms.first, atoms.kind, unused))
    elif name == "canvas":
        group = np.where(unused, -1, 0)
        sequence = np.lexsort((atoms.first, unused))
    else:
        small = (atoms.size < _SMALL_ATOM) & ~unused
        turn = _turns(atoms.kind)
        group = np.where(small, atoms.kind.max(initial=0) + 1 + turn, atoms.kind)
        sequence = np.lexsort((atoms.first, atoms.kind, group, unused))
    rank = np.empty(atoms.count, np.int64)
    rank[sequence] = np.arange(atoms.count)
    token_rank = rank[atoms.of_token]
    tokens = np.argsort(token_rank, kind="stable") if inner is None else np.lexsort((inner, token_rank))
    return Order(tokens, atoms.size[sequence], group[sequence], name)


def _turns(kind: NDArray[np.int64]) -> NDArray[np.int64]:
    """How many atoms of its own kind stand before each atom: its frame, for the frames of a region."""
    order = np.argsort(kind, kind="stable")
    starts = np.flatnonzero(np.concatenate([[True], kind[order][1:] != kind[order][:-1]])) if kind.size else order
    turn = np.empty(kind.size, np.int64)
    turn[order] = np.arange(kind.size) - np.repeat(starts, np.diff(np.append(starts, kind.size)))
    return turn


def frames_of_small_runs(sizes: Tokens, kinds: Tokens) -> Tokens:
    """Groups of the runs of a given sequence that find the frames of a ``"mixed"`` order again.

    Small runs that follow one another share a group until a kind comes back, which is where the next frame begins.

    Args:
        sizes, kinds: ``(runs,)`` length and kind of each run; kind -1 for unused tokens.
    """
    groups = kinds.copy()
    seen: set[int] = set()
    new_group = int(kinds.max(initial=0))
    for i, (size, kind) in enumerate(zip(sizes.tolist(), kinds.tolist(), strict=True)):
        if kind < 0 or size >= _SMALL_ATOM:
            seen.clear()
            continue
        if not seen or kind in seen:
            seen.clear()
            new_group += 1
        seen.add(kind)
        groups[i] = new_group
    return groups


def tile_order(order: Order, block: int, align: float) -> Tiling:
    """Cut an order into tiles.

    Args:
        order: The sequence of tokens.
        block: Tile size.
        align: Runs of at least ``align * block`` tokens start at a tile boundary and are padded to one; shorter
            ones are packed, together with their neighbours of the same group. ``inf`` packs everything.
    """
    run_sizes, num_tokens = order.run_sizes, order.tokens.size
    if num_tokens == 0:
        return Tiling(block, np.zeros((0, block), np.int32), np.zeros(0, np.int64), np.zeros(0, np.int64))
    starts = np.concatenate([[0], np.cumsum(run_sizes)])
    # Unused tokens keep to tiles of their own: a tile of used tokens then stays full where it can be.
    boundary = np.concatenate([[True], (order.run_group[1:] < 0) != (order.run_group[:-1] < 0)])
    large = run_sizes >= align * block
    if large.any():
        # A stretch ends where a large run begins or ends, or where packed runs change their group.
        boundary |= large
        boundary[1:] |= large[:-1] | (order.run_group[1:] != order.run_group[:-1])
    stretch_starts = starts[:-1][boundary]
    stretch_sizes = np.diff(np.append(stretch_starts, num_tokens))
    padded = -(-stretch_sizes // block) * block
    shift = np.concatenate([[0], np.cumsum(padded)[:-1]]) - stretch_starts
    slots = np.arange(num_tokens) + np.repeat(shift, stretch_sizes)
    num_tiles = int(padded.sum()) // block
    tiles = np.full(num_tiles * block, -1, np.int32)
    tiles[slots] = order.tokens
    place = np.empty(num_tokens, np.int64)
    place[order.tokens] = slots
    count = np.bincount(slots // block, minlength=num_tiles).astype(np.int64)
    return Tiling(block, tiles.reshape(num_tiles, block), place, count)


def spatial_ranks(coords: NDArray[np.int64], origin: NDArray[np.int64], box: tuple[int, ...]) -> NDArray[np.int64]:
    """Rank tokens box by box: all tokens of one ``box``-shaped cell of the grid come together.

    This is the token permutation of NATTEN (Hassani et al., arXiv:2504.16922): a tile of consecutive tokens is
    then compact in every dimension, and windows cut fewer of them.

    Args:
        coords: ``(tokens, n)`` grid coordinates.
        origin: ``(n,)`` where the first cell starts.
        box: Cell shape.
    """
    shape = np.asarray(box, np.int64)
    cell, within = np.divmod(coords - origin, shape)
    columns = [*within.T[::-1], *cell.T[::-1]]  # lexsort: last key is the primary one
    rank = np.empty(len(coords), np.int64)
    rank[np.lexsort(columns)] = np.arange(len(coords))
    return rank
