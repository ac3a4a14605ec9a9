"""Bit-packed tile masks: eight keys to a byte, key ``j`` of a row in bit ``j % 8`` of byte ``j // 8``."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def pack_masks(masks: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """``(..., block_kv)`` bool to ``(..., block_kv // 8)`` uint8; ``block_kv`` is a multiple of 8."""
    return np.packbits(masks, axis=-1, bitorder="little")


def unpack_masks(packed: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """The inverse of :func:`pack_masks`: ``(..., bytes)`` uint8 to ``(..., 8 * bytes)`` bool."""
    return np.unpackbits(packed, axis=-1, bitorder="little").view(np.bool_)


def unique_rows(rows: NDArray[np.generic]) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """First index and inverse of the distinct rows of a 2-D array, compared as bytes.

    Sorting opaque byte strings is several times faster than ``np.unique(axis=0)``, which sorts structured
    records field by field. The distinct rows come in order of first appearance, so that the result does not
    depend on the byte order of the machine.
    """
    if rows.shape[0] == 0:
        return np.zeros(0, np.intp), np.zeros(0, np.intp)
    if rows.shape[1] == 0:
        return np.zeros(1, np.intp), np.zeros(rows.shape[0], np.intp)
    contiguous = np.ascontiguousarray(rows)
    opaque = contiguous.view(np.dtype((np.void, contiguous.dtype.itemsize * contiguous.shape[1]))).ravel()
    _, first, inverse = np.unique(opaque, return_index=True, return_inverse=True)
    rank = np.argsort(first, kind="stable")
    place = np.empty_like(rank)
    place[rank] = np.arange(rank.size)
    return first[rank], place[inverse]
