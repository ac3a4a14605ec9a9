"""From a mask to the lists of its non-empty blocks, without holding the whole mask.

A mask is anything with ``shape == (num_q, num_kv)`` that answers ``mask[rows, columns]`` for two slices with a
bool array. It is read in strips of whole query blocks; what a strip holds is decided as cheaply as possible:

- causal, local, chunked and full masks allow one interval of keys per query: nothing is read at all;
- ``&`` and ``|`` of masks are decided from the blocks of their two sides; only where both sides are partial is
  the combination itself read;
- any other mask is read once, eight cells per machine word.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

# What a block of a mask holds; the values are those of ``MaskInfo.block_mask``.
EMPTY, PARTIAL, FULL = 0, 1, 2

# Cells read at a time: few enough for the strip to stay in the processor's cache for the second look at it.
_CELLS_PER_READ = 1 << 21

_SPLASH_MASKS = "jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask"


class BlockLists(NamedTuple):
    """The non-empty blocks of one mask in compressed rows, columns ascending within a row.

    Row ``i`` holds the entries ``row_ptr[i]:row_ptr[i + 1]``; ``mask_index`` is -1 for a full block, else the
    number of the block's content in the ``BlockStore``.
    """

    row_ptr: np.ndarray  # (num_q_blocks + 1,) int64
    kv_index: np.ndarray  # (num_entries,) int32
    mask_index: np.ndarray  # (num_entries,) int32


class BlockStore:
    """Distinct partial blocks, numbered in the order in which they were first added; kept bit-packed."""

    def __init__(self, block_q: int, block_kv: int) -> None:
        self._shape = (block_q, block_kv)
        self._number: dict[bytes, int] = {}

    def __len__(self) -> int:
        return len(self._number)

    def add(self, blocks: np.ndarray) -> np.ndarray:
        """Number the blocks ``(n, block_q, block_kv) bool``; equal blocks get equal numbers, ``(n,) int32``."""
        cells = self._shape[0] * self._shape[1]
        packed = np.packbits(blocks.reshape(len(blocks), cells), axis=1)
        number = self._number
        return np.array([number.setdefault(row.tobytes(), len(number)) for row in packed], dtype=np.int32)

    def stack(self) -> np.ndarray | None:
        """All blocks by number, ``(n, block_q, block_kv) bool``, or None when there is none."""
        if not self._number:
            return None
        cells = self._shape[0] * self._shape[1]
        packed = np.frombuffer(b"".join(self._number), dtype=np.uint8).reshape(len(self._number), -1)
        return np.unpackbits(packed, axis=1, count=cells).view(np.bool_).reshape(-1, *self._shape)


def list_blocks(mask: Any, block_q: int, block_kv: int, store: BlockStore | None) -> BlockLists:
    """The non-empty blocks of ``mask``; partial ones are added to ``store``, row by row.

    Without a ``store`` the content of partial blocks is of no interest: it is not read, and their
    ``mask_index`` is 0.
    """
    num_q, num_kv = mask.shape
    num_q_blocks = num_q // block_q
    blocks_per_strip = max(1, _CELLS_PER_READ // max(1, block_q * num_kv))
    row_counts, kv_indices, mask_indices = [np.zeros(1, np.int64)], [], []
    for start in range(0, num_q_blocks, blocks_per_strip):
        stop = min(start + blocks_per_strip, num_q_blocks)
        kinds = _strip_kinds(mask, slice(start * block_q, stop * block_q), block_q, block_kv)
        strip_row, kv_index = np.nonzero(kinds)
        partial = kinds[strip_row, kv_index] == PARTIAL
        mask_index = np.where(partial, 0, -1).astype(np.int32)
        if store is not None and partial.any():
            numbers = [
                store.add(_as_blocks(cells, block_q, block_kv))
                for _, _, cells in _read_runs(mask, kinds == PARTIAL, start, block_q, block_kv)
            ]
            mask_index[partial] = np.concatenate(numbers)
        row_counts.append(np.bincount(strip_row, minlength=stop - start))
        kv_indices.append(kv_index.astype(np.int32))
        mask_indices.append(mask_index)
    none = [np.zeros(0, np.int32)]
    return BlockLists(
        row_ptr=np.cumsum(np.concatenate(row_counts)),
        kv_index=np.concatenate(kv_indices or none),
        mask_index=np.concatenate(mask_indices or none),
    )


def array_kinds(cells: np.ndarray, block_q: int, block_kv: int) -> np.ndarray:
    """EMPTY, PARTIAL or FULL for each block of ``cells (rows, columns) bool``: ``(rows/block_q, ...) int8``."""
    rows, columns = cells.shape
    # Reduce as many cells per word as fit: both reductions are then bound by the speed of memory.
    word = next(size for size in (8, 4, 2, 1) if block_kv % size == 0)
    dtype = np.dtype(f"u{word}")
    full_word = int.from_bytes(b"\x01" * word, "little")
    if cells.strides[-1] != 1:
        cells = np.ascontiguousarray(cells)
    words = cells.view(dtype).reshape(rows // block_q, block_q, columns // word)
    shape = (rows // block_q, columns // block_kv, block_kv // word)
    some = np.bitwise_or.reduce(np.bitwise_or.reduce(words, axis=1).reshape(shape), axis=2) != 0
    every = np.bitwise_and.reduce(np.bitwise_and.reduce(words, axis=1).reshape(shape), axis=2) == full_word
    return some.astype(np.int8) + every


def _strip_kinds(mask: Any, rows: slice, block_q: int, block_kv: int) -> np.ndarray:
    """What each block of the query rows ``rows`` holds, ``(strip_blocks, num_kv_blocks) int8``."""
    library = _splash_masks()
    if library is not None:
        interval = _key_interval(library, mask, rows)
        if interval is not None:
            return _interval_kinds(*interval, block_q, mask.shape[1] // block_kv, block_kv)
        if type(mask) in (library.LogicalAnd, library.LogicalOr):
            left = _strip_kinds(mask.left, rows, block_q, block_kv)
            right = _strip_kinds(mask.right, rows, block_q, block_kv)
            kinds = np.minimum(left, right) if type(mask) is library.LogicalAnd else np.maximum(left, right)
            unsettled = (left == PARTIAL) & (right == PARTIAL)
            first_block = rows.start // block_q
            for row, columns, cells in _read_runs(mask, unsettled, first_block, block_q, block_kv):
                kinds[row, columns] = array_kinds(cells, block_q, block_kv)[0]
            return kinds
    num_kv_blocks = mask.shape[1] // block_kv
    step = max(1, _CELLS_PER_READ // max(1, (rows.stop - rows.start) * block_kv))
    parts = [np.zeros(((rows.stop - rows.start) // block_q, 0), np.int8)]
    for first in range(0, num_kv_blocks, step):
        columns = slice(first * block_kv, min(first + step, num_kv_blocks) * block_kv)
        parts.append(array_kinds(_read(mask, rows, columns), block_q, block_kv))
    return np.concatenate(parts, axis=1)


def _splash_masks() -> ModuleType | None:
    """JAX's module of mask classes if it is loaded; a mask of these classes cannot exist before that."""
    return sys.modules.get(_SPLASH_MASKS)


def _key_interval(library: ModuleType, mask: Any, rows: slice) -> tuple[np.ndarray, np.ndarray] | None:
    """First and last key each query of ``rows`` may attend, ``(rows,) int64`` each; None if not that simple.

    Only the very classes of JAX are looked into, not their subclasses, which may answer differently.
    """
    num_q, num_kv = mask.shape
    kind = type(mask)
    if kind is library.FullMask:
        first = np.zeros(rows.stop - rows.start, np.int64)
        return first, first + (num_kv - 1)
    if kind not in (library.CausalMask, library.LocalMask, library.ChunkedCausalMask):
        return None
    positions = np.asarray(mask.q_sequence)
    if positions.shape != (num_q,) or positions.dtype.kind != "i":
        return None
    query = positions[rows].astype(np.int64)
    if kind is library.ChunkedCausalMask:
        return query // mask.chunk_size * mask.chunk_size, query
    before, after = (None, 0) if kind is library.CausalMask else mask.window_size
    if any(not isinstance(size, int | np.integer | None) for size in (before, after, mask.offset)):
        return None
    centre = query + mask.offset
    first = np.zeros_like(query) if before is None else centre - before
    last = np.full_like(query, num_kv - 1) if after is None else centre + after
    return first, last


def _interval_kinds(first: np.ndarray, last: np.ndarray, block_q: int, num_kv_blocks: int, block_kv: int) -> np.ndarray:
    """``array_kinds`` of the mask whose row ``i`` allows the columns ``first[i]..last[i]``, both included."""
    num_rows = len(first) // block_q
    width = num_kv_blocks + 1
    first = np.maximum(first, 0)
    last = np.minimum(last, num_kv_blocks * block_kv - 1)
    row_start = np.repeat(np.arange(num_rows) * width, block_q)
    some_key = first <= last

    def rows_covering(begin: np.ndarray, end: np.ndarray) -> np.ndarray:
        # How many rows of each query block have begin <= kv block < end: a step up, a step down, summed up.
        counted = some_key & (begin < end)
        up = np.bincount((row_start + begin)[counted], minlength=num_rows * width)
        down = np.bincount((row_start + end)[counted], minlength=num_rows * width)
        return np.cumsum((up - down).reshape(num_rows, width), axis=1)[:, :num_kv_blocks]

    touched = rows_covering(first // block_kv, last // block_kv + 1)
    filled = rows_covering((first + block_kv - 1) // block_kv, (last + 1) // block_kv)
    return (touched > 0).astype(np.int8) + (filled == block_q)


def _read(mask: Any, rows: slice, columns: slice) -> np.ndarray:
    """``mask[rows, columns]`` as a bool array; a view where the mask returns one."""
    return np.asarray(mask[(rows, columns)]).astype(np.bool_, copy=False)


def _read_runs(
    mask: Any, wanted: np.ndarray, first_block: int, block_q: int, block_kv: int
) -> Iterator[tuple[int, slice, np.ndarray]]:
    """Read the blocks marked in ``wanted (strip_blocks, num_kv_blocks) bool``, neighbours in one go.

    Yields the row in ``wanted``, the slice of its kv blocks, and the cells ``(block_q, blocks * block_kv)``.
    """
    longest = max(1, _CELLS_PER_READ // (block_q * block_kv))
    for row in np.flatnonzero(wanted.any(axis=1)):
        edges = np.flatnonzero(np.diff(wanted[row], prepend=False, append=False))
        top = (first_block + int(row)) * block_q
        for run_start, run_stop in edges.reshape(-1, 2).tolist():
            for start in range(run_start, run_stop, longest):
                stop = min(start + longest, run_stop)
                columns = slice(start * block_kv, stop * block_kv)
                yield int(row), slice(start, stop), _read(mask, slice(top, top + block_q), columns)


def _as_blocks(cells: np.ndarray, block_q: int, block_kv: int) -> np.ndarray:
    """Cut ``cells (block_q, n * block_kv)`` into ``(n, block_q, block_kv)``."""
    return cells.reshape(block_q, -1, block_kv).swapaxes(0, 1)
