"""``BlockSparsePlan``: what every backend runs, and the definition of its format."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from canvas_engineering.errors import PlanError
from canvas_engineering.plan.bits import unpack_masks
from canvas_engineering.plan.stats import PlanStats, plan_stats

if TYPE_CHECKING:
    from canvas_engineering.canvas import CanvasLayout
    from canvas_engineering.connectivity import CanvasTopology
    from canvas_engineering.masks import MaskSpec
    from canvas_engineering.program import CanvasProgram

Softmax = Literal["connection", "joint"]
BlockSize = int | Literal["auto"]
IntArray = NDArray[np.int32]
Lowered = TypeVar("Lowered")

FORMAT_VERSION = 1
#: The arrays of a plan, in the order in which they enter the digest and a plan file.
ARRAY_FIELDS: dict[str, type[np.generic]] = {
    "q_tokens": np.int32,
    "kv_tokens": np.int32,
    "set_ptr": np.int32,
    "entry_ptr": np.int64,
    "entry_kv": np.int32,
    "entry_mask": np.int32,
    "masks": np.uint8,
    "row_weight": np.float32,
    "row_connection": np.int32,
}


@dataclass(frozen=True)
class Transpose:
    """The entries of a plan seen from the keys: for each kv tile, the (softmax set, q tile) pairs that visit it.

    Entries of one kv tile stand at ``entry_ptr[t]:entry_ptr[t + 1]`` in ascending order of their set.
    """

    entry_ptr: NDArray[np.int64]  # (num_kv_tiles + 1,)
    entry: NDArray[np.int64]  # (num_entries,) index into the plan's own entries
    entry_set: IntArray  # (num_entries,) softmax set of the entry
    entry_q: IntArray  # (num_entries,) q tile of the entry
    entry_mask: IntArray  # (num_entries,) as in the plan


@dataclass(frozen=True, eq=False)
class BlockSparsePlan:
    """A canvas topology compiled to tiles: plain arrays, the same for every backend.

    The meaning of a plan is this loop (``q``, ``k``, ``v`` of one head; a test runs it as it stands)::

        out = zeros(num_q, head_dim)
        for tile in range(num_q_tiles):
            rows = q_tokens[tile]                                  # (block_q,) token ids, -1 = padding
            for s in range(set_ptr[tile], set_ptr[tile + 1]):      # softmax sets of this tile
                keys, allowed = [], []
                for e in range(entry_ptr[s], entry_ptr[s + 1]):    # visited kv tiles of this set
                    keys.append(kv_tokens[entry_kv[e]])            # (block_kv,) token ids, -1 = padding
                    allowed.append(tile_mask(entry_mask[e]))       # all True for a full tile, else a stored mask
                out[rows] += row_weight[s][:, None] * softmax_attention(q[rows], k[keys], v[keys], allowed)

    where padding rows are not written, padding keys are never allowed, and ``softmax_attention`` of a row
    without an allowed key is 0.

    Invariants, checked by :meth:`validate`:

    * every token ``0..num_q-1`` stands exactly once in ``q_tokens``, every token ``0..num_kv-1`` exactly once
      in ``kv_tokens``; padding (``-1``) only at the end of a tile, so a count can stand for a padding mask;
    * the entries of a set are in ascending order of their kv tile, without repetition;
    * bits of ``masks`` at padding keys are 0; ``entry_mask == -1`` marks a full tile: every token of the q
      tile reads every token of the kv tile. A row that has no key in a set has all its mask bits 0 there.

    Attributes:
        num_q, num_kv: Number of query and key tokens.
        block_q, block_kv: Tile sizes, multiples of 8.
        softmax: ``"connection"`` (weighted sum of one softmax per group) or ``"joint"`` (one softmax per row).
        q_tokens: ``(num_q_tiles, block_q)`` int32, token ids in plan order.
        kv_tokens: ``(num_kv_tiles, block_kv)`` int32.
        set_ptr: ``(num_q_tiles + 1,)`` int32, the softmax sets of each q tile.
        entry_ptr: ``(num_sets + 1,)`` int64, the visited kv tiles of each set.
        entry_kv: ``(num_entries,)`` int32, kv tile of each entry.
        entry_mask: ``(num_entries,)`` int32, index into ``masks``, or -1 for a full tile.
        masks: ``(num_masks, block_q, block_kv // 8)`` uint8, distinct masks of partial tiles, bit-packed along
            the keys (bit ``j % 8`` of byte ``j // 8``).
        row_weight: ``(num_sets, block_q)`` float32, weight of each row in each set, 0 where the row has none.
        row_connection: ``(num_sets, block_q)`` int32, index of the connection a row's group comes from, -1 for
            none, and for the one set of a joint softmax.
        source: What the plan was compiled from, for messages and files.
        grid, regions: Canvas shape ``(T, *spatial)`` and the (name, bounds) of its regions, for pictures; may be
            empty. These three are no part of the digest.
    """

    num_q: int
    num_kv: int
    block_q: int
    block_kv: int
    softmax: Softmax
    q_tokens: IntArray
    kv_tokens: IntArray
    set_ptr: IntArray
    entry_ptr: NDArray[np.int64]
    entry_kv: IntArray
    entry_mask: IntArray
    masks: NDArray[np.uint8]
    row_weight: NDArray[np.float32]
    row_connection: IntArray
    source: str = ""
    grid: tuple[int, ...] = ()
    regions: tuple[tuple[str, tuple[int, ...]], ...] = ()
    _lowered: dict[Hashable, Any] = field(default_factory=dict, repr=False)

    # -- construction ---------------------------------------------------------------------------------------

    @classmethod
    def from_topology(
        cls,
        topology: CanvasTopology,
        layout: CanvasLayout,
        *,
        softmax: Softmax = "connection",
        block_q: BlockSize = "auto",
        block_kv: BlockSize = "auto",
        program: CanvasProgram | None = None,
        skip_temporal: bool = False,
        normalize: bool = True,
    ) -> BlockSparsePlan:
        """Compile the connections of ``topology`` over all positions of ``layout``.

        Args:
            topology: The declared connections; one that names an unknown region is skipped with a warning.
            layout: The grid and its regions; queries and keys are its ``num_positions`` tokens.
            softmax: ``"connection"``: every group has its own softmax, and a row's groups are summed with their
                weights. ``"joint"``: one softmax over the union of a row's keys; weights do not enter.
            block_q, block_kv: Tile sizes (multiples of 8), or ``"auto"`` for the least predicted time.
            program: Its ``ConnectionProgram.mask_spec`` replaces a connection's own mask.
            skip_temporal: Ignore ``t_src`` and ``t_dst``.
            normalize: Scale the weights of each row to sum to 1 (only for ``softmax="connection"``).

        Raises:
            PlanError: An argument is not one of those above; the message names it, what is required and the value.
        """
        from canvas_engineering.plan.compile import compile_topology

        return compile_topology(
            topology,
            layout,
            softmax=softmax,
            block_q=block_q,
            block_kv=block_kv,
            program=program,
            skip_temporal=skip_temporal,
            normalize=normalize,
        )

    @classmethod
    def from_mask_spec(
        cls,
        mask_spec: MaskSpec,
        layout: CanvasLayout,
        src: str,
        dst: str,
        *,
        block_q: BlockSize = "auto",
        block_kv: BlockSize = "auto",
    ) -> BlockSparsePlan:
        """Compile one mask between two regions; tokens are numbered within the regions.

        Queries are the ``layout.region_numel(src)`` positions of ``src`` in ``region_indices`` order, keys those
        of ``dst``. One softmax per row.

        Raises:
            PlanError: A block size that is not allowed. CanvasError: an unknown region or an ill-shaped mask.
        """
        from canvas_engineering.plan.compile import compile_mask_spec

        return compile_mask_spec(mask_spec, layout, src, dst, block_q=block_q, block_kv=block_kv)

    @classmethod
    def from_mask(
        cls, mask: NDArray[np.bool_], *, block_q: BlockSize = "auto", block_kv: BlockSize = "auto"
    ) -> BlockSparsePlan:
        """Compile an explicit boolean mask ``(num_q, num_kv)``; one softmax per row.

        Raises:
            PlanError: ``mask`` is not a two-dimensional boolean array, or a block size is not allowed.
        """
        from canvas_engineering.plan.compile import compile_mask

        return compile_mask(mask, block_q=block_q, block_kv=block_kv)

    # -- sizes ----------------------------------------------------------------------------------------------

    @property
    def num_q_tiles(self) -> int:
        return self.q_tokens.shape[0]

    @property
    def num_kv_tiles(self) -> int:
        return self.kv_tokens.shape[0]

    @property
    def num_sets(self) -> int:
        """Softmax sets, counted once per q tile that has them."""
        return self.row_weight.shape[0]

    @property
    def num_entries(self) -> int:
        """Visited (set, kv tile) pairs."""
        return self.entry_kv.shape[0]

    @property
    def num_masks(self) -> int:
        return self.masks.shape[0]

    @cached_property
    def max_sets(self) -> int:
        """Most softmax sets that one q tile has; 1 means the plan has a log-sum-exp per row."""
        return int(np.diff(self.set_ptr).max(initial=0))

    @cached_property
    def q_count(self) -> IntArray:
        """``(num_q_tiles,)`` int32: tokens of each q tile, padding left out."""
        return (self.q_tokens >= 0).sum(axis=1, dtype=np.int32)

    @cached_property
    def kv_count(self) -> IntArray:
        """``(num_kv_tiles,)`` int32: tokens of each kv tile, padding left out."""
        return (self.kv_tokens >= 0).sum(axis=1, dtype=np.int32)

    @cached_property
    def set_tile(self) -> IntArray:
        """``(num_sets,)`` int32: q tile of each softmax set."""
        return np.repeat(np.arange(self.num_q_tiles, dtype=np.int32), np.diff(self.set_ptr))

    @cached_property
    def entry_set(self) -> IntArray:
        """``(num_entries,)`` int32: softmax set of each entry."""
        return np.repeat(np.arange(self.num_sets, dtype=np.int32), np.diff(self.entry_ptr))

    # -- order ----------------------------------------------------------------------------------------------

    @cached_property
    def q_order(self) -> IntArray:
        """``(num_q,)`` int32: the query tokens in plan order."""
        return self.q_tokens[self.q_tokens >= 0]

    @cached_property
    def kv_order(self) -> IntArray:
        """``(num_kv,)`` int32: the key tokens in plan order."""
        return self.kv_tokens[self.kv_tokens >= 0]

    @cached_property
    def in_plan_order(self) -> BlockSparsePlan:
        """The same plan for inputs already permuted by ``q_order`` and ``kv_order``: every tile is a slice."""
        return self.renumbered(self.q_order, self.kv_order)

    @cached_property
    def is_contiguous(self) -> bool:
        """Whether every tile's tokens are consecutive, so that a tile is a slice and needs no gather."""

        def consecutive(tokens: IntArray) -> bool:
            step_is_one = np.diff(tokens, axis=1) == 1
            return bool((step_is_one | (tokens[:, 1:] < 0)).all())

        return consecutive(self.q_tokens) and consecutive(self.kv_tokens)

    def renumbered(self, q_order: NDArray[np.integer], kv_order: NDArray[np.integer]) -> BlockSparsePlan:
        """The same plan for inputs permuted by the given orders (``new[i] = old[order[i]]``).

        Raises:
            PlanError: An order is not a permutation of the tokens.
        """

        def renumber(tokens: IntArray, order: NDArray[np.integer], count: int, name: str) -> IntArray:
            if order.shape != (count,) or not np.array_equal(np.sort(order), np.arange(count)):
                raise PlanError(f"{name} must be a permutation of the {count} tokens, got shape {order.shape}")
            place = np.full(count + 1, -1, np.int32)  # the extra last slot keeps padding (-1) at -1
            place[order] = np.arange(count, dtype=np.int32)
            return place[tokens]

        return replace(
            self,
            q_tokens=renumber(self.q_tokens, q_order, self.num_q, "q_order"),
            kv_tokens=renumber(self.kv_tokens, kv_order, self.num_kv, "kv_order"),
            _lowered={},
        )

    @cached_property
    def transpose(self) -> Transpose:
        """The entries seen from the keys, for dK and dV."""
        by_kv = np.argsort(self.entry_kv, kind="stable")
        counts = np.bincount(self.entry_kv, minlength=self.num_kv_tiles)
        return Transpose(
            entry_ptr=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
            entry=by_kv.astype(np.int64),
            entry_set=self.entry_set[by_kv],
            entry_q=self.set_tile[self.entry_set[by_kv]],
            entry_mask=self.entry_mask[by_kv],
        )

    @cached_property
    def q_work(self) -> IntArray:
        """``(num_q_tiles,)`` int32: q tiles, those with the most entries first."""
        visits = self.entry_ptr[self.set_ptr[1:]] - self.entry_ptr[self.set_ptr[:-1]]
        return np.argsort(-visits, kind="stable").astype(np.int32)

    @cached_property
    def kv_work(self) -> IntArray:
        """``(num_kv_tiles,)`` int32: kv tiles, those with the most entries first."""
        return np.argsort(-np.diff(self.transpose.entry_ptr), kind="stable").astype(np.int32)

    # -- meaning --------------------------------------------------------------------------------------------

    def tile_mask(self, mask: int) -> NDArray[np.bool_]:
        """``(block_q, block_kv)`` bool: a stored mask, or all True for ``mask == -1`` (a full tile)."""
        if mask < 0:
            return np.ones((self.block_q, self.block_kv), np.bool_)
        return unpack_masks(self.masks[mask])

    def to_dense(self) -> tuple[NDArray[np.bool_], NDArray[np.float32]]:
        """The meaning as dense arrays, for tests: masks ``(S, num_q, num_kv)`` bool, weights ``(S, num_q)`` float32.

        ``S`` is the largest number of softmax sets a row has. Memory is ``S * num_q * num_kv`` bytes.
        """
        masks = np.zeros((self.max_sets, self.num_q, self.num_kv), np.bool_)
        weights = np.zeros((self.max_sets, self.num_q), np.float32)
        for tile in range(self.num_q_tiles):
            rows = self.q_tokens[tile][: self.q_count[tile]]
            for slot, s in enumerate(range(self.set_ptr[tile], self.set_ptr[tile + 1])):
                weights[slot, rows] = self.row_weight[s, : rows.size]
                for e in range(self.entry_ptr[s], self.entry_ptr[s + 1]):
                    keys = self.kv_tokens[self.entry_kv[e]][: self.kv_count[self.entry_kv[e]]]
                    masks[slot][np.ix_(rows, keys)] = self.tile_mask(self.entry_mask[e])[: rows.size, : keys.size]
        return masks, weights

    def stats(self) -> PlanStats:
        """Pairs, tiles, padding, FLOPs and bytes of the plan."""
        return plan_stats(self)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the content: equal plans have equal digests, across processes and machines."""
        sha = hashlib.sha256(
            f"{FORMAT_VERSION} {self.num_q} {self.num_kv} {self.block_q} {self.block_kv} {self.softmax}".encode()
        )
        for name, dtype in ARRAY_FIELDS.items():
            array = np.ascontiguousarray(getattr(self, name), dtype=np.dtype(dtype).newbyteorder("<"))
            sha.update(f"{name} {array.shape}".encode())
            sha.update(array.data)
        return sha.hexdigest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BlockSparsePlan) and (self is other or self.digest == other.digest)

    def __hash__(self) -> int:
        return hash(self.digest)

    def __repr__(self) -> str:
        return (
            f"BlockSparsePlan(num_q={self.num_q}, num_kv={self.num_kv}, block_q={self.block_q}, "
            f"block_kv={self.block_kv}, softmax={self.softmax!r}, entries={self.num_entries}, "
            f"digest={self.digest[:12]})"
        )

    def __str__(self) -> str:
        return self.stats().describe(self)

    def __getstate__(self) -> dict[str, Any]:
        # Lowered arrays belong to this process's devices, derived ones are cheap to derive again.
        return {f.name: {} if f.name == "_lowered" else getattr(self, f.name) for f in fields(self)}

    def __deepcopy__(self, memo: dict[int, Any]) -> BlockSparsePlan:
        return self  # immutable, so a copied module may share it

    # -- devices and files ----------------------------------------------------------------------------------

    def lowered(self, key: Hashable, lower: Callable[[BlockSparsePlan], Lowered]) -> Lowered:
        """``lower(self)``, computed once per ``key`` (backend and device) and kept with the plan."""
        if key not in self._lowered:
            self._lowered[key] = lower(self)
        result: Lowered = self._lowered[key]
        return result

    def validate(self) -> None:
        """Check every size, pointer and index.

        Raises:
            PlanError: The first violated requirement, with the array and the value.
        """
        from canvas_engineering.plan.validate import validate_plan

        validate_plan(self)

    def save(self, path: str | Path) -> None:
        """Write the plan to ``path`` (a NumPy ``.npz`` archive without pickles), atomically.

        Raises:
            PlanError: The path cannot be written.
        """
        from canvas_engineering.plan.io import save_plan

        save_plan(self, path)

    @classmethod
    def load(cls, path: str | Path) -> BlockSparsePlan:
        """Read a plan written by :meth:`save`, checking version, digest and every index.

        Raises:
            PlanError: The file is missing, truncated, edited, foreign or of another version.
        """
        from canvas_engineering.plan.io import load_plan

        return load_plan(path)

    def plot(self, path: str | Path | None = None) -> Any:
        """Draw the visited tiles in plan order, regions along both axes; needs matplotlib (extra ``viz``).

        Args:
            path: Where to write the picture (png, svg, pdf, ...); None writes nothing.

        Returns:
            The ``matplotlib.figure.Figure``.

        Raises:
            PlanError: ``path`` has an ending that matplotlib cannot write. MissingDependencyError: no matplotlib.
        """
        from canvas_engineering.plan.plot import plot_plan

        return plot_plan(self, path)

    def to_mask_info(self, head_shards: int = 1, q_seq_shards: int = 1, *, is_dkv: bool = False) -> Any:
        """The ``MaskInfo`` of JAX's Splash attention for this plan, in plan order; joint plans only.

        Its kernel takes one for the forward and dQ passes, and one with ``is_dkv=True``. Time and memory follow the
        visited tiles. Splash leaves rows without keys undefined.

        Raises:
            PlanError: The plan has more than one softmax set per row.
            CanvasError: (a ``ValueError``) the shards do not divide the plan's q tiles.
        """
        from canvas_engineering.plan.export import to_mask_info

        return to_mask_info(self, head_shards, q_seq_shards, is_dkv)

    def to_block_mask(self, device: Any = "cpu") -> Any:
        """The ``BlockMask`` of PyTorch's FlexAttention for this plan, in plan order; joint plans only.

        Raises:
            PlanError: The plan has more than one softmax set per row. MissingDependencyError: torch is missing.
        """
        from canvas_engineering.plan.export import to_block_mask

        return to_block_mask(self, device)
