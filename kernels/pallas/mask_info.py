"""``MaskInfo``: what JAX's Splash attention kernel reads about a mask, computed in bulk.

``process_mask`` and ``process_mask_dkv`` turn the mask objects of
``jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask`` into the same arrays as JAX's own
``splash_attention_mask_info`` does; ``process_dynamic_mask`` and ``process_dynamic_mask_dkv`` do so for a mask
that is a traced array; ``mask_info_from_blocks`` starts from lists of non-empty blocks, so that a mask of a
million positions never exists as such.

How it differs from JAX's own: a mask of n cells is read once, at the speed of memory, and masks that are known
analytically are not read at all; an all-empty mask, and sequence shards of a mask without partial blocks, have an
answer (see ``process_mask``); and arrays are not cached, so changing a mask in place is safe.

A ``MaskInfo`` made here can be given to JAX's ``SplashAttentionKernel`` as it is.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from canvas_engineering._optional import require
from canvas_engineering.errors import CanvasError
from canvas_engineering.kernels.pallas._mask_info_arrays import shrunk_arrays, smallest_dtype, whole_arrays
from canvas_engineering.kernels.pallas._mask_info_blocks import (
    EMPTY,
    FULL,
    PARTIAL,
    BlockLists,
    BlockStore,
    array_kinds,
    list_blocks,
)
from canvas_engineering.kernels.pallas._mask_info_checks import (
    Grid,
    check_grid,
    check_lists,
    describe,
    positive,
)

if TYPE_CHECKING:
    import jax

__all__ = [
    "MaskInfo",
    "mask_info_from_blocks",
    "process_dynamic_mask",
    "process_dynamic_mask_dkv",
    "process_mask",
    "process_mask_dkv",
]


class MaskInfo(NamedTuple):
    """The mask metadata of one pass of the Splash kernel.

    The first three arrays live in the TPU's scalar memory, hence their small integer types: the smallest of int8,
    int16 and int32 that holds the values. They have one plane per shard of heads where the heads of a shard have
    the same mask, else one plane per head.

    With a shrunk grid (``shrink_grid=True`` and one mask for all heads) the arrays hold non-empty blocks only:
    forward ``num_kv_blocks`` becomes the number of blocks in the longest row, for dK/dV ``num_q_blocks`` becomes
    that in the longest column.
    """

    data_next: np.ndarray | jax.Array | None
    """``(planes, num_q_blocks, num_kv_blocks)`` integer: the kv block to fetch next (dK/dV: the q block)."""
    mask_next: np.ndarray | jax.Array | None
    """The same shape: the entry of ``partial_mask_blocks`` to fetch next. None if no block is partial, or if the
    kernel computes the mask."""
    block_mask: np.ndarray | jax.Array | None
    """The same shape: 0 for an empty block, 1 for a partial one, 2 for a full one."""
    partial_mask_blocks: np.ndarray | jax.Array | None
    """``(num_partial_blocks, block_q, block_kv)`` bool, each content once (dK/dV: transposed). A dynamic mask has
    ``(heads, num_q_blocks, num_kv_blocks, block_q, block_kv)``: all of it."""
    q_sequence: np.ndarray | None
    """``(num_q,)`` int32: the position of each query, where the kernel computes the mask from positions."""
    is_dynamic_mask: bool = None  # type: ignore[assignment]  # the default that JAX's class has
    """True where the mask is a traced array; None otherwise."""


def process_mask(
    mask: Any,
    block_shape: tuple[int, int],
    *,
    is_dkv: bool = False,
    downcast_smem_data: bool = True,
    head_shards: int = 1,
    q_seq_shards: int = 1,
    shrink_grid: bool = True,
) -> tuple[MaskInfo, Callable[..., Any] | None]:
    """The block-sparse form of a static mask, for the Splash kernel.

    All heads with one mask, and that mask causal, local or otherwise computable: the kernel computes it by the
    returned function of (query positions, key positions), and ``mask_next`` and ``partial_mask_blocks`` are None.

    A mask (or a sequence shard of one) without any allowed pair keeps one empty block per row in a shrunk grid
    (per column for dK/dV), so that the kernel still has a step in which to write its output.

    Args:
        mask: a ``MultiHeadMask`` of shape ``(heads, num_q, num_kv)``.
        block_shape: ``(block_q, block_kv)``, the block of the kernel's grid.
        is_dkv: make the arrays of the dK/dV pass, which walks the grid by kv blocks.
        downcast_smem_data: use integer types smaller than int32 where the values allow it.
        head_shards: shards of the device mesh along the heads.
        q_seq_shards: shards of the device mesh along the queries.
        shrink_grid: squeeze empty blocks out, which is possible where all heads have one mask.

    Returns:
        The ``MaskInfo``, and the mask's function if the kernel can compute the mask, else None. Equal masks get
        the same function, so that a kernel built anew for each layer is compiled once.

    Raises:
        CanvasError: (a ``ValueError``) ``mask`` is not of three dimensions or has no ``masks``; blocks or shards
            do not divide it; a mask that has one of ``q_sequence`` and ``mask_function`` but not the other.
    """
    masks = getattr(mask, "masks", None)
    if masks is None:
        raise CanvasError(
            f"mask must be a MultiHeadMask of shape (heads, num_q, num_kv), got {describe(mask)}; "
            "process_dynamic_mask takes arrays"
        )
    grid = check_grid(mask.shape, block_shape, head_shards, q_seq_shards)
    distinct, mask_of_head = _distinct_masks(masks)
    q_sequence, mask_function = None, None
    if len(distinct) == 1:
        q_sequence, mask_function = _computable(distinct[0])
    store = BlockStore(grid.block_q, grid.block_kv) if mask_function is None else None
    lists = [list_blocks(one, grid.block_q, grid.block_kv, store) for one in distinct]
    info = _lower(grid, lists, mask_of_head, store, is_dkv=is_dkv, downcast=downcast_smem_data, shrink=shrink_grid)
    return info._replace(q_sequence=q_sequence), mask_function


def process_mask_dkv(
    mask: Any,
    block_shape: tuple[int, int],
    *,
    is_dkv: bool = True,
    downcast_smem_data: bool = True,
    head_shards: int = 1,
    q_seq_shards: int = 1,
    shrink_grid: bool = True,
) -> tuple[MaskInfo, Callable[..., Any] | None]:
    """``process_mask`` for the dK/dV pass; the same arguments, results and errors."""
    return process_mask(
        mask,
        block_shape,
        is_dkv=is_dkv,
        downcast_smem_data=downcast_smem_data,
        head_shards=head_shards,
        q_seq_shards=q_seq_shards,
        shrink_grid=shrink_grid,
    )


def process_dynamic_mask(
    mask: jax.Array,
    block_shape: tuple[int, int],
    *,
    is_dkv: bool = False,
    downcast_smem_data: bool = True,
    head_shards: int = 1,
    q_seq_shards: int = 1,
    shrink_grid: bool = True,
) -> tuple[MaskInfo, None]:
    """The block-sparse form of a mask that is an array, possibly a traced one.

    How many blocks are partial is not known while tracing, so ``partial_mask_blocks`` holds all blocks; empty
    blocks are still marked, and skipped by the kernel.

    Args:
        mask: ``(heads, num_q, num_kv)`` bool.
        block_shape: ``(block_q, block_kv)``, the block of the kernel's grid.
        is_dkv: make the arrays of the dK/dV pass.
        downcast_smem_data: use integer types smaller than int32 where the number of blocks allows it.
        head_shards: shards of the device mesh along the heads.
        q_seq_shards: shards of the device mesh along the queries.
        shrink_grid: without effect, because the shape of the result cannot depend on the mask's values.

    Returns:
        The ``MaskInfo`` and None.

    Raises:
        CanvasError: (a ``ValueError``) ``mask`` is not a bool array of three dimensions; blocks or shards do not
            divide it.
        MissingDependencyError: JAX is not installed.
    """
    jnp = require("jax.numpy", "jax", "process_dynamic_mask")
    if getattr(mask, "dtype", None) != np.bool_:
        raise CanvasError(f"mask must be an array of bool, got {describe(mask)}")
    grid = check_grid(mask.shape, block_shape, head_shards, q_seq_shards)
    heads, rows, columns = grid.num_heads, grid.num_q_blocks, grid.num_kv_blocks
    shard_heads, shard_rows = heads // grid.head_shards, rows // grid.q_seq_shards

    tiles = mask.reshape(heads, rows, grid.block_q, columns, grid.block_kv)
    block_mask = jnp.any(tiles, axis=(2, 4)).astype(np.int32) + jnp.all(tiles, axis=(2, 4)).astype(np.int32)

    # Every block is its own successor; the numbers count from the start of the shard.
    head, row, column = np.ogrid[:heads, :rows, :columns]
    head, row = head % max(1, shard_heads), row % max(1, shard_rows)
    number = ((head * shard_rows + row) * columns + column).astype(np.int32)
    fetched = np.broadcast_to((row if is_dkv else column).astype(np.int32), number.shape)
    data_next = jnp.where(block_mask == EMPTY, np.int32(0), jnp.asarray(fetched))
    mask_next = jnp.where(block_mask == PARTIAL, jnp.asarray(number), np.int32(0))

    if downcast_smem_data:
        block_mask = block_mask.astype(np.int8)
        if number.size:
            data_next = data_next.astype(smallest_dtype(shard_rows if is_dkv else columns))
            mask_next = mask_next.astype(smallest_dtype(shard_heads * shard_rows * columns))
    return (
        MaskInfo(
            data_next=data_next,
            mask_next=mask_next,
            block_mask=block_mask,
            partial_mask_blocks=tiles.transpose((0, 1, 3, 4, 2) if is_dkv else (0, 1, 3, 2, 4)),
            q_sequence=None,
            is_dynamic_mask=True,
        ),
        None,
    )


def process_dynamic_mask_dkv(
    mask: jax.Array,
    block_shape: tuple[int, int],
    *,
    is_dkv: bool = True,
    downcast_smem_data: bool = True,
    head_shards: int = 1,
    q_seq_shards: int = 1,
    shrink_grid: bool = True,
) -> tuple[MaskInfo, None]:
    """``process_dynamic_mask`` for the dK/dV pass; the same arguments, results and errors."""
    return process_dynamic_mask(
        mask,
        block_shape,
        is_dkv=is_dkv,
        downcast_smem_data=downcast_smem_data,
        head_shards=head_shards,
        q_seq_shards=q_seq_shards,
        shrink_grid=shrink_grid,
    )


def mask_info_from_blocks(
    num_q_blocks: int,
    num_kv_blocks: int,
    block_q: int,
    block_kv: int,
    row_ptr: np.ndarray,
    kv_index: np.ndarray,
    mask_index: np.ndarray,
    partial_mask_blocks: np.ndarray | None,
    *,
    head_shards: int = 1,
    q_seq_shards: int = 1,
    shrink_grid: bool = True,
    is_dkv: bool = False,
    downcast_smem_data: bool = True,
) -> MaskInfo:
    """The ``MaskInfo`` that ``process_mask`` returns for a mask given by its non-empty blocks, equal for all heads.

    Row ``i`` of blocks has the entries ``row_ptr[i]:row_ptr[i + 1]``: a kv block each, and the number of its mask
    in ``partial_mask_blocks`` or -1 for a full block. Time and memory follow the entries and the shrunk grid
    (rows times the longest row); nothing of the size ``num_q_blocks * num_kv_blocks`` is made, unless
    ``shrink_grid=False`` asks for it.

    Masks may repeat, be unused, or hold no or only True cells: they are merged, dropped or replaced as
    ``process_mask`` would have seen them.

    Args:
        num_q_blocks: rows of blocks.
        num_kv_blocks: columns of blocks.
        block_q: queries per block.
        block_kv: keys per block.
        row_ptr: ``(num_q_blocks + 1,)`` integer, from 0 to the number of entries.
        kv_index: ``(num_entries,)`` integer, strictly ascending within a row.
        mask_index: ``(num_entries,)`` integer.
        partial_mask_blocks: ``(num_masks, block_q, block_kv)`` bool, or None if all blocks are full.
        head_shards: shards of the device mesh along the heads.
        q_seq_shards: shards of the device mesh along the queries; it divides ``num_q_blocks``.
        shrink_grid: squeeze empty blocks out.
        is_dkv: make the arrays of the dK/dV pass.
        downcast_smem_data: use integer types smaller than int32 where the values allow it.

    Raises:
        CanvasError: (a ``ValueError``) sizes that are not positive, shards that do not divide, arrays of the
            wrong shape or type, numbers out of range or out of order.
    """
    row_ptr, kv_index, mask_index = (np.asarray(array) for array in (row_ptr, kv_index, mask_index))
    rows, columns = positive("num_q_blocks", num_q_blocks), positive("num_kv_blocks", num_kv_blocks)
    block = (positive("block_q", block_q), positive("block_kv", block_kv))
    shards = positive("head_shards", head_shards)
    grid = check_grid((shards, rows * block[0], columns * block[1]), block, shards, q_seq_shards)
    if partial_mask_blocks is None:
        partial_mask_blocks = np.zeros((0, *block), np.bool_)
    if partial_mask_blocks.dtype != np.bool_ or partial_mask_blocks.shape[1:] != block:
        raise CanvasError(
            f"partial_mask_blocks must be a bool array of shape (num_masks, {block[0]}, {block[1]}), "
            f"got {describe(partial_mask_blocks)}"
        )
    check_lists(row_ptr, kv_index, mask_index, rows, columns, len(partial_mask_blocks))
    store = BlockStore(*block)
    lists = _normalise(row_ptr, kv_index, mask_index, partial_mask_blocks, store)
    return _lower(grid, [lists], [0] * shards, store, is_dkv=is_dkv, downcast=downcast_smem_data, shrink=shrink_grid)


def _lower(
    grid: Grid,
    lists: Sequence[BlockLists],
    mask_of_head: Sequence[int],
    store: BlockStore | None,
    *,
    is_dkv: bool,
    downcast: bool,
    shrink: bool,
) -> MaskInfo:
    """The arrays for the distinct masks ``lists``; no mask blocks where there is no ``store``."""
    num_masks = 0 if store is None else len(store)
    if shrink and len(lists) == 1:
        arrays = shrunk_arrays(
            lists[0],
            grid.num_kv_blocks,
            num_masks,
            head_shards=grid.head_shards,
            q_seq_shards=grid.q_seq_shards,
            is_dkv=is_dkv,
            downcast=downcast,
        )
    else:
        arrays = whole_arrays(
            lists,
            mask_of_head,
            grid.num_kv_blocks,
            num_masks,
            head_shards=grid.head_shards,
            q_seq_shards=grid.q_seq_shards,
            is_dkv=is_dkv,
            downcast=downcast,
        )
    partial = None if store is None else store.stack()
    if partial is not None and is_dkv:
        partial = partial.swapaxes(1, 2)
    return MaskInfo(
        data_next=arrays.data_next,
        mask_next=arrays.mask_next,
        block_mask=arrays.block_mask,
        partial_mask_blocks=partial,
        q_sequence=None,
    )


def _distinct_masks(masks: Iterable[Any]) -> tuple[list[Any], list[int]]:
    """The different masks in order of first use, and for each head the number of its mask."""
    distinct: list[Any] = []
    mask_of_head = []
    by_identity: dict[int, int] = {}
    by_value: dict[Any, int] = {}
    for mask in masks:
        number = by_identity.get(id(mask))
        if number is None:
            number = len(distinct)
            # The hash of a mask reads all of it: only pay for it where there is something to compare with.
            if number:
                try:
                    if not by_value:
                        by_value[distinct[0]] = 0
                    number = by_value.setdefault(mask, number)
                except (TypeError, NotImplementedError):  # a class of the user's that cannot be hashed or compared
                    number = len(distinct)
            if number == len(distinct):
                distinct.append(mask)
            by_identity[id(mask)] = number
        mask_of_head.append(number)
    return distinct, mask_of_head


def _computable(mask: Any) -> tuple[np.ndarray | None, Callable[..., Any] | None]:
    """The mask's ``q_sequence`` and ``mask_function``, or two Nones for a mask that has to be stored."""
    q_sequence, mask_function = getattr(mask, "q_sequence", None), getattr(mask, "mask_function", None)
    if (q_sequence is None) != (mask_function is None):
        raise CanvasError(
            "a mask must have both q_sequence and mask_function or neither, "
            f"got {type(mask).__name__} with only {'q_sequence' if mask_function is None else 'mask_function'}"
        )
    if mask_function is None:
        return None, None
    try:
        return q_sequence, _shared_function(mask)
    except (TypeError, NotImplementedError):  # a class of the user's that cannot be hashed or compared
        return q_sequence, mask_function


@functools.lru_cache(maxsize=32)
def _shared_function(mask: Any) -> Callable[..., Any]:
    """The function of the first mask seen that equals this one: jit tells functions apart by identity."""
    function: Callable[..., Any] = mask.mask_function
    return function


def _normalise(
    row_ptr: np.ndarray,
    kv_index: np.ndarray,
    mask_index: np.ndarray,
    partial_mask_blocks: np.ndarray,
    store: BlockStore,
) -> BlockLists:
    """The lists as reading the mask would have made them; ``store`` gets the masks in order of first use."""
    block_q, block_kv = partial_mask_blocks.shape[1:]
    kinds = np.zeros(0, np.int8)
    if len(partial_mask_blocks):
        kinds = array_kinds(partial_mask_blocks.reshape(-1, block_kv), block_q, block_kv)[:, 0]
    row_ptr, mask_index = row_ptr.astype(np.int64), mask_index.astype(np.int32)
    # One more kind at the end, where -1 finds it: full.
    entry_kind = np.append(kinds, np.int8(FULL))[mask_index]
    numbers, first_use = np.unique(mask_index[entry_kind == PARTIAL], return_index=True)
    in_order = numbers[np.argsort(first_use)]
    renumber = np.full(len(kinds) + 1, -1, np.int32)
    if len(in_order):
        renumber[in_order] = store.add(partial_mask_blocks[in_order])
    mask_index = renumber[mask_index]
    kept = entry_kind != EMPTY
    if not kept.all():
        row_ptr = np.concatenate([np.zeros(1, np.int64), np.cumsum(kept)])[row_ptr]
        kv_index, mask_index = kv_index[kept], mask_index[kept]
    return BlockLists(row_ptr, kv_index.astype(np.int32, copy=False), mask_index)
