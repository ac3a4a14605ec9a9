"""Checks of what the functions of ``mask_info`` are given; every message names requirement and value."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from canvas_engineering.errors import CanvasError


class Grid(NamedTuple):
    """A checked division of a mask ``(heads, q, kv)`` into blocks and shards."""

    num_heads: int
    num_q_blocks: int
    num_kv_blocks: int
    block_q: int
    block_kv: int
    head_shards: int
    q_seq_shards: int


def check_grid(shape: Sequence[int], block_shape: Sequence[int], head_shards: int, q_seq_shards: int) -> Grid:
    if len(shape) != 3:
        raise CanvasError(f"mask must have three dimensions (heads, num_q, num_kv), got shape {tuple(shape)}")
    if len(block_shape) != 2:
        raise CanvasError(f"block_shape must be (block_q, block_kv), got {tuple(block_shape)}")
    num_heads, num_q, num_kv = (operator.index(size) for size in shape)
    block_q = positive("block_shape[0]", block_shape[0])
    block_kv = positive("block_shape[1]", block_shape[1])
    head_shards = positive("head_shards", head_shards)
    q_seq_shards = positive("q_seq_shards", q_seq_shards)
    _check_divides("block_q", block_q, "num_q", num_q)
    _check_divides("block_kv", block_kv, "num_kv", num_kv)
    _check_divides("head_shards", head_shards, "the number of heads", num_heads)
    _check_divides("q_seq_shards", q_seq_shards, "the number of query blocks (num_q / block_q)", num_q // block_q)
    return Grid(num_heads, num_q // block_q, num_kv // block_kv, block_q, block_kv, head_shards, q_seq_shards)


def _check_divides(name: str, divisor: int, what: str, number: int) -> None:
    if number % divisor:
        raise CanvasError(f"{name} must divide {what}, got {divisor} and {number}")


def positive(name: str, value: Any) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        number = 0
    if number < 1:
        raise CanvasError(f"{name} must be a positive integer, got {value!r}")
    return number


def check_lists(
    row_ptr: np.ndarray,
    kv_index: np.ndarray,
    mask_index: np.ndarray,
    num_q_blocks: int,
    num_kv_blocks: int,
    num_masks: int,
) -> None:
    """Every number that is used as an index later on is in range, and every row is in order."""
    for name, array, length in (
        ("row_ptr", row_ptr, num_q_blocks + 1),
        ("kv_index", kv_index, len(kv_index)),
        ("mask_index", mask_index, len(kv_index)),
    ):
        if array.dtype.kind not in "iu" or array.shape != (length,):
            raise CanvasError(f"{name} must be an integer array of shape ({length},), got {describe(array)}")
    steps = np.diff(row_ptr.astype(np.int64, copy=False))
    if row_ptr[0] != 0 or row_ptr[-1] != len(kv_index) or (steps < 0).any():
        raise CanvasError(
            f"row_ptr must ascend from 0 to the number of entries, {len(kv_index)}, "
            f"got {row_ptr[0]} to {row_ptr[-1]}, smallest step {steps.min()}"
        )
    for name, array, low, high in (
        ("kv_index", kv_index, 0, num_kv_blocks - 1),
        ("mask_index", mask_index, -1, num_masks - 1),
    ):
        if len(array) and not (low <= array.min() and array.max() <= high):
            raise CanvasError(f"{name} must lie in {low}..{high}, got values from {array.min()} to {array.max()}")
    ascending = np.diff(kv_index.astype(np.int64, copy=False)) > 0
    row_ends = row_ptr[1:-1]
    ascending[row_ends[(row_ends > 0) & (row_ends < len(kv_index))] - 1] = True
    if not ascending.all():
        entry = int(np.argmin(ascending)) + 1
        row = int(np.searchsorted(row_ptr, entry, side="right")) - 1
        raise CanvasError(
            "kv_index must strictly ascend within each row of blocks, "
            f"got {kv_index[entry - 1]} before {kv_index[entry]} in row {row}"
        )


def describe(value: Any) -> str:
    """Type, and shape and dtype where there are any, for error messages."""
    shape, dtype = getattr(value, "shape", None), getattr(value, "dtype", None)
    parts = [type(value).__name__]
    if shape is not None:
        parts.append(f"of shape {tuple(shape)}")
    if dtype is not None:
        parts.append(f"and dtype {dtype}")
    return " ".join(parts)
