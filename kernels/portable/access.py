"""How the problems of a plan lie in the operands: as slices where possible, else by index.

Operands are used in the order in which the caller numbers the tokens, unless permuting them once into plan
order and cutting slices there moves fewer rows. Batches over the same rows (one per softmax set of these rows)
are joined, so that q is read and the output written once for all of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from canvas_engineering.kernels.portable.rectangles import Batch, lower_to_batches
from canvas_engineering.plan import BlockSparsePlan

Int64 = NDArray[np.int64]


@dataclass(frozen=True)
class Access:
    """Places ``(G, L)`` of the rows, or of the keys, of the ``G`` problems of one batch.

    Attributes:
        index: ``(G, L)``, places in the operand.
        run: ``(start, step)`` where ``index[g, i] == start + g * step + i`` and problems do not overlap, else None.
        assign: Nothing before has any of these places and no place is met twice, so that results can be written
            instead of added.
    """

    index: Int64
    run: tuple[int, int] | None
    assign: bool


@dataclass(frozen=True)
class Read:
    """One softmax set of the rows of some problems: their keys, mask and weights.

    ``batch`` holds the tokens as the plan numbers them.
    """

    batch: Batch
    keys: Access
    weight: NDArray[np.float32] | None  # (G, R) the plan's row weights, None where all are 1


@dataclass(frozen=True)
class Problems:
    """``G`` problems of ``R`` rows, each read once or several times; the output is the weighted sum."""

    rows: Access
    reads: tuple[Read, ...]


@dataclass(frozen=True)
class Lowering:
    """All batches of a plan.

    Attributes:
        q_order, kv_order: The permutations that the operands go through first, or None for none.
        assigns_all_rows: Every query token is written by problems that assign: the output need not start at 0.
    """

    problems: tuple[Problems, ...]
    q_order: Int64 | None
    kv_order: Int64 | None
    assigns_all_rows: bool


def lower(plan: BlockSparsePlan) -> Lowering:
    """The lowering that moves the fewest rows; computed once per plan and shared by the frameworks."""
    return plan.lowered("portable", _lower)


def _lower(plan: BlockSparsePlan) -> Lowering:
    batches = lower_to_batches(plan)
    canvas = _lowering(plan, batches, None, None)
    cost = _rows_moved(canvas)
    if cost <= 2 * (plan.num_q + plan.num_kv):
        return canvas
    ordered = _lowering(plan, batches, plan.q_order.astype(np.int64), plan.kv_order.astype(np.int64))
    return ordered if _rows_moved(ordered) < cost else canvas


def _rows_moved(lowering: Lowering) -> int:
    """Rows of q, k, v and the output that are copied before and after the attention itself."""
    moved = 0
    if lowering.q_order is not None and lowering.kv_order is not None:
        moved += 2 * (lowering.q_order.size + lowering.kv_order.size)
    for one in lowering.problems:
        for access in (one.rows, *(read.keys for read in one.reads)):
            moved += 2 * access.index.size if access.run is None else 0
    return moved


def _lowering(plan: BlockSparsePlan, batches: list[Batch], q_order: Int64 | None, kv_order: Int64 | None) -> Lowering:
    place_q, place_kv = _inverse(q_order, plan.num_q), _inverse(kv_order, plan.num_kv)
    written = np.zeros(plan.num_q, np.bool_)
    read = np.zeros(plan.num_kv, np.bool_)
    row_weight = plan.row_weight.ravel()
    by_rows: dict[tuple[tuple[int, ...], bytes], list[Batch]] = {}
    for batch in batches:
        for layer in _layers(batch if batch.masks is not None else _sorted_by_place(batch, place_q, place_kv)):
            by_rows.setdefault((layer.rows.shape, layer.rows.tobytes()), []).append(layer)
    problems = []
    assigned = 0
    for same_rows in by_rows.values():
        reads = []
        for batch in same_rows:
            weight = row_weight[batch.slots]
            keys = _access(place_kv[batch.keys], read)
            reads.append(Read(batch, keys, None if (weight == 1).all() else weight))
        rows = _access(place_q[same_rows[0].rows], written)
        assigned += rows.index.size if rows.assign else 0
        problems.append(Problems(rows, tuple(reads)))
    return Lowering(tuple(problems), q_order, kv_order, assigned == plan.num_q)


def _inverse(order: Int64 | None, count: int) -> Int64:
    place = np.arange(count, dtype=np.int64)
    if order is not None:
        place[order] = np.arange(count)
    return place


def _sorted_by_place(batch: Batch, place_q: Int64, place_kv: Int64) -> Batch:
    """Rows and keys of each rectangle in the order of their places, and rectangles by their first row."""
    by_row = np.argsort(place_q[batch.rows], axis=1, kind="stable")
    rows = np.take_along_axis(batch.rows, by_row, axis=1)
    by_key = np.argsort(place_kv[batch.keys], axis=1, kind="stable")
    first = np.argsort(place_q[rows[:, 0]], kind="stable")
    return replace(
        batch,
        rows=rows[first],
        slots=np.take_along_axis(batch.slots, by_row, axis=1)[first],
        keys=np.take_along_axis(batch.keys, by_key, axis=1)[first],
    )


def _layers(batch: Batch) -> Iterator[Batch]:
    """A batch whose problems meet rows more than once, as batches that meet them once (where rows are identical)."""
    first = batch.rows[:, 0]
    if np.unique(first).size == first.size:
        yield batch
        return
    by_first = np.argsort(first, kind="stable")
    ordered = first[by_first]
    begin = np.maximum.accumulate(np.where(np.diff(ordered, prepend=-1) != 0, np.arange(first.size), 0))
    layer = np.empty(first.size, np.int64)
    layer[by_first] = np.arange(first.size) - begin
    for number in range(int(layer.max()) + 1):
        chosen = layer == number
        index = None if batch.mask_index is None else batch.mask_index[chosen]
        yield Batch(batch.rows[chosen], batch.slots[chosen], batch.keys[chosen], index, batch.masks)


def _access(index: Int64, used: NDArray[np.bool_]) -> Access:
    """Find slices in ``(G, L)`` places, and mark them in ``used``."""
    here = np.zeros_like(used)
    here[index] = True
    distinct = np.count_nonzero(here) == index.size
    assign = distinct and not (used & here).any()
    used |= here
    return Access(index, _run(index) if distinct else None, assign)


def _run(index: Int64) -> tuple[int, int] | None:
    """``(start, step)`` of problems that are equally spaced slices in ascending order."""
    count, length = index.shape
    start = int(index[0, 0])
    step = int(index[1, 0]) - start if count > 1 else length
    expected = start + step * np.arange(count)[:, None] + np.arange(length)
    return (start, step) if step >= length and np.array_equal(index, expected) else None
