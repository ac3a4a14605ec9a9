"""A plan as the TPU kernels read it: flat lists of entries, and masks packed for the vector unit.

The forward and dQ kernels walk the *row list*: the entries of the plan in order of q tile and softmax set. The
dK/dV kernel walks the *column list*: the transpose, in order of kv tile. The fields of an entry are packed into as
few 32-bit words as hold them, one array per word, which the kernels prefetch into scalar memory (SMEM): that is
smaller than an array of the smallest integer type per field, and faster to read than 8- or 16-bit types, because
scalar memory is addressed by words. A short list has a word per field, which saves a shift and a mask per read: 23 of
the 508 bundles of a dK/dV step of 128 x 128 on a v5e. SMEM is 1 MiB, so a long list is cut, between tiles, into chunks
of equal length that run one after the other through one compiled kernel.

Every tile and every set has at least one entry in its list: where the plan visits nothing a *dummy* entry, which
computes nothing, makes the kernel write zeros.

Masks are unpacked from the plan's bits and packed again along the sublanes: rows ``8 g + r`` of a mask, for
``g = 0..31``, are bit ``g`` of row ``r`` of eight rows of 32-bit words, so that a register of mask (8 rows) is one
shift of one register of words.

Only NumPy is needed here.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from canvas_engineering.errors import PlanError
from canvas_engineering.plan import BlockSparsePlan
from canvas_engineering.plan.bits import pack_masks, unpack_masks

# What a kernel does at an entry, as bits of its flags.
FIRST_OF_SET = 1
LAST_OF_SET = 2
FIRST_OF_TILE = 4
LAST_OF_TILE = 8
FULL = 16
MASKED = 32

SUBLANES = 8
#: SMEM for one list. The whole SMEM is 1 MiB; the rest is left to the pipeline and the compiler.
LIST_BYTES = 512 * 1024
#: A list has a word per field where it then fits into this part of its memory.
_SPREAD_SHARE = 8
_MASK_CHUNK = 1 << 24  # bools unpacked at a time


class FlatEntries(NamedTuple):
    """A list before it is packed and cut: one row per entry, in the order in which a kernel walks them."""

    tile: NDArray[np.int64]  # the tile that is accumulated: q tile (row list) or kv tile (column list)
    other: NDArray[np.int64]  # the tile that is streamed
    softmax_set: NDArray[np.int64]
    mask: NDArray[np.int64]
    flags: NDArray[np.int64]


@dataclass(frozen=True)
class Field:
    """Where a field of an entry stands: ``(words[word] >> shift) & (2**bits - 1)``."""

    word: int
    shift: int
    bits: int


@dataclass(frozen=True)
class ListFormat:
    """What a kernel must know of a list when it is compiled.

    Attributes:
        fields: By name; a field that is missing says nothing (``mask`` where the plan has none, ``softmax_set``
            where each q tile has exactly the set of its own number).
        words: Words per entry.
        chunks, length: Chunks, and entries per chunk.
        has_full, has_masked: Kinds of tiles that occur.
    """

    fields: tuple[tuple[str, Field], ...]
    words: int
    chunks: int
    length: int
    has_full: bool
    has_masked: bool

    def field(self, name: str) -> Field | None:
        return dict(self.fields).get(name)


EntryWords = tuple[NDArray[np.int32], ...]  # per word: (chunks, length)


@dataclass(frozen=True, eq=False)
class LoweredPlan:
    """All that the kernels need of a plan.

    Attributes:
        num_sets: Softmax sets, with one more at the end where some q tile has none of its own.
        tile_set: ``(num_q_tiles,)`` int32: first set of each q tile.
        set_tile: ``(num_sets,)`` int32: q tile of each set (of the extra set: any).
        rows, cols: The lists, packed.
        max_sets: Most sets of one q tile, at least 1.
        row_masks: ``(num_masks, words, block_kv)`` int32, packed along the queries.
        col_masks: ``(num_masks, words, block_q)`` int32, packed along the keys.
        row_weight: ``(num_sets, 1, block_q)`` float32.
        unit_weight: Whether every weight that counts is 1, so that none has to be applied.
    """

    num_sets: int
    tile_set: NDArray[np.int32]
    set_tile: NDArray[np.int32]
    max_sets: int
    row_format: ListFormat
    col_format: ListFormat
    rows: EntryWords
    cols: EntryWords
    row_masks: NDArray[np.int32]
    col_masks: NDArray[np.int32]
    row_weight: NDArray[np.float32]
    unit_weight: bool

    @property
    def one_set_each(self) -> bool:
        """Whether each q tile has exactly the set of its own number."""
        return self.row_format.field("softmax_set") is None


def lower_plan(plan: BlockSparsePlan) -> LoweredPlan:
    """Lower ``plan``; cost follows its entries and masks.

    Raises:
        PlanError: One tile alone has more entries than scalar memory holds.
    """
    rows, cols, masks = flat_lists(plan)
    num_sets = int(rows.softmax_set.max(initial=-1)) + 1
    tile_set = np.full(plan.num_q_tiles, num_sets - 1, np.int32)
    has_set = np.diff(plan.set_ptr) > 0
    tile_set[has_set] = plan.set_ptr[:-1][has_set]
    set_tile = np.zeros(num_sets, np.int32)
    set_tile[: plan.num_sets] = plan.set_tile
    silent = ["mask"] if not masks.shape[0] else []
    if num_sets == plan.num_q_tiles and np.array_equal(tile_set, np.arange(num_sets)):
        silent.append("softmax_set")
    row_weight = np.zeros((num_sets, 1, plan.block_q), np.float32)
    row_weight[: plan.num_sets, 0] = plan.row_weight
    row_format, packed_rows = pack_lists([rows], "q", silent)
    col_format, packed_cols = pack_lists([cols], "kv", silent)
    return LoweredPlan(
        num_sets=num_sets,
        tile_set=tile_set,
        set_tile=set_tile,
        max_sets=max(plan.max_sets, 1),
        row_format=row_format,
        col_format=col_format,
        rows=packed_rows[0],
        cols=packed_cols[0],
        row_masks=pack_along_sublanes(masks, plan.block_kv, transpose=False),
        col_masks=pack_along_sublanes(masks, plan.block_kv, transpose=True),
        row_weight=row_weight,
        unit_weight=_unit_weight(plan),
    )


def flat_lists(plan: BlockSparsePlan) -> tuple[FlatEntries, FlatEntries, NDArray[np.uint8]]:
    """The row list, the column list, and the masks they index, bit-packed as in the plan."""
    entry_mask, masks = _with_padding_masks(plan)
    tile = plan.set_tile.astype(np.int64)[plan.entry_set]
    softmax_set = plan.entry_set.astype(np.int64)
    kind = np.where(entry_mask < 0, FULL, MASKED)

    # Dummies: a set without entries keeps its number; all q tiles without sets share one extra set.
    empty_sets = np.flatnonzero(np.diff(plan.entry_ptr) == 0)
    empty_tiles = np.flatnonzero(np.diff(plan.set_ptr) == 0)
    extra = np.concatenate([empty_sets, np.full(empty_tiles.size, plan.num_sets)])
    extra_tile = np.concatenate([plan.set_tile[empty_sets], empty_tiles])
    zeros = np.zeros(extra.size, np.int64)
    rows = FlatEntries(
        np.concatenate([tile, extra_tile]),
        np.concatenate([plan.entry_kv, zeros]),
        np.concatenate([softmax_set, extra]),
        np.concatenate([np.maximum(entry_mask, 0), zeros]),
        np.concatenate([kind, zeros]),
    )
    rows = _take(rows, np.lexsort((rows.softmax_set, rows.tile)))  # stable: kv tiles stay in order
    if rows.tile.size:
        rows = rows._replace(
            flags=rows.flags
            | _boundaries(rows.softmax_set, FIRST_OF_SET, LAST_OF_SET, also=rows.tile)
            | _boundaries(rows.tile, FIRST_OF_TILE, LAST_OF_TILE)
        )

    unread = np.flatnonzero(np.bincount(plan.entry_kv, minlength=plan.num_kv_tiles) == 0)
    zeros = np.zeros(unread.size, np.int64)
    cols = FlatEntries(
        np.concatenate([plan.entry_kv, unread]),
        np.concatenate([tile, zeros]),
        np.concatenate([softmax_set, zeros]),
        np.concatenate([np.maximum(entry_mask, 0), zeros]),
        np.concatenate([kind, zeros]),
    )
    cols = _take(cols, np.argsort(cols.tile, kind="stable"))
    if cols.tile.size:
        cols = cols._replace(flags=cols.flags | _boundaries(cols.tile, FIRST_OF_TILE, LAST_OF_TILE))
    return rows, cols, masks


def pack_lists(
    lists: Sequence[FlatEntries], side: str, silent: Collection[str] = ()
) -> tuple[ListFormat, list[EntryWords]]:
    """One format for several lists (the shards of a plan), and each list in that format.

    Padding at the end of a chunk repeats its last entry, without flags; so does the padding of shorter lists.

    Args:
        side: ``"q"`` or ``"kv"``: what a tile is, for messages.
        silent: Fields to leave out.

    Raises:
        PlanError: The entries of one tile do not fit into scalar memory; the message has the numbers.
    """
    fields, words = _fields(lists, silent)
    starts = [chunk_starts(entries, words, side) for entries in lists]
    chunks = max(s.size for s in starts)
    # Shorter lists get empty chunks.
    starts = [np.append(s, np.full(chunks - s.size, e.tile.size)) for s, e in zip(starts, lists, strict=True)]
    stops = [np.append(s[1:], e.tile.size) for s, e in zip(starts, lists, strict=True)]
    length = max(int((stop - start).max(initial=0)) for start, stop in zip(starts, stops, strict=True))
    kinds = np.bitwise_or.reduce(np.concatenate([entries.flags for entries in lists]), initial=0)
    form = ListFormat(fields, words, chunks, length, bool(kinds & FULL), bool(kinds & MASKED))
    packed = []
    for entries, start, stop in zip(lists, starts, stops, strict=True):
        place = start[:, None] + np.arange(length)
        beyond = place >= stop[:, None]
        index = np.clip(np.minimum(place, stop[:, None] - 1), 0, None)
        padded = FlatEntries(*(values[index] for values in entries))
        packed.append(_pack(form, padded._replace(flags=np.where(beyond, 0, padded.flags))))
    return form, packed


def _fields(lists: Sequence[FlatEntries], silent: Collection[str]) -> tuple[tuple[tuple[str, Field], ...], int]:
    """A word per field for a short list; else as few words as first fit finds, widest first, none across two words."""
    largest = {
        name: max(int(getattr(entries, name).max(initial=0)) for entries in lists)
        for name in FlatEntries._fields
        if name not in silent
    }
    size = max(entries.tile.size for entries in lists)
    if 4 * size * len(largest) * _SPREAD_SHARE <= LIST_BYTES:
        return tuple((name, Field(word, 0, 32)) for word, name in enumerate(largest)), len(largest)
    used: list[int] = []
    fields = []
    for name in sorted(largest, key=lambda name: -largest[name]):
        bits = max(1, largest[name].bit_length())
        word = next((i for i, taken in enumerate(used) if taken + bits <= 32), len(used))
        if word == len(used):
            used.append(0)
        fields.append((name, Field(word, used[word], bits)))
        used[word] += bits
    return tuple(fields), len(used)


def _pack(form: ListFormat, entries: FlatEntries) -> EntryWords:
    words = [np.zeros(entries.tile.shape, np.uint32) for _ in range(form.words)]
    for name, field in form.fields:
        words[field.word] |= getattr(entries, name).astype(np.uint32) << np.uint32(field.shift)
    return tuple(word.view(np.int32) for word in words)


def chunk_starts(entries: FlatEntries, words: int, side: str) -> NDArray[np.int64]:
    """First entry of each chunk.

    Raises:
        PlanError: The entries of one tile do not fit.
    """
    size = entries.tile.size
    capacity = LIST_BYTES // (4 * words)
    if size <= capacity:
        return np.zeros(1, np.int64)
    tile_starts = np.flatnonzero(entries.flags & FIRST_OF_TILE)
    most = int(np.diff(np.append(tile_starts, size)).max())
    if most > capacity:
        raise PlanError(
            f"the entries of one {side} tile must fit into {LIST_BYTES} bytes of TPU scalar memory: at most "
            f"{capacity} entries, got {most}; larger tiles have fewer entries"
        )
    # As few chunks as possible, each as close to the average as whole tiles allow.
    chunks = -(-size // capacity)
    while True:
        wanted = np.arange(chunks) * size // chunks
        starts = np.unique(tile_starts[np.searchsorted(tile_starts, wanted, side="right") - 1])
        if np.diff(np.append(starts, size)).max() <= capacity:
            return starts
        chunks += 1


def _take(entries: FlatEntries, order: NDArray[np.intp]) -> FlatEntries:
    return FlatEntries(*(values[order] for values in entries))


def _boundaries(
    keys: NDArray[np.int64], first: int, last: int, also: NDArray[np.int64] | None = None
) -> NDArray[np.int64]:
    """``first`` where a run of equal keys (and equal ``also``) begins, plus ``last`` where it ends."""
    change = keys[1:] != keys[:-1]
    if also is not None:
        change |= also[1:] != also[:-1]
    return np.append(True, change) * first + np.append(change, True) * last


def _with_padding_masks(plan: BlockSparsePlan) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
    """Masks of the entries, where full tiles with padding keys get a mask that excludes them.

    What is added depends on the kv tiles alone, so that all shards of a plan have the same masks.
    """
    entry_mask = plan.entry_mask.astype(np.int64)
    counts = np.unique(plan.kv_count[plan.kv_count < plan.block_kv])
    count = plan.kv_count[plan.entry_kv]
    padded = (entry_mask < 0) & (count < plan.block_kv)
    entry_mask[padded] = plan.num_masks + np.searchsorted(counts, count[padded])
    columns = np.arange(plan.block_kv) < counts[:, None]
    shape = (counts.size, plan.block_q, plan.block_kv)
    return entry_mask, np.concatenate([plan.masks, pack_masks(np.broadcast_to(columns[:, None], shape))])


def mask_words(rows: int) -> int:
    """Rows of 32-bit words that hold ``rows`` rows of a mask."""
    return SUBLANES * -(-rows // (32 * SUBLANES))


def pack_along_sublanes(masks: NDArray[np.uint8], block_kv: int, *, transpose: bool) -> NDArray[np.int32]:
    """``(num_masks, block_q, block_kv / 8)`` bits to ``(num_masks, words, block_kv)`` int32.

    Bit ``g % 32`` of word row ``8 (g // 32) + r`` is row ``8 g + r`` of the mask; with ``transpose`` the rows are
    the keys, and the result is ``(num_masks, words, block_q)``.
    """
    num_masks, block_q, _ = masks.shape
    rows, lanes = (block_kv, block_q) if transpose else (block_q, block_kv)
    groups = rows // SUBLANES
    packed = np.zeros((num_masks, mask_words(rows) // SUBLANES, SUBLANES, lanes), np.uint32)
    step = max(1, _MASK_CHUNK // (block_q * block_kv))
    for start in range(0, num_masks, step):
        dense = unpack_masks(masks[start : start + step])
        if transpose:
            dense = np.swapaxes(dense, 1, 2)
        by_group = dense.reshape(dense.shape[0], groups, SUBLANES, lanes)
        for g in range(groups):
            packed[start : start + step, g // 32] |= by_group[:, g].astype(np.uint32) << np.uint32(g % 32)
    return packed.reshape(num_masks, mask_words(rows), lanes).view(np.int32)


def _unit_weight(plan: BlockSparsePlan) -> bool:
    """Whether the weight is 1 for every row that has a key in its set."""
    real = np.arange(plan.block_q) < plan.q_count[plan.set_tile][:, None]
    other = real & (plan.row_weight != 1)
    sets = np.flatnonzero(other.any(axis=1))
    if not sets.size:
        return True
    if (plan.row_weight[sets][other[sets]] != 0).any():
        return False
    # Weight 0 is harmless exactly where the row has no key: look at the entries of those sets.
    in_sets = np.isin(plan.entry_set, sets)
    if (plan.entry_mask[in_sets] < 0).any():
        return False
    has_key: NDArray[np.bool_] = np.any(plan.masks, axis=2)  # (num_masks, block_q)
    return not bool(np.any(has_key[plan.entry_mask[in_sets]] & other[plan.entry_set[in_sets]]))
