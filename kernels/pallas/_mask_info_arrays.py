"""From lists of non-empty blocks to the three grid arrays of a ``MaskInfo``.

The Splash kernel walks a grid of blocks: ``(head, q, kv)`` in the forward and dQ passes, ``(kv, head, q)`` in the
dK/dV pass. At each step it asks which data block and which mask block it will need next, so that it can fetch
them early. That next one is the block itself if it is non-empty (partial), else the nearest later one in walking
order; after the last one it is the first again. Each shard of heads and of queries is a walk of its own, and
query blocks are counted from the shard's first one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from canvas_engineering.kernels.pallas._mask_info_blocks import FULL, PARTIAL, BlockLists


class GridArrays(NamedTuple):
    data_next: np.ndarray  # (planes, rows, columns) integer
    mask_next: np.ndarray | None  # the same shape; None if no block is partial
    block_mask: np.ndarray  # the same shape, 0, 1 or 2


class _Dtypes(NamedTuple):
    data_next: np.dtype
    mask_next: np.dtype
    block_mask: np.dtype


class _Walk(NamedTuple):
    """The non-empty blocks of one shard in walking order, coordinates relative to the shard."""

    head: np.ndarray  # (n,) int32
    q: np.ndarray  # (n,) int32
    kv: np.ndarray  # (n,) int32
    mask: np.ndarray  # (n,) int32, -1 for a full block

    def kinds(self) -> np.ndarray:
        return np.where(self.mask < 0, FULL, PARTIAL)


def shrunk_arrays(
    blocks: BlockLists,
    num_kv_blocks: int,
    num_masks: int,
    *,
    head_shards: int,
    q_seq_shards: int,
    is_dkv: bool,
    downcast: bool,
) -> GridArrays:
    """The arrays of one mask shared by all heads, with empty blocks squeezed out.

    Forward: each row keeps its non-empty blocks, aligned left, and is as wide as the longest row of its shard.
    dK/dV: each column keeps its own, aligned at the bottom, and is as high as the shard's longest column.
    Shards are then padded at the end to a common size with the last value of ``data_next`` and ``mask_next``, so
    that the padding fetches nothing new. A grid without any step would leave the kernel's output unwritten: at
    least one, empty, is kept.
    """
    num_rows = len(blocks.row_ptr) - 1
    shard_rows = num_rows // q_seq_shards
    walks = [
        _walk([blocks], slice(shard * shard_rows, (shard + 1) * shard_rows), is_dkv, num_kv_blocks)
        for shard in range(q_seq_shards)
    ]
    # Entries per line: a row of the grid, or for dK/dV a column of it.
    lines = [
        np.bincount(walk.kv if is_dkv else walk.q, minlength=num_kv_blocks if is_dkv else shard_rows) for walk in walks
    ]
    lengths = [max(1, int(counts.max(initial=0))) for counts in lines]
    longest = max(lengths)

    # For dK/dV the arrays are filled transposed, so that a line is a row either way.
    shape = (q_seq_shards, num_kv_blocks if is_dkv else shard_rows, longest)
    dtypes = _choose_dtypes([blocks], shard_rows, num_masks, is_dkv, downcast and math.prod(shape) > 0)
    data_next = np.zeros(shape, dtypes.data_next)
    mask_next = np.zeros(shape, dtypes.mask_next) if num_masks else None
    block_mask = np.zeros(shape, dtypes.block_mask)
    for shard, (walk, counts, length) in enumerate(zip(walks, lines, lengths, strict=True)):
        line = walk.kv if is_dkv else walk.q
        slot = np.arange(len(line)) - np.repeat(np.cumsum(counts) - counts, counts)
        if is_dkv:
            slot += (length - counts)[line]
        block_mask[shard, line, slot] = walk.kinds()
        data_next[shard, line, slot] = walk.q if is_dkv else walk.kv
        data_next[shard, :, length:] = data_next[shard, :, length - 1 : length]
        if mask_next is not None:
            partial = np.flatnonzero(walk.mask >= 0)
            mask_next[shard, line, slot] = _next_values(len(line), partial, walk.mask[partial], dtypes.mask_next)
            mask_next[shard, :, length:] = mask_next[shard, :, length - 1 : length]

    def planes(array: np.ndarray) -> np.ndarray:
        if is_dkv:
            array = array.swapaxes(1, 2)
        shards, height, width = array.shape
        return np.repeat(array.reshape(1, shards * height, width), head_shards, axis=0)

    return GridArrays(planes(data_next), None if mask_next is None else planes(mask_next), planes(block_mask))


def whole_arrays(
    masks: Sequence[BlockLists],
    mask_of_head: Sequence[int],
    num_kv_blocks: int,
    num_masks: int,
    *,
    head_shards: int,
    q_seq_shards: int,
    is_dkv: bool,
    downcast: bool,
) -> GridArrays:
    """The arrays over the whole grid, one plane per shard of heads if their masks agree, else one per head.

    ``masks`` are the distinct masks, ``mask_of_head`` says which of them each head has.
    """
    num_rows = len(masks[0].row_ptr) - 1
    shard_rows = num_rows // q_seq_shards
    heads_per_shard = len(mask_of_head) // head_shards
    shard_masks = [
        tuple(mask_of_head[shard * heads_per_shard : (shard + 1) * heads_per_shard]) for shard in range(head_shards)
    ]
    if all(len(set(heads)) == 1 for heads in shard_masks):
        shard_masks = [heads[:1] for heads in shard_masks]
    planes = len(shard_masks[0])

    shape = (head_shards * planes, num_rows, num_kv_blocks)
    dtypes = _choose_dtypes(masks, shard_rows, num_masks, is_dkv, downcast and math.prod(shape) > 0)
    data_next = np.zeros(shape, dtypes.data_next)
    mask_next = np.zeros(shape, dtypes.mask_next) if num_masks else None
    block_mask = np.zeros(shape, dtypes.block_mask)
    size = planes * shard_rows * num_kv_blocks
    done: dict[tuple[int, ...], int] = {}
    for shard, heads in enumerate(shard_masks):
        here = slice(shard * planes, (shard + 1) * planes)
        if heads in done:
            there = slice(done[heads] * planes, (done[heads] + 1) * planes)
            for array in (data_next, mask_next, block_mask):
                if array is not None:
                    array[here] = array[there]
            continue
        done[heads] = shard
        for first_row in range(0, num_rows, shard_rows or 1):
            rows = slice(first_row, first_row + shard_rows)
            walk = _walk([masks[head] for head in heads], rows, is_dkv, num_kv_blocks)
            head, q, kv = (coordinate.astype(np.int64) for coordinate in (walk.head, walk.q, walk.kv))
            if is_dkv:
                position = (kv * planes + head) * shard_rows + q
            else:
                position = (head * shard_rows + q) * num_kv_blocks + kv

            def grid(flat: np.ndarray) -> np.ndarray:
                if is_dkv:
                    return np.moveaxis(flat.reshape(num_kv_blocks, planes, shard_rows), 0, 2)
                return flat.reshape(planes, shard_rows, num_kv_blocks)

            data = _next_values(size, position, walk.q if is_dkv else walk.kv, dtypes.data_next)
            data_next[here, rows] = grid(data)
            if mask_next is not None:
                partial = walk.mask >= 0
                mask = _next_values(size, position[partial], walk.mask[partial], dtypes.mask_next)
                mask_next[here, rows] = grid(mask)
            block_mask[here, rows][walk.head, walk.q, walk.kv] = walk.kinds()
    return GridArrays(data_next, mask_next, block_mask)


def _walk(heads: Sequence[BlockLists], rows: slice, is_dkv: bool, num_kv_blocks: int) -> _Walk:
    """The non-empty blocks of the query blocks ``rows`` of these heads' masks, in walking order."""
    parts = []
    for number, blocks in enumerate(heads):
        row_ptr = blocks.row_ptr[rows.start : rows.stop + 1]
        entries = slice(int(row_ptr[0]), int(row_ptr[-1]))
        q = np.repeat(np.arange(len(row_ptr) - 1, dtype=np.int32), np.diff(row_ptr))
        head = np.full(len(q), number, np.int32)
        parts.append(_Walk(head, q, blocks.kv_index[entries], blocks.mask_index[entries]))
    walk = _Walk(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))
    if not is_dkv:
        return walk
    # NumPy sorts 16-bit integers by radix, in linear time; a stable sort keeps (head, q) in order.
    key = walk.kv.astype(np.uint16) if num_kv_blocks <= 1 << 16 else walk.kv
    order = np.argsort(key, kind="stable")
    return _Walk(*(column[order] for column in walk))


def _next_values(size: int, positions: np.ndarray, values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """For each of ``size`` steps the value of the first position at or after it, the first again at the end.

    ``positions (n,)`` ascend, ``values (n,)`` belong to them. Without positions the answer is 0 everywhere.
    """
    if len(positions) == 0:
        return np.zeros(size, dtype)
    ends = np.append(positions, size - 1)
    return np.repeat(np.append(values, values[0]).astype(dtype), np.diff(ends, prepend=-1))


def _choose_dtypes(
    masks: Sequence[BlockLists], shard_rows: int, num_masks: int, is_dkv: bool, downcast: bool
) -> _Dtypes:
    """The smallest of int8, int16 and int32 for each array, decided by its largest value; else int32."""
    if not downcast:
        return _Dtypes(np.dtype(np.int32), np.dtype(np.int32), np.dtype(np.int32))
    if is_dkv:
        largest = max(_largest_row(blocks, shard_rows) for blocks in masks)
    else:
        largest = max(int(blocks.kv_index.max(initial=0)) for blocks in masks)
    return _Dtypes(smallest_dtype(largest), smallest_dtype(num_masks - 1), smallest_dtype(FULL))


def _largest_row(blocks: BlockLists, shard_rows: int) -> int:
    """The largest number of a non-empty query block, counted from the start of its shard."""
    return int((np.flatnonzero(np.diff(blocks.row_ptr)) % shard_rows).max(initial=0))


def smallest_dtype(largest: int) -> np.dtype:
    """The smallest of int8, int16 and int32 that holds ``largest``."""
    for dtype in (np.int8, np.int16):
        if largest <= np.iinfo(dtype).max:
            return np.dtype(dtype)
    return np.dtype(np.int32)
