"""The dense (N, N) form of a topology, for ``CanvasTopology.to_attention_mask`` and ``to_additive_mask``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from canvas_engineering.groups import BoxPattern, Group, PairPattern, resolve_groups

if TYPE_CHECKING:
    from canvas_engineering.canvas import CanvasLayout
    from canvas_engineering.connectivity import CanvasTopology

_CELLS_PER_STEP = 1 << 20  # a few MiB of temporaries beside the mask itself


def weight_matrix(topology: CanvasTopology, layout: CanvasLayout) -> np.ndarray:
    """``(N, N)`` float32: the largest weight of the groups in which row i may read column j, 0 for none."""
    size = layout.num_positions
    mask = np.zeros((size, size), dtype=np.float32)
    for group in resolve_groups(topology, layout):
        if group.weight > 0:
            _raise_to_weight(mask, group)
    return mask


def to_additive(mask: np.ndarray) -> np.ndarray:
    """Turn a weight matrix, in place, into 0 where the weight is positive and -inf elsewhere.

    Rows without a positive weight get their diagonal.
    """
    step = _rows_per_step(len(mask))
    for start in range(0, len(mask), step):
        block = mask[start : start + step]
        allowed = block > 0
        idle = np.flatnonzero(~allowed.any(axis=1))
        allowed[idle, start + idle] = True
        block[...] = np.where(allowed, np.float32(0.0), np.float32(-np.inf))
    return mask


def _raise_to_weight(mask: np.ndarray, group: Group) -> None:
    """Raise the cells that a group may read to its weight."""
    pattern = group.pattern
    weight = np.float32(group.weight)
    if isinstance(pattern, PairPattern):
        for start in range(0, len(pattern.row), _CELLS_PER_STEP):
            part = slice(start, start + _CELLS_PER_STEP)
            pairs = (group.rows[pattern.row[part]], group.cols[pattern.col[part]])
            mask[pairs] = np.maximum(mask[pairs], weight)
        return
    step = _rows_per_step(len(group.cols))
    for start in range(0, len(group.rows), step):
        part = slice(start, start + step)
        if pattern is None:
            cells = np.ix_(group.rows[part], group.cols)
            mask[cells] = np.maximum(mask[cells], weight)
        else:
            # Neighbouring rows read neighbouring keys: only columns that one of them reads are looked at.
            lo, hi = pattern.lo[part], pattern.hi[part]
            in_reach = (lo.min(axis=0) <= pattern.coords) & (pattern.coords < hi.max(axis=0))
            near = np.flatnonzero(in_reach.all(axis=1))
            allowed = BoxPattern(lo, hi, pattern.coords[near]).dense()
            cells = np.ix_(group.rows[part], group.cols[near])
            mask[cells] = np.maximum(mask[cells], np.where(allowed, weight, np.float32(0.0)))


def _rows_per_step(row_length: int) -> int:
    return max(1, _CELLS_PER_STEP // max(1, row_length))
