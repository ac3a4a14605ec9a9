"""Running a schedule in torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from canvas_engineering.attention.api import block_sparse_attention
from canvas_engineering.attention.dense import GatedAttention
from canvas_engineering.attention.patterned import MixtureAttention
from canvas_engineering.routing.schedule import DirectCall, PlanCall, Schedule
from canvas_engineering.routing.weights import RowWeights


@dataclass(frozen=True, eq=False)
class _Gated:
    """Where learned gates enter a weight tensor: ``weight * table[index]``, table = [gates..., 1]."""

    edges: list[int]
    index: Tensor

    @classmethod
    def of(cls, edge: NDArray[np.integer], gate_edges: list[int], device: Any) -> _Gated | None:
        mine = [i for i in gate_edges if (edge == i).any()]
        if not mine:
            return None
        index = np.full(edge.shape, len(mine), np.int64)
        for place, i in enumerate(mine):
            index[edge == i] = place
        return cls(mine, torch.from_numpy(index).to(device))

    def apply(self, weight: Tensor, gates: Mapping[int, Tensor]) -> Tensor:
        first = gates[self.edges[0]]
        table = torch.stack([*(gates[i] for i in self.edges), torch.ones_like(first)])
        return weight * table[self.index]


@dataclass(frozen=True, eq=False)
class DeviceState:
    """The weights of one set of active edges as tensors on a device, and the indices of the schedule there.

    Attributes:
        order, inverse: Canvas to plan order and back; None where they are the identity.
        plan_weight, direct_weight: One tensor per call; None for calls that nothing active uses.
        plan_gates, direct_gates: Where gates enter them.
        bias: By function ``(N, 1)`` weight of the output bias in canvas order; None where it is 1 in every row.
        gate_bias: By function, the same per gating edge.
        written: ``(N, 1)`` bool, or None when every row is written.
    """

    order: Tensor | None
    inverse: Tensor | None
    rows: list[Tensor | None]
    cols: list[Tensor | None]
    plan_weight: list[Tensor | None]
    plan_gates: list[_Gated | None]
    bias: dict[str, Tensor | None]
    gate_bias: dict[str, dict[int, Tensor]]
    direct_rows: list[Tensor]
    direct_cols: list[Tensor]
    direct_weight: list[Tensor | None]
    direct_gates: list[_Gated | None]
    written: Tensor | None

    @classmethod
    def of(cls, schedule: Schedule, weights: RowWeights, active: tuple[bool, ...], device: Any) -> DeviceState:
        def tensor(array: NDArray[Any]) -> Tensor:
            return torch.from_numpy(np.ascontiguousarray(array)).to(device)

        def is_one(fn: str) -> bool:
            rows = _rows_of(schedule, fn, weights.written)
            return not weights.gate_bias[fn] and bool(np.abs(weights.bias[fn][rows] - 1.0).max(initial=0.0) < 1e-6)

        gate_edges = [i for i, edge in enumerate(schedule.edges) if edge.write_mode == "gate" and active[i]]
        order = schedule.order
        moved = order is not None and not np.array_equal(order, np.arange(order.size))
        plans, directs = schedule.plan_calls, schedule.direct_calls
        written = weights.written
        return cls(
            order=tensor(order) if order is not None and moved else None,
            inverse=tensor(np.argsort(order)) if order is not None and moved else None,
            rows=[None if call.rows is None else tensor(call.rows) for call in plans],
            cols=[None if call.cols is None else tensor(call.cols) for call in plans],
            plan_weight=[tensor(w) if w.any() else None for w in weights.plans],
            plan_gates=[_Gated.of(call.plan.row_connection, gate_edges, device) for call in plans],
            bias={fn: None if is_one(fn) else tensor(w[:, None]) for fn, w in weights.bias.items()},
            gate_bias={
                fn: {i: tensor(w[:, None]) for i, w in by_edge.items()} for fn, by_edge in weights.gate_bias.items()
            },
            direct_rows=[tensor(call.rows) for call in directs],
            direct_cols=[tensor(call.cols) for call in directs],
            direct_weight=[
                tensor(w[:, :, None]) if any(active[i] for i in call.edge) else None
                for call, w in zip(directs, weights.direct, strict=True)
            ],
            direct_gates=[
                _Gated.of(np.broadcast_to(call.edge[:, None, None], (*call.rows.shape, 1)), gate_edges, device)
                for call in directs
            ],
            written=None if written.all() else tensor(written[:, None]),
        )


def _rows_of(schedule: Schedule, fn: str, written: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """``(N,)`` bool: written rows that the calls of a function give."""
    mine = np.zeros(schedule.num_tokens, np.bool_)
    for call in schedule.plan_calls:
        if call.fn == fn and schedule.order is not None:
            mine[schedule.order if call.rows is None else schedule.order[call.rows]] = True
    return mine & written


def run_schedule(
    schedule: Schedule,
    state: DeviceState,
    x: Tensor,
    modules: nn.ModuleDict,
    gates: Mapping[int, Tensor],
    slots: Mapping[str, nn.Module],
    backend: str,
) -> tuple[Tensor, list[tuple[str, Tensor]]]:
    """Run all calls on ``x (B, N, d)``.

    Args:
        schedule, state: What to run, and the weights of the active edges.
        x: The canvas.
        modules: Attention functions by name.
        gates: ``sigmoid(gate)`` by edge.
        slots: Slot banks by region.
        backend: As in ``block_sparse_attention``.

    Returns:
        The new canvas ``(B, N, d)``, and (region, ``attended - queries``) of the edges that feed residuals.
    """
    out = _run_plans(schedule, state, x, modules, gates, backend)
    errors: dict[int, tuple[str, list[Tensor]]] = {}
    for number, call in enumerate(schedule.direct_calls):
        weight = state.direct_weight[number]
        if weight is None:
            continue
        rows = state.direct_rows[number]
        queries, attended = _direct(call, rows, state.direct_cols[number], x, modules[call.fn], slots)
        if call.residual is not None:
            error = (attended - queries).detach().flatten(1, 2)
            errors.setdefault(int(call.edge[0]), (call.residual, []))[1].append(error)
        weight = weight.to(x.dtype)
        gated = state.direct_gates[number]
        if gated is not None:
            weight = gated.apply(weight, gates).to(x.dtype)
        contribution = (attended.to(x.dtype) * weight).flatten(1, 2)  # (B, G * n, d)
        out = torch.zeros_like(x) if out is None else out
        out = out.index_add(1, rows.flatten(), contribution)
    if out is None:
        out = torch.zeros_like(x)
    if state.written is not None:
        out = torch.where(state.written, out, x)
    return out, [(region, torch.cat(parts, dim=1)) for _, (region, parts) in sorted(errors.items())]


def _direct(
    call: DirectCall, rows: Tensor, cols: Tensor, x: Tensor, module: nn.Module, slots: Mapping[str, nn.Module]
) -> tuple[Tensor, Tensor]:
    """Queries and attended rows ``(B, G, n, d)`` of equally shaped groups, stacked along the batch."""
    batch, width = x.shape[0], x.shape[2]
    queries = x[:, rows]  # (B, G, n, d)
    keys = x[:, cols].flatten(0, 1)  # (B * G, m, d)
    if call.slots is not None:
        keys = slots[call.slots](keys)  # (B * G, slots, d)
    attended = module(queries.flatten(0, 1), keys, keys)
    return queries, attended.reshape(batch, *rows.shape, width)


def _run_plans(
    schedule: Schedule,
    state: DeviceState,
    x: Tensor,
    modules: nn.ModuleDict,
    gates: Mapping[int, Tensor],
    backend: str,
) -> Tensor | None:
    """The sum of all functions that run through plans, in canvas order; None if none is active."""
    running = [i for i, weight in enumerate(state.plan_weight) if weight is not None]
    if not running:
        return None
    ordered = x if state.order is None else x.index_select(1, state.order)
    by_function: dict[str, list[int]] = {}
    for i in running:
        by_function.setdefault(schedule.plan_calls[i].fn, []).append(i)
    total: Tensor | None = None  # in plan order
    for fn, numbers in by_function.items():
        bias = _bias_weight(state, fn, gates)
        module = modules[fn]
        if isinstance(module, MixtureAttention):
            first = state.rows[numbers[0]]
            mixing = module.mixing_weights(ordered if first is None else ordered.index_select(1, first))
            for i in numbers:
                expert = schedule.plan_calls[i].expert
                if expert is None:
                    raise TypeError(f"plan call {i} of {fn!r} must name an expert")
                part = _call_plan(
                    schedule.plan_calls[i], i, state, ordered, module.experts[expert], gates, bias, backend
                )
                total = _accumulate(total, part * mixing[..., expert, None].to(part.dtype), state.rows[i], ordered)
        else:
            for i in numbers:
                part = _call_plan(schedule.plan_calls[i], i, state, ordered, module, gates, bias, backend)
                if isinstance(module, GatedAttention):
                    part = part * torch.sigmoid(module.gate)
                total = _accumulate(total, part, state.rows[i], ordered)
    if total is None or state.inverse is None:
        return total
    return total.index_select(1, state.inverse)


def _accumulate(total: Tensor | None, part: Tensor, rows: Tensor | None, like: Tensor) -> Tensor:
    """Add a call's rows ``(B, n, d)`` to the running sum ``(B, N, d)``."""
    part = part.to(like.dtype)
    if rows is None:
        return part if total is None else total + part
    return (torch.zeros_like(like) if total is None else total).index_add(1, rows, part)


def _bias_weight(state: DeviceState, fn: str, gates: Mapping[int, Tensor]) -> Tensor | None:
    """``(N, 1)`` in plan order: how much of the output projection's bias each row gets; None for 1 everywhere."""
    bias = state.bias[fn]
    if bias is None:
        return None
    for i, weight in state.gate_bias[fn].items():
        bias = bias + gates[i] * weight
    return bias if state.order is None else bias.index_select(0, state.order)


def _call_plan(
    call: PlanCall,
    number: int,
    state: DeviceState,
    ordered: Tensor,
    module: Any,
    gates: Mapping[int, Tensor],
    bias: Tensor | None,
    backend: str,
) -> Tensor:
    """One kernel call and its output projection: ``(B, rows of the call, d)``."""
    rows, cols = state.rows[number], state.cols[number]
    q = module.heads_q(ordered if rows is None else ordered.index_select(1, rows))
    k, v = module.heads_kv(ordered if cols is None else ordered.index_select(1, cols))
    weight = state.plan_weight[number]
    gated = state.plan_gates[number]
    if weight is not None and gated is not None:
        weight = gated.apply(weight, gates)
    dropout_p = module.dropout.p if module.training else 0.0
    # The seed comes from torch's CPU generator: reproducible by torch.manual_seed, and no wait for a device.
    seed = int(torch.randint(0, 2**63 - 1, ())) if dropout_p > 0 else None
    attended = block_sparse_attention(
        q,
        k,
        v,
        call.plan,
        scale=module.kernel_scale,
        backend=backend,
        row_weight=weight,
        dropout_p=dropout_p,
        seed=seed,
        activation=module.activation,
    )
    merged = module.merge(attended)
    projection = module.out_proj
    if bias is None:
        return F.linear(merged, projection.weight, projection.bias)
    projected = F.linear(merged, projection.weight)
    share = bias if rows is None else bias.index_select(0, rows)
    return projected + (share * projection.bias).to(projected.dtype)
