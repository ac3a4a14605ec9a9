"""How the problems of a batch lie in the operands: as a slice where possible, else by index.

Operands are used in the order in which the caller numbers the tokens, unless permuting them once into plan
order and cutting slices there moves fewer rows.
"""

from __future__ import annotations

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
        assign: No earlier batch and no other problem has any of these places, so results can be written
            instead of added.
    """

    index: Int64
    run: tuple[int, int] | None
    assign: bool


@dataclass(frozen=True)
class Problems:
    """One batch with the places of its operands; ``batch`` holds the tokens as the plan numbers them."""

    batch: Batch
    rows: Access
    keys: Access
    weight: NDArray[np.float32] | None  # (G, R) the plan's row weights, None where all are 1


@dataclass(frozen=True)
class Lowering:
    """All batches of a plan.

    Attributes:
        q_order, kv_order: The permutations that the operands go through first, or None for none.
        assigns_all_rows: Every query token is written by a batch that assigns: the output need not start at 0.
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
        moved += 2 * sum(access.index.size for access in (one.rows, one.keys) if access.run is None)
    return moved


def _lowering(plan: BlockSparsePlan, batches: list[Batch], q_order: Int64 | None, kv_order: Int64 | None) -> Lowering:
    place_q, place_kv = _inverse(q_order, plan.num_q), _inverse(kv_order, plan.num_kv)
    written = np.zeros(plan.num_q, np.bool_)
    read = np.zeros(plan.num_kv, np.bool_)
    assigned = 0
    row_weight = plan.row_weight.ravel()
    problems = []
    for batch in batches:
        if batch.masks is None:
            batch = _sorted_by_place(batch, place_q, place_kv)
        weight = row_weight[batch.slots]
        problems.append(
            Problems(
                batch,
                _access(place_q[batch.rows], written),
                _access(place_kv[batch.keys], read),
                None if (weight == 1).all() else weight,
            )
        )
        assigned += batch.rows.size if problems[-1].rows.assign else 0
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


def _access(index: Int64, used: NDArray[np.bool_]) -> Access:
    """Find slices in ``(G, L)`` places, and mark them in ``used``."""
    distinct = np.unique(index).size == index.size
    assign = distinct and not used[index].any()
    used[index] = True
    return Access(index, _run(index) if distinct else None, assign)


def _run(index: Int64) -> tuple[int, int] | None:
    """``(start, step)`` of problems that are equally spaced slices in ascending order."""
    count, length = index.shape
    start = int(index[0, 0])
    step = int(index[1, 0]) - start if count > 1 else length
    expected = start + step * np.arange(count)[:, None] + np.arange(length)
    return (start, step) if step >= length and np.array_equal(index, expected) else None
