"""One case: make it, compare everyone with the reference, time those that are right, write down the row."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from bench.canvases import CANVASES, Declared, declared
from bench.cases import Case
from bench.gate import Expected, expect_attention, expect_dispatcher
from bench.pairs import Pairs
from bench.peers import flex, jax_arrays, natten_window, old_release, ours, sdpa
from bench.results import Measured
from bench.roofline import Work
from bench.timing import Interleaved, Spread, rounds_within
from bench.variant import FAILURES, WARM_UP, Absent, Variant, told
from canvas_engineering.dispatch import AttentionDispatcher
from canvas_engineering.plan import BlockSparsePlan
from canvas_engineering.plan.plan import Softmax

#: A round that takes longer than this is repeated twice, not three times.
LONG_ROUND = 4.0
#: In rounds up to this length every timed call comes right after untimed ones.
WARM_ROUND = 0.5
#: A peer whose call takes longer than this is timed once, outside of the rounds.
PATIENCE = 8.0


@dataclass(frozen=True)
class AttentionProblem:
    """Operands of a case and the reference's answer, shared by its phases."""

    declared: Declared
    plan: BlockSparsePlan
    plan_seconds: float
    leaves: dict[str, Tensor]
    grad_out: Tensor
    expected: Expected


@dataclass(frozen=True)
class DispatcherProblem:
    """The same for a whole dispatcher."""

    declared: Declared
    plan: BlockSparsePlan
    module: AttentionDispatcher
    build_seconds: float
    x: Tensor
    grad_out: Tensor
    expected: Expected


@lru_cache(maxsize=1)
def _pairs(canvas: str) -> Pairs:
    return Pairs(declared(canvas))


@lru_cache(maxsize=1)
def _attention_problem(
    canvas: str, scope: Softmax, dtype: str, head_dim: int, heads: int, batch: int, device: str
) -> AttentionProblem:
    given = declared(canvas)
    plan, seconds = ours.build_plan(given, scope)
    generator = torch.Generator().manual_seed(0)
    shape = (batch, heads, given.layout.num_positions, head_dim)
    q, k, v, grad_out = (torch.randn(shape, generator=generator).to(getattr(torch, dtype)).to(device) for _ in range(4))
    leaves = {"q": q, "k": k, "v": v}
    return AttentionProblem(given, plan, seconds, leaves, grad_out, expect_attention(plan, q, k, v))


@lru_cache(maxsize=1)
def _dispatcher_problem(canvas: str, dtype: str, heads: int, batch: int, device: str) -> DispatcherProblem:
    given = declared(canvas)
    plan, _ = ours.build_plan(given, "connection")
    module, seconds = ours.build_dispatcher(given, heads, device)
    module = module.to(getattr(torch, dtype))
    generator = torch.Generator().manual_seed(0)
    shape = (batch, given.layout.num_positions, given.layout.d_model)
    x, grad_out = (torch.randn(shape, generator=generator).to(getattr(torch, dtype)).to(device) for _ in range(2))
    return DispatcherProblem(given, plan, module, seconds, x, grad_out, expect_dispatcher(module, x))


def measure(
    case: Case,
    pedantic: Callable[..., Any],
    seconds_of: Callable[[], list[float]],
    *,
    device: str = "cpu",
    budget: float = 1.5,
) -> tuple[dict[str, Any], list[Measured]]:
    """Run one case.

    Args:
        case: What.
        pedantic: pytest-benchmark's, or that of :class:`bench.timing.Clock`.
        seconds_of: The seconds of our variant per round, once ``pedantic`` has run.
        device: Where.
        budget: Seconds for the timed rounds of all variants together.

    Returns:
        The row of the case, and its variants with ours first. If ours is wrong, it is the only one. A peer that
        raises an error has failed, with the error as the reason; an error of ours is raised.
    """
    began = time.perf_counter()
    make = _dispatcher_variants if case.level == "dispatcher" else _attention_variants
    plan, backend, expected, makers = make(case, device)
    rows: list[Measured] = []
    runnable: list[Variant] = []
    try:
        for name, maker in makers:
            row, variant = _admit(name, maker, expected, gradients=case.phase != "forward")
            rows.append(row)
            if variant is not None:
                runnable.append(variant)
            elif name == ours.OURS:
                return _row(case, plan, backend, time.perf_counter() - began), rows
        _time(rows, runnable, pedantic, seconds_of, budget)
    finally:
        for variant in runnable:
            variant.close()
    return _row(case, plan, backend, time.perf_counter() - began), rows


def _admit(
    name: str, maker: Callable[[], Variant], expected: Expected, *, gradients: bool
) -> tuple[Measured, Variant | None]:
    """Make a variant and compare it with the reference."""
    variant = None
    try:
        variant = maker()
        actual = variant.outputs(expected.cotangent if gradients else None)
    except Absent as reason:
        return Measured(name, "absent", str(reason)), None
    except FAILURES as error:
        if name == ours.OURS:
            raise
        if variant is not None:
            variant.close()
        return Measured(name, "failed", told(error)), None
    verdict = expected.judge(actual, gradients=gradients)
    if not verdict.ok:
        variant.close()
        return Measured(name, "wrong", verdict.reason, error=verdict.error, allowed=verdict.allowed), None
    return Measured(name, "measured", setup=variant.setup, error=verdict.error, allowed=verdict.allowed), variant


def _time(
    rows: list[Measured],
    runnable: list[Variant],
    pedantic: Callable[..., Any],
    seconds_of: Callable[[], list[float]],
    budget: float,
) -> None:
    """Time who was admitted, in turn, and write seconds, ratios and memory into the rows."""
    by_name = {row.name: row for row in rows}
    mine, others = runnable[0], []
    once: dict[str, float] = {}
    for variant in runnable:
        row = by_name[variant.name]
        try:
            once[variant.name], row.peak_bytes = variant.probe()
        except (Absent, *FAILURES) as error:
            if variant is mine:
                raise
            row.status, row.reason = "failed", told(error)
            continue
        if variant is not mine and once[variant.name] <= PATIENCE:
            others.append(variant)
    together = once[mine.name] + sum(once[variant.name] for variant in others)
    warm = together <= WARM_ROUND
    interleaved = Interleaved(mine, others, warm)
    took = 2 * together + WARM_UP * (1 + len(others)) if warm else together
    interleaved.run(pedantic, rounds_within(budget, took, least=2 if took > LONG_ROUND else 3))
    for name, reason in interleaved.failed.items():
        by_name[name].status, by_name[name].reason = "failed", reason
    ours_seconds = interleaved.by_device or seconds_of()
    if not ours_seconds:  # benchmarks are disabled
        return
    for row in rows:
        if row.status != "measured":
            continue
        if row.name == mine.name:
            row.fill(ours_seconds)
        elif row.name in interleaved.samples:
            row.fill(interleaved.samples[row.name], ours_seconds)
        else:
            # Its one call stands for it, against the median of ours.
            row.fill([once[row.name]], [Spread.of(ours_seconds).median])


def _row(case: Case, plan: BlockSparsePlan, backend: str, wall: float) -> dict[str, Any]:
    canvas, stats = CANVASES[case.canvas], plan.stats()
    itemsize = getattr(torch, case.dtype).itemsize
    work = Work.of(plan, case.phase, case.head_dim, itemsize, case.heads, case.batch)
    projections = 0.0
    if case.level == "dispatcher":
        # q, k, v and the output for every token; twice that again backward.
        width = case.heads * case.head_dim
        factor = {"forward": 1, "backward": 2, "step": 3}[case.phase]
        projections = 8.0 * width * width * stats.num_q * case.batch * factor
    return {
        "id": case.id,
        **{key: value for key, value in asdict(case).items() if key != "peers"},
        "title": canvas.title,
        "provenance": canvas.provenance,
        "num_tokens": stats.num_q,
        "backend": backend,
        "plan": {
            key: value
            for key, value in stats.as_dict().items()
            if key in ("true_pairs", "computed_pairs", "computed_per_true", "density", "entries", "sets", "masks")
        }
        | {"block_q": plan.block_q, "block_kv": plan.block_kv, "metadata_bytes": stats.metadata_bytes},
        "true_flops": work.true_flops + projections,
        "visited_flops": work.visited_flops + projections,
        "moved_bytes": work.moved,
        "padding_share": work.padding_share,
        "partial_share": work.partial_share,
        "wall_seconds": wall,
    }


def _attention_variants(
    case: Case, device: str
) -> tuple[BlockSparsePlan, str, Expected, list[tuple[str, Callable[[], Variant]]]]:
    given = _attention_problem(case.canvas, case.scope, case.dtype, case.head_dim, case.heads, case.batch, device)
    plan, leaves, grad_out, phase = given.plan, given.leaves, given.grad_out, case.phase

    def make(name: str) -> Variant:
        match name:
            case ours.OURS:
                return ours.attention(plan, leaves, grad_out, phase, device, given.plan_seconds)
            case ours.OURS_PORTABLE:
                return ours.attention(plan, leaves, grad_out, phase, device, given.plan_seconds, "portable")
            case sdpa.MASKED:
                return sdpa.masked(_pairs(case.canvas), leaves, grad_out, phase, device)
            case sdpa.PER_GROUP:
                return sdpa.per_group(_pairs(case.canvas), leaves, grad_out, phase, device)
            case flex.FLEX:
                return flex.attention(_pairs(case.canvas), leaves, grad_out, phase, device)
            case natten_window.NATTEN:
                return natten_window.attention(given.declared, leaves, grad_out, phase, device)
            case jax_arrays.OURS_JAX:
                return jax_arrays.ours(plan, leaves, grad_out, phase)
            case jax_arrays.JAX_MASKED:
                return jax_arrays.masked(_pairs(case.canvas), leaves, grad_out, phase)
            case jax_arrays.SPLASH:
                return jax_arrays.splash()
        raise ValueError(f"no peer {name!r}")

    makers: list[tuple[str, Callable[[], Variant]]] = [(name, partial(make, name)) for name in (ours.OURS, *case.peers)]
    return plan, ours.backend_name(plan, *leaves.values()), given.expected, makers


def _dispatcher_variants(
    case: Case, device: str
) -> tuple[BlockSparsePlan, str, Expected, list[tuple[str, Callable[[], Variant]]]]:
    given = _dispatcher_problem(case.canvas, case.dtype, case.heads, case.batch, device)

    def mine() -> Variant:
        variant = ours.Dispatcher(given.module, given.x, given.grad_out, case.phase, device)
        variant.setup = {"build": given.build_seconds, "first call": variant.sample()}
        return variant

    def old() -> Variant:
        return old_release.OldRelease(given.declared, given.module, given.x, given.grad_out, case.phase)

    makers: list[tuple[str, Callable[[], Variant]]] = [(ours.OURS, mine)]
    if old_release.OLD in case.peers:
        makers.append((old_release.OLD, old))
    shape = (case.batch, case.heads, given.plan.num_q, case.head_dim)
    operand = torch.empty(shape, dtype=given.x.dtype, device=device)
    return given.plan, ours.backend_name(given.plan, operand, operand, operand), given.expected, makers
