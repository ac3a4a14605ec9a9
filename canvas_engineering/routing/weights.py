"""Row weights: what each row takes from each of its groups, given which edges are active.

``add`` edges share a row in proportion to their weights, ``gate`` edges are added on top, and the last active
``replace`` edge of a row overrides both. All of this is data, so active regions and triggers change numbers, not
plans.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from canvas_engineering.routing.schedule import Schedule


@dataclass(frozen=True, eq=False)
class RowWeights:
    """The weights of one set of active edges, gates left out (they are learned; see ``gate_edge``).

    Attributes:
        plans: For each plan call, ``(num_sets, block_q)`` float32.
        direct: For each direct call, ``(G, n)`` float32.
        bias: For each function with plan calls, ``(num_tokens,)`` float32: the total weight of its edges in each
            row, by which the output projection's bias counts. Edges that gate are left out.
        gate_bias: For each such function, edge index to ``(num_tokens,)`` float32: the same for one gating edge.
        written: ``(num_tokens,)`` bool, rows that some active edge writes; the others pass through.
    """

    plans: list[NDArray[np.float32]]
    direct: list[NDArray[np.float32]]
    bias: dict[str, NDArray[np.float32]]
    gate_bias: dict[str, dict[int, NDArray[np.float32]]]
    written: NDArray[np.bool_]


def row_weights(schedule: Schedule, active: tuple[bool, ...]) -> RowWeights:
    """Weights under the given active edges; cost follows the rows of the groups."""
    edges, groups = schedule.edges, schedule.groups
    add_total = np.zeros(schedule.num_tokens, np.float64)
    winner = np.full(schedule.num_tokens, -1, np.int64)
    gated = np.zeros(schedule.num_tokens, np.bool_)
    for group in groups:  # in order of their edges, so the last replacing one wins
        if not active[group.connection]:
            continue
        match edges[group.connection].write_mode:
            case "add":
                add_total[group.rows] += group.weight
            case "gate":
                gated[group.rows] = True
            case "replace":
                winner[group.rows] = group.connection
    share = np.divide(1.0, add_total, out=np.zeros_like(add_total), where=add_total > 0)
    is_active = np.array([*active, False])
    mode = np.array([*({"add": 0, "gate": 1, "replace": 2}[edge.write_mode] for edge in edges), 0], np.int64)

    def factor(edge: NDArray[np.int64], token: NDArray[np.int64]) -> NDArray[np.float64]:
        """What a group's own weight is multiplied by; ``edge`` and ``token`` may hold -1, for padding."""
        free = winner[token] < 0
        by_mode = np.stack([share[token] * free, free, winner[token] == edge])
        chosen = np.take_along_axis(by_mode, mode[edge][None], axis=0)[0]
        return chosen * is_active[edge] * (token >= 0)

    planned = {call.fn for call in schedule.plan_calls}
    bias = {fn: np.zeros(schedule.num_tokens, np.float32) for fn in planned}
    gate_bias: dict[str, dict[int, NDArray[np.float32]]] = {fn: {} for fn in planned}
    for group in schedule.planned:
        edge = edges[group.connection]
        if not active[group.connection]:
            continue
        target = bias[edge.fn]
        if edge.write_mode == "gate":
            target = gate_bias[edge.fn].setdefault(group.connection, np.zeros(schedule.num_tokens, np.float32))
        target[group.rows] += group.weight * factor(np.full(group.rows.size, group.connection), group.rows)
    return RowWeights(
        plans=[
            (call.plan.row_weight * factor(call.plan.row_connection.astype(np.int64), call.row_tokens)).astype(
                np.float32
            )
            for call in schedule.plan_calls
        ],
        direct=[
            (call.weight[:, None] * factor(np.broadcast_to(call.edge[:, None], call.rows.shape), call.rows)).astype(
                np.float32
            )
            for call in schedule.direct_calls
        ],
        bias=bias,
        gate_bias=gate_bias,
        written=(add_total > 0) | gated | (winner >= 0),
    )
