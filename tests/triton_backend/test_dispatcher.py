"""``AttentionDispatcher(backend="triton")``: what portable computes, and nothing new to compile when regions change."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from canvas_engineering import (
    AttentionDispatcher,
    CanvasLayout,
    CanvasProgram,
    CanvasSchema,
    CanvasTopology,
    Connection,
)
from canvas_engineering.kernels.triton import launch
from canvas_engineering.program import ConnectionProgram

KERNELS = ("forward_kernel", "delta_kernel", "backward_q_kernel", "backward_kv_kernel", "compact_kernel")


def dispatcher(device: str, backend: str, **options: Any) -> AttentionDispatcher:
    """Three regions with gates, a trigger, a replacing edge, frames, and softmax, sigmoid and cosine attention."""
    layout = CanvasLayout(
        T=2, H=4, W=4, d_model=16, regions={"a": (0, 2, 0, 2, 0, 4), "b": (0, 2, 2, 4, 0, 3), "c": (0, 1, 2, 4, 3, 4)}
    )
    topology = CanvasTopology(
        [
            Connection("a", "a", t_src=0, t_dst=0),
            Connection("a", "a", t_src=0, t_dst=-1, weight=0.5),
            Connection("a", "b", write_mode="gate"),
            Connection("b", "a"),
            Connection("b", "c", fn="sigmoid_attention"),
            Connection("c", "b", fn="cosine_attention", write_mode="replace"),
        ]
    )
    triggered = {("b", "a"): ConnectionProgram(trigger="a.error > 0.5")}
    program = CanvasProgram(CanvasSchema(layout, topology), connections=triggered)
    torch.manual_seed(0)
    return AttentionDispatcher(
        topology, layout, d_model=16, n_heads=2, program=program, backend=backend, block_q=16, block_kv=16, **options
    ).to(device)


#: What changes from step to step: active regions and the summaries that triggers read.
STEPS: tuple[dict[str, Any], ...] = (
    {},
    {"summaries": {"a": {"error": 1.0}}},
    {"active_regions": ["a"]},
    {"active_regions": ["b"], "summaries": {"a": {"error": 1.0}}},
    {"active_regions": ["c"]},
    {"active_regions": []},
)


#: Everything that there is; and everything but the gate. With weights that are learned, and with weights that are not,
#: are two ways to compile a kernel, and there are no others.
FIRST: tuple[dict[str, Any], ...] = (STEPS[1], {"active_regions": ["b", "c"], **STEPS[1]})


def step(model: AttentionDispatcher, device: str, options: dict[str, Any]) -> list[torch.Tensor]:
    """Output, and gradients of the input and all parameters."""
    x = torch.randn(1, 32, 16, generator=torch.Generator().manual_seed(1)).to(device).requires_grad_()
    out = model(x, **options)
    leaves = [x, *model.parameters()]
    return [out, *torch.autograd.grad(out.square().sum(), leaves, allow_unused=True, materialize_grads=True)]


@pytest.mark.parametrize("options", STEPS, ids=lambda options: "-".join(options) or "all")
def test_equals_portable(device: str, options: dict[str, Any]) -> None:
    got, want = (step(dispatcher(device, backend), device, options) for backend in ("triton", "portable"))
    torch.testing.assert_close(got, want)


def test_dropout_drops_the_same_pairs(device: str) -> None:
    results = []
    for backend in ("triton", "portable"):
        model = dispatcher(device, backend, dropout=0.4)
        torch.manual_seed(5)  # where the dispatcher takes its seeds from
        results.append(step(model, device, STEPS[1]))
    torch.testing.assert_close(*results)


def test_explained(device: str) -> None:
    rows = dispatcher(device, "triton").explain().rows
    assert {(row.runs_on, row.reason) for row in rows} == {("triton", "asked for by backend='triton'")}


class Launches:
    """Every distinct specialisation of a kernel that is launched: its constants, and the kinds of its arguments."""

    def __init__(self) -> None:
        self.seen: set[Any] = set()

    def record(self, name: str, kernel: Any) -> Any:
        seen = self.seen

        class Recorded:
            def __getitem__(self, grid: Any) -> Callable[..., Any]:
                def run(*arguments: Any, **constants: Any) -> Any:
                    seen.add((name, tuple(map(kind, arguments)), frozenset(constants.items())))
                    return kernel[grid](*arguments, **constants)

                return run

        return Recorded()


def kind(argument: Any) -> Any:
    """What Triton may compile anew for: a dtype, or None; numbers are told apart on a GPU, by its own cache."""
    return argument.dtype if isinstance(argument, torch.Tensor) else type(argument)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Launches:
    recorder = Launches()
    for name in KERNELS:
        monkeypatch.setattr(launch, name, recorder.record(name, getattr(launch, name)))
    return recorder


def compiled_kernels() -> int:
    """How many kernels Triton has compiled."""
    kernels = [getattr(launch, name) for name in KERNELS]
    return sum(len(cache[0]) for kernel in kernels for cache in kernel.device_caches.values())


def test_regions_triggers_and_gates_compile_nothing(device: str, launches: Launches) -> None:
    model = dispatcher(device, "triton")
    for options in FIRST:
        step(model, device, options)
    schedule = model.schedule
    plans = [call.plan for call in schedule.plan_calls]
    kept = [dict(plan._lowered) for plan in plans]
    seen = set(launches.seen)
    assert {name for name, _, _ in seen} == set(KERNELS)
    for options in STEPS[2:]:
        with torch.no_grad():
            for gate in model.gates.values():
                gate.add_(0.3)
        step(model, device, options)
    assert launches.seen <= seen
    assert model.schedule is schedule
    assert [dict(plan._lowered) for plan in plans] == kept


@pytest.mark.gpu
def test_regions_triggers_and_gates_compile_nothing_on_a_gpu() -> None:
    model = dispatcher("cuda", "triton")
    for options in FIRST:
        step(model, "cuda", options)
    before = compiled_kernels()
    assert before > 0
    for options in STEPS:
        step(model, "cuda", options)
    assert compiled_kernels() == before


def test_inactive_regions_cost_nothing(device: str, launches: Launches) -> None:
    """A function of which nothing is active is not called; with no active region no kernel runs at all."""
    model = dispatcher(device, "triton")
    step(model, device, {"active_regions": []})
    assert not launches.seen
    step(model, device, {"active_regions": ["c"]})  # only cosine attention
    assert {dict(constants)["SIGMOID"] for name, _, constants in launches.seen if name == "forward_kernel"} == {False}
