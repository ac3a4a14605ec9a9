"""Running a schedule in JAX."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from canvas_engineering.attention.api import block_sparse_attention
from canvas_engineering.jax.base import AttentionFunction, ProjectedAttention, merge_heads
from canvas_engineering.jax.params import Params
from canvas_engineering.jax.patterned import MixtureAttention
from canvas_engineering.jax.rows import Rows, add, has_duplicates, put, take
from canvas_engineering.jax.slots import SlotBinding
from canvas_engineering.jax.weights import ActiveWork, Gates, gate_edges
from canvas_engineering.routing.schedule import PlanCall, Schedule


class Layout:
    """Where the calls of a schedule take their rows from and put them; NumPy arrays, made once.

    Attributes:
        order: Canvas to plan order; None where it is the identity.
        plan_rows, plan_cols: Canvas tokens of each kernel call in plan order; None for all of them.
        direct_rows, direct_cols: Tokens of each direct call where no token occurs twice, else None.
        plan_gates, direct_gates: Where learned gates enter their weights.
        gate_edges: By function, the gating edges of its plans.
    """

    def __init__(self, schedule: Schedule) -> None:
        count = schedule.num_tokens
        gating = [i for i, edge in enumerate(schedule.edges) if edge.write_mode == "gate"]
        order = np.arange(count) if schedule.order is None else schedule.order
        self.order = None if np.array_equal(order, np.arange(count)) else Rows(order, count)
        self.plan_rows = [None if call.rows is None else Rows(order[call.rows], count) for call in schedule.plan_calls]
        self.plan_cols = [None if call.cols is None else Rows(order[call.cols], count) for call in schedule.plan_calls]
        self.plan_gates = [Gates.of(call.plan.row_connection, gating) for call in schedule.plan_calls]
        self.direct_rows = [_distinct(call.rows, count) for call in schedule.direct_calls]
        self.direct_cols = [_distinct(call.cols, count) for call in schedule.direct_calls]
        self.direct_gates = [Gates.of(call.edge[:, None], gating) for call in schedule.direct_calls]
        self.gate_edges = gate_edges(schedule)


def _distinct(tokens: np.ndarray[Any, np.dtype[np.int64]], count: int) -> Rows | None:
    return None if has_duplicates(tokens) else Rows(tokens.ravel(), count)


class Runner:
    """One evaluation of a schedule on ``x (B, N, d)``.

    Args:
        schedule, layout: What to run.
        functions: Attention functions by name.
        slots: Slot banks by region, with the names of their parameters.
        gate_names: Edge index to the name of its gate.
        params: All parameters.
        x: The canvas.
        work: What is active, and the weights.
        backend: As in ``block_sparse_attention``.
        rng: Turns dropout on.
    """

    def __init__(
        self,
        schedule: Schedule,
        layout: Layout,
        functions: Mapping[str, AttentionFunction],
        slots: Mapping[str, tuple[str, SlotBinding]],
        gate_names: Mapping[int, str],
        params: Params,
        x: Array,
        work: ActiveWork,
        backend: str,
        rng: Array | None,
    ) -> None:
        self.schedule = schedule
        self.layout = layout
        self.functions = functions
        self.slots = slots
        self.params = params
        self.x = x
        self.work = work
        self.backend = backend
        self.rng = rng
        self.gates = {i: jax.nn.sigmoid(params["gates"][name]) for i, name in gate_names.items()} if work.gates else {}
        self._ordered: Array | None = None

    def run(self) -> tuple[Array, list[tuple[int, str, Array]]]:
        """The new canvas ``(B, N, d)``, and (edge, region, ``attended - queries``) of the residual edges."""
        out = self._run_plans()
        errors: dict[int, tuple[str, list[Array]]] = {}
        for number, call in enumerate(self.schedule.direct_calls):
            if not self.work.direct_runs[number]:
                continue
            queries, attended = self._direct(number)
            if call.residual is not None:
                error = lax.stop_gradient(attended - queries)
                errors.setdefault(int(call.edge[0]), (call.residual, []))[1].append(_flat_groups(error))
            weight = jnp.asarray(self.work.direct_weight[number])  # (G, n)
            gates = self.layout.direct_gates[number]
            if gates is not None and self.work.gates:
                weight = gates.apply(weight, self.gates)
            contribution = _flat_groups(attended.astype(self.x.dtype) * weight[..., None].astype(self.x.dtype))
            rows = self.layout.direct_rows[number]
            if rows is not None:
                out = add(out, rows, contribution)
            else:
                out = jnp.zeros_like(self.x) if out is None else out
                out = out.at[:, call.rows.ravel()].add(contribution, mode="promise_in_bounds")
        if out is None:
            out = jnp.zeros_like(self.x)
        if self.work.written is not None:
            out = jnp.where(jnp.asarray(self.work.written)[:, None], out, self.x)
        return out, [(edge, region, jnp.concatenate(parts, axis=1)) for edge, (region, parts) in sorted(errors.items())]

    # -- groups that run without a plan ---------------------------------------------------------------------

    def _direct(self, number: int) -> tuple[Array, Array]:
        """Queries and attended rows ``(B, G, n, d)`` of equally shaped groups, stacked along the batch."""
        call = self.schedule.direct_calls[number]
        queries = _gather(self.x, call.rows, self.layout.direct_rows[number])  # (B, G, n, d)
        keys = _gather(self.x, call.cols, self.layout.direct_cols[number])
        keys = _stack_groups(keys)  # (B * G, m, d)
        if call.slots is not None:
            name, binding = self.slots[call.slots]
            keys = binding.apply(self.params["slot_modules"][name], keys)  # (B * G, slots, d)
        attended = self.functions[call.fn].apply(
            self.params["fn_modules"][call.fn],
            _stack_groups(queries),
            keys,
            keys,
            rng=self._rng(len(self.schedule.plan_calls) + number, call.fn),
        )
        return queries, attended.reshape(queries.shape)

    def _rng(self, number: int, fn: str) -> Array | None:
        """The random key of one call; None where nothing is dropped."""
        if self.rng is None or self.functions[fn].dropout == 0:
            return None
        return jax.random.fold_in(self.rng, number)

    # -- groups that run through plans ----------------------------------------------------------------------

    def _run_plans(self) -> Array | None:
        """The sum of all functions that run through plans, in canvas order; None if none is active."""
        whole: Array | None = None  # sums over calls on all rows, in plan order
        parts: Array | None = None  # and over calls on some rows, in canvas order
        by_function: dict[str, list[int]] = {}
        for number, call in enumerate(self.schedule.plan_calls):
            if self.work.plan_runs[number]:
                by_function.setdefault(call.fn, []).append(number)
        for fn, numbers in by_function.items():
            bias = self._bias_weight(fn)
            mixing = self._mixing(fn, numbers[0])
            for number in numbers:
                part = self._call_plan(number, bias)
                expert = self.schedule.plan_calls[number].expert
                if mixing is not None and expert is not None:
                    part = part * mixing[..., expert, None].astype(part.dtype)
                part = part.astype(self.x.dtype)
                rows = self.layout.plan_rows[number]
                if rows is None:
                    whole = part if whole is None else whole + part
                else:
                    parts = add(parts, rows, part)
        if whole is None:
            return parts
        if self.layout.order is not None:
            whole = put(self.layout.order, whole)
        return whole if parts is None else whole + parts

    def _tokens(self, rows: Rows | None) -> Array:
        """The canvas rows of a kernel call in plan order, ``(B, n, d)``; the whole canvas is permuted once."""
        if rows is not None:
            return take(rows, self.x)
        if self.layout.order is None:
            return self.x
        if self._ordered is None:
            self._ordered = take(self.layout.order, self.x)
        return self._ordered

    def _bias_weight(self, fn: str) -> Array | None:
        """``(N,)`` in canvas order: how much of the output projection's bias each row gets; None for 1 everywhere."""
        bias = self.work.bias[fn]
        if bias is None:
            return None
        bias = jnp.asarray(bias)
        if fn in self.work.gate_bias:
            gates = jnp.stack([self.gates[i] for i in self.layout.gate_edges[fn]])
            bias = bias + (gates[:, None] * self.work.gate_bias[fn]).sum(0)
        return bias

    def _mixing(self, fn: str, number: int) -> Array | None:
        """Weights of the experts ``(B, rows of the calls, experts)`` for functions that have some."""
        function = self.functions[fn]
        if not isinstance(function, MixtureAttention):
            return None
        return function.mixing_weights(self.params["fn_modules"][fn], self._tokens(self.layout.plan_rows[number]))

    def _function_of(self, call: PlanCall) -> tuple[ProjectedAttention, Params]:
        """The function that a kernel call computes, and its parameters: an expert's, where it is one."""
        function, params = self.functions[call.fn], self.params["fn_modules"][call.fn]
        if isinstance(function, MixtureAttention):
            return function.expert, params["experts"][str(call.expert)]
        if not isinstance(function, ProjectedAttention):
            raise TypeError(f"plan calls need projections, got {type(function).__name__}")
        return function, params

    def _call_plan(self, number: int, bias: Array | None) -> Array:
        """One kernel call and its output projection: ``(B, rows of the call, d)``."""
        call = self.schedule.plan_calls[number]
        function, params = self._function_of(call)
        rows, cols = self.layout.plan_rows[number], self.layout.plan_cols[number]
        q = function.heads_q(params, self._tokens(rows))
        k, v = function.heads_kv(params, self._tokens(cols))
        weight = self.work.plan_weight[number]
        if weight is not None:
            weight = jnp.asarray(weight)
            gates = self.layout.plan_gates[number]
            if gates is not None and self.work.gates:
                weight = gates.apply(weight, self.gates)
        rng = self._rng(number, call.fn)
        attended = block_sparse_attention(
            q,
            k,
            v,
            call.plan,
            scale=function.kernel_scale,
            backend=self.backend,
            row_weight=weight,
            dropout_p=0.0 if rng is None else function.dropout,
            seed=None if rng is None else jax.random.bits(rng, (2,), jnp.uint32),
            activation=function.activation,
        )
        projection = function.out_projection(params)
        projected = merge_heads(attended) @ projection["weight"].T
        if bias is None:
            projected = projected + projection["bias"]
        else:
            order = rows or self.layout.order
            share = bias if order is None else bias[order.index]
            projected = projected + (share[:, None] * projection["bias"]).astype(projected.dtype)
        factor = function.output_factor(params)
        return projected if factor is None else factor * projected


def _gather(x: Array, tokens: np.ndarray[Any, np.dtype[np.int64]], rows: Rows | None) -> Array:
    """``x (B, N, d)`` to ``(B, G, n, d)`` for tokens ``(G, n)``."""
    if rows is None:
        return x.at[:, tokens].get(mode="promise_in_bounds")
    return take(rows, x).reshape(x.shape[0], *tokens.shape, x.shape[2])


def _stack_groups(x: Array) -> Array:
    """``(B, G, n, d)`` to ``(B * G, n, d)``."""
    return x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])


def _flat_groups(x: Array) -> Array:
    """``(B, G, n, d)`` to ``(B, G * n, d)``."""
    return x.reshape(x.shape[0], x.shape[1] * x.shape[2], x.shape[3])
