"""Row weights as a pytree: which connections are active, as data that a compiled function can take."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array
from numpy.typing import NDArray

from canvas_engineering.errors import CanvasError
from canvas_engineering.routing.schedule import Schedule
from canvas_engineering.routing.weights import row_weights as schedule_weights


class RowWeights(NamedTuple):
    """What each row takes from each of its connections, for one set of active connections.

    ``AttentionDispatcher.row_weights`` makes it on the host, with NumPy arrays; structure and shapes are the
    same for every set, so passing another one to a compiled function does not compile it again.

    Attributes:
        plans: for each kernel call, ``(num_sets, block_q)`` float32.
        direct: for each batch of groups that runs without a plan, ``(G, n)`` float32.
        bias: by function, ``(N,)`` float32, the share of the output projection's bias in each row.
        gate_bias: by function with gating connections, ``(gates, N)`` float32, the same for each of them.
        written: ``(N,)`` bool, rows that something writes; the others pass through.
        active: ``(edges,)`` bool.
    """

    plans: tuple[Any, ...]
    direct: tuple[Any, ...]
    bias: dict[str, Any]
    gate_bias: dict[str, Any]
    written: Any
    active: Any


def gate_edges(schedule: Schedule) -> dict[str, list[int]]:
    """By function, the gating edges that run through its plans, ascending."""
    found: dict[str, set[int]] = {}
    for group in schedule.planned:
        edge = schedule.edges[group.connection]
        if edge.write_mode == "gate":
            found.setdefault(edge.fn, set()).add(group.connection)
    return {fn: sorted(mine) for fn, mine in found.items()}


def compute_row_weights(schedule: Schedule, active: tuple[bool, ...]) -> RowWeights:
    """The weights under the given active edges; read-only NumPy arrays."""
    found = schedule_weights(schedule, active)
    nothing = np.zeros(schedule.num_tokens, np.float32)
    result = RowWeights(
        plans=tuple(found.plans),
        direct=tuple(found.direct),
        bias=found.bias,
        gate_bias={
            fn: np.stack([found.gate_bias[fn].get(i, nothing) for i in mine])
            for fn, mine in gate_edges(schedule).items()
        },
        written=found.written,
        active=np.array(active, np.bool_),
    )
    for array in (*result.plans, *result.direct, *result.bias.values(), *result.gate_bias.values()):
        array.flags.writeable = False
    return result


@dataclass(frozen=True, eq=False)
class ActiveWork:
    """What of a schedule runs, and with what weights.

    Attributes:
        plan_runs, direct_runs: Which calls run at all.
        plan_weight: One array per kernel call; None where the plan's own weights are right.
        direct_weight: One ``(G, n)`` array per direct call.
        bias: By function, ``(N,)``; None where it is 1 in every row.
        gate_bias: By function, ``(gates, N)``; absent where no gate is active.
        gates: Whether learned gates enter the weights.
        written: ``(N,)`` bool; None when every row is written.
        active: By edge, a bool or a traced scalar.
    """

    plan_runs: tuple[bool, ...]
    plan_weight: tuple[Any, ...]
    direct_runs: tuple[bool, ...]
    direct_weight: tuple[Any, ...]
    bias: dict[str, Any]
    gate_bias: dict[str, Any]
    gates: bool
    written: Any
    active: Any


def work_of_known(schedule: Schedule, weights: RowWeights, active: tuple[bool, ...]) -> ActiveWork:
    """The work under active edges that are known now: what has no part in the result is left out."""
    gates = any(on and edge.write_mode == "gate" for on, edge in zip(active, schedule.edges, strict=True))
    return ActiveWork(
        plan_runs=tuple(bool(w.any()) for w in weights.plans),
        plan_weight=tuple(
            None if not gates and np.array_equal(w, call.plan.row_weight) else w
            for w, call in zip(weights.plans, schedule.plan_calls, strict=True)
        ),
        direct_runs=tuple(any(active[i] for i in call.edge) for call in schedule.direct_calls),
        direct_weight=weights.direct,
        bias={
            fn: None if not gates and _is_one(w, _rows_of(schedule, fn) & weights.written) else w
            for fn, w in weights.bias.items()
        },
        gate_bias={
            fn: weights.gate_bias[fn] for fn, mine in gate_edges(schedule).items() if any(active[i] for i in mine)
        },
        gates=gates,
        written=None if weights.written.all() else weights.written,
        active=active,
    )


def work_of_traced(schedule: Schedule, weights: RowWeights) -> ActiveWork:
    """The work under weights that may be traced: everything runs."""
    wanted = [call.plan.row_weight.shape for call in schedule.plan_calls]
    found = [tuple(w.shape) for w in weights.plans]
    edges = (len(schedule.edges),)
    if found != wanted or tuple(weights.active.shape) != edges:
        raise CanvasError(
            "weights must come from row_weights of the same dispatcher: plans of shapes "
            f"{wanted} and {edges[0]} edges, got {found} and {tuple(weights.active.shape)}"
        )
    gating = any(edge.write_mode == "gate" for edge in schedule.edges)
    return ActiveWork(
        plan_runs=(True,) * len(weights.plans),
        plan_weight=weights.plans,
        direct_runs=(True,) * len(weights.direct),
        direct_weight=weights.direct,
        bias=weights.bias,
        gate_bias=weights.gate_bias,
        gates=gating,
        written=weights.written,
        active=jnp.asarray(weights.active),
    )


def _rows_of(schedule: Schedule, fn: str) -> NDArray[np.bool_]:
    """``(N,)`` bool: rows that the kernel calls of a function give."""
    mine = np.zeros(schedule.num_tokens, np.bool_)
    for call in schedule.plan_calls:
        if call.fn == fn and schedule.order is not None:
            mine[schedule.order if call.rows is None else schedule.order[call.rows]] = True
    return mine


def _is_one(weight: NDArray[np.float32], rows: NDArray[np.bool_]) -> bool:
    """Up to the rounding of the shares that it is a sum of."""
    return bool(np.abs(weight[rows] - 1.0).max(initial=0.0) < 1e-6)


class Gates:
    """Where learned gates enter a weight array: ``weight * table[index]``, table = [gates..., 1]."""

    def __init__(self, edges: list[int], index: NDArray[np.int32]) -> None:
        self.edges = edges
        self.index = index

    @classmethod
    def of(cls, edge: NDArray[np.integer], gating: list[int]) -> Gates | None:
        """The gates of an array of edge indices, None where there are none."""
        mine = [i for i in gating if (edge == i).any()]
        if not mine:
            return None
        index = np.full(edge.shape, len(mine), np.int32)
        for place, i in enumerate(mine):
            index[edge == i] = place
        return cls(mine, index)

    def apply(self, weight: Array, gates: dict[int, Array]) -> Array:
        """``weight`` times the gate of each of its entries."""
        first = gates[self.edges[0]]
        table = jnp.stack([*(gates[i] for i in self.edges), jnp.ones_like(first)])
        return weight * table[self.index]
