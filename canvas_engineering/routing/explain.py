"""Which connection runs where, and why: the table behind ``AttentionDispatcher.explain``."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from canvas_engineering._arrays import is_jax, is_torch
from canvas_engineering.attention.api import choose_backend, jax_platform
from canvas_engineering.errors import BackendError
from canvas_engineering.routing.schedule import Schedule


@dataclass(frozen=True)
class ExplainedEdge:
    """One connection: its function and why, its write mode, and what computes it."""

    connection: int
    src: str
    dst: str
    fn: str
    fn_reason: str
    write_mode: str
    runs_on: str
    reason: str


@dataclass(frozen=True)
class Explanation:
    """The rows of the table and the plans they refer to."""

    rows: list[ExplainedEdge]
    plans: list[str]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"connections": [asdict(row) for row in self.rows], "plans": self.plans}

    def __str__(self) -> str:
        if not self.rows:
            return "no connections"
        header = ("#", "connection", "function", "write", "runs on", "why")
        cells = [
            (
                str(row.connection),
                f"{row.src} -> {row.dst}",
                f"{row.fn} ({row.fn_reason})",
                row.write_mode,
                row.runs_on,
                row.reason,
            )
            for row in self.rows
        ]
        widths = [max(len(line[i]) for line in [header, *cells]) for i in range(len(header))]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
            for line in [header, *cells]
        ]
        return "\n".join([*lines, *self.plans])


def explain(schedule: Schedule, modules: Any, x: Any, head_dim: int, n_heads: int, backend: str) -> Explanation:
    """Ask every kernel call of a schedule which backend it takes for inputs like ``x``."""
    chosen: dict[str, tuple[str, str]] = {}
    plans = []
    for call in schedule.plan_calls:
        q, k = (_probe(x, n_heads, count, head_dim) for count in (call.plan.num_q, call.plan.num_kv))
        try:
            choice = choose_backend(q, k, k, call.plan, backend=backend, activation=modules[call.fn].activation)
            passed = "; ".join(f"not {name}: {', '.join(why)}" for name, why in choice.reasons_passed_over.items())
            why = f"asked for by backend={backend!r}" if backend != "auto" else f"auto for {_kind(x)}"
            chosen[call.fn] = (choice.name, f"{why}{'; ' + passed if passed else ''}")
        except BackendError as error:
            chosen[call.fn] = ("nothing", str(error))
        stats = call.plan.stats()
        expert = "" if call.expert is None else f", expert {call.expert}"
        plans.append(
            f"plan of {call.fn}{expert}: {stats.entries:,} tiles of {stats.block_q} x {stats.block_kv}, "
            f"{stats.computed_per_true:.2f} pairs computed per pair needed, {call.plan.max_sets} softmax sets at most"
        )
    rows = []
    for number, edge in enumerate(schedule.edges):
        own = edge.needs_own_output or edge.fn not in chosen
        if not own:
            runs_on, reason = chosen[edge.fn]
        elif edge.slots:
            runs_on, reason = "framework", f"keys are the slot bank of {edge.dst!r}"
        elif edge.residual:
            runs_on, reason = "framework", f"its error feeds the residuals of {edge.dst!r}"
        else:
            runs_on, reason = "framework", f"{edge.fn} is not attention over a plan; batched by group shape"
        if not any(group.connection == number for group in schedule.groups):
            runs_on, reason = "nothing", "it has no groups"
        rows.append(
            ExplainedEdge(edge.index, edge.src, edge.dst, edge.fn, edge.reason, edge.write_mode, runs_on, reason)
        )
    return Explanation(rows, plans)


def _probe(x: Any, n_heads: int, count: int, head_dim: int) -> Any:
    """An array like ``x`` with the shape of a kernel operand; its batch is empty, so it takes no memory."""
    shape = (0, n_heads, count, head_dim)
    if is_torch(x):
        return x.new_empty(shape)
    if is_jax(x):
        import jax

        device = None if isinstance(x, jax.core.Tracer) else next(iter(x.devices()))
        return jax.numpy.empty(shape, x.dtype, device=device)
    import numpy as np

    return np.empty(shape, x.dtype)


def _kind(x: Any) -> str:
    if is_torch(x):
        return f"{x.dtype} tensors on {x.device}"
    return f"{x.dtype} JAX arrays on {jax_platform(x)}" if is_jax(x) else f"{x.dtype} NumPy arrays"
