"""Timing, peers and cases of the benchmarks: what runs, in which turn, and what happens to who is wrong."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from canvas_engineering.cli.bench import load

build_cost, canvases, cases = load("build_cost"), load("canvases"), load("cases")
figures, machine, measure, memory = load("figures"), load("machine"), load("measure"), load("memory")
progress, roofline, timing, variants = load("progress"), load("roofline"), load("timing"), load("variant")
old_release, ours, sdpa = load("peers.old_release"), load("peers.ours"), load("peers.sdpa")
jax_arrays, natten = load("peers.jax_arrays"), load("peers.natten_window")

SMALL = cases.Case("robot", "attention", "connection", "step", (sdpa.PER_GROUP,))


def run(case: Any) -> tuple[dict[str, Any], list[Any]]:
    clock = timing.Clock()
    row, rows = measure.measure(case, clock.pedantic, lambda: clock.seconds, budget=0.01)
    return row, rows


class Recorded(variants.Variant):  # type: ignore[name-defined]
    """Writes down when it runs."""

    def __init__(self, name: str, log: list[str]) -> None:
        self.name = name
        self.log = log

    def timed(self, prepared: Any) -> float | None:
        self.log.append(self.name)
        return None


# -- timing -------------------------------------------------------------------------------------------------


def test_every_variant_runs_once_per_round_and_the_others_take_turns() -> None:
    log: list[str] = []
    mine, a, b = (Recorded(name, log) for name in ("ours", "a", "b"))
    clock = timing.Clock()
    interleaved = timing.Interleaved(mine, [a, b])
    interleaved.run(clock.pedantic, 3)
    assert log == ["a", "b", "ours", "b", "a", "ours", "a", "b", "ours"]
    assert len(clock.seconds) == 3
    assert {name: len(taken) for name, taken in interleaved.samples.items()} == {"a": 3, "b": 3}


def test_warm_rounds_time_the_last_of_several_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(variants, "WARM_UP", 1e-9)  # one call
    log: list[str] = []
    mine, peer = (Recorded(name, log) for name in ("ours", "peer"))
    clock = timing.Clock()
    interleaved = timing.Interleaved(mine, [peer], warm=True)
    interleaved.run(clock.pedantic, 2)
    assert log == ["peer", "peer", "ours", "ours"] * 2
    assert (len(clock.seconds), len(interleaved.samples["peer"])) == (2, 2)


def test_the_clock_of_a_device_goes_before_the_wall() -> None:
    class OnDevice(Recorded):
        def timed(self, prepared: Any) -> float:
            super().timed(prepared)
            return 42.0

    mine, peer = OnDevice("ours", []), OnDevice("peer", [])
    clock = timing.Clock()
    interleaved = timing.Interleaved(mine, [peer])
    interleaved.run(clock.pedantic, 2)
    assert interleaved.by_device == [42.0, 42.0]
    assert interleaved.samples == {"peer": [42.0, 42.0]}
    assert variants.calls_within(1.0) == 1
    assert variants.calls_within(1e-3) == 5
    assert variants.calls_within(1e-9) == variants.GPU_CALLS


def test_spread_and_rounds() -> None:
    assert timing.Spread.of([3.0]).as_list() == [3.0, 3.0, 3.0]
    assert timing.Spread.of([1.0, 2.0, 3.0, 4.0, 5.0]).as_list() == [3.0, 2.0, 4.0]
    assert timing.rounds_within(1.0, 0.1) == 10
    assert timing.rounds_within(1.0, 100.0, least=2) == 2
    assert timing.rounds_within(1.0, 1e-9) == 30


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is told on Linux only")
@pytest.mark.parametrize("watched", [False, True])
def test_peak_memory(watched: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if watched:  # no permission to reset the high-water mark: it samples instead
        monkeypatch.setattr(memory, "_CLEAR_REFS", tmp_path / "missing" / "clear_refs")

    def call() -> None:
        block = np.ones(8 << 20)  # 64 MiB
        for _ in range(5):
            block += 1

    peak = memory.peak_bytes(call)
    assert 56 << 20 < peak < 96 << 20
    assert memory.peak_bytes(lambda: None) < 8 << 20


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_tells_how_long_it_takes(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    one = progress.Progress(["short", "long"], {"short": 1.0, "long": 9.0})
    now[0] += 2
    one.step("short")
    one.write("a line")
    assert capsys.readouterr().out == "[1/2 0:02, about 0:18 left] a line\n"
    one.close()
    unknown = progress.Progress(["short", "long"], {"short": 1.0})  # too little is known
    now[0] += 2
    unknown.step("short")
    unknown.write("a line")
    assert capsys.readouterr().out == "[1/2 0:02, about 0:02 left] a line\n"


def test_progress_on_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    bar = progress.Progress(["a", "b"], {})
    bar.step("a")
    bar.write("a line")
    bar.close()
    assert "a line" in capsys.readouterr().out
    assert "50%" in terminal.getvalue()
    assert "1/2" in terminal.getvalue()


# -- cases --------------------------------------------------------------------------------------------------


def test_cases_are_distinct_and_cover_every_canvas() -> None:
    quick, full = cases.cases("quick"), cases.cases("full")
    gpu = cases.cases("quick", "gpu"), cases.cases("full", "gpu")
    for found in (quick, full, *gpu):
        assert len({case.id for case in found}) == len(found)
    assert {case.id for case in gpu[0]} <= {case.id for case in gpu[1]}
    assert {case.canvas for case in gpu[1]} >= {case.canvas for case in quick}
    assert {case.id for case in quick} <= {case.id for case in full}
    named = {case.canvas for case in full}
    building = set(build_cost.canvases("full"))
    assert named | building == set(canvases.CANVASES)
    assert {case.dtype for case in full} == {"float32", "bfloat16", "float16"}
    assert {case.phase for case in full} == {"forward", "backward", "step"}
    assert {case.scope for case in full} == {"connection", "joint"}
    assert {name for case in cases.cases("quick") if case.level == "dispatcher" for name in case.peers} == {
        old_release.OLD
    }


@pytest.mark.parametrize(
    "name", [name for name in canvases.CANVASES if not name.startswith("length_") and name != "video"]
)
def test_canvases_declare_what_they_say(name: str) -> None:
    canvas = canvases.CANVASES[name]
    given = canvases.declared(name)
    assert canvas.provenance
    assert f"{given.layout.num_positions:,}" in canvas.title or name == "robot"
    assert given.topology.connections


def test_build_canvases_grow_to_a_million() -> None:
    sizes = [canvases.CANVASES[name].declare().layout.num_positions for name in build_cost.canvases("full")]
    assert sizes[0] == 2048
    assert sizes[-1] == 1048576
    assert sizes == sorted(sizes)


def test_a_case_is_measured() -> None:
    row, rows = run(SMALL)
    assert row["id"] == "attention-connection-step-float32-d64-h4-b1-robot"
    assert [one.name for one in rows] == [ours.OURS, sdpa.PER_GROUP]
    assert all(one.status == "measured" and one.seconds[0] > 0 for one in rows)
    assert rows[0].ratio is None
    assert rows[1].ratio[0] == pytest.approx(rows[1].seconds[0] / rows[0].seconds[0], rel=2)
    assert {"plan", "first call"} <= rows[0].setup.keys()
    assert 0 < row["true_flops"] <= row["visited_flops"]
    assert 0 <= row["padding_share"] < 1


def test_a_peer_that_is_wrong_has_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    right = sdpa.per_group

    def off_by_a_little(*arguments: Any) -> Any:
        variant = right(*arguments)
        call = variant._call
        variant._call = lambda q, k, v: call(q, k, v) * (1 + 1e-4)
        return variant

    monkeypatch.setattr(sdpa, "per_group", off_by_a_little)
    _, rows = run(SMALL)
    assert rows[1].status == "wrong"
    assert "out: max error" in rows[1].reason
    assert rows[1].seconds is None
    assert rows[1].ratio is None
    assert rows[0].seconds is not None


@pytest.mark.parametrize("after", [0, 1, 2, 3])
def test_a_peer_that_raises_ends_itself_alone(after: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """When it is made, compared, probed, or timed."""
    right, calls = sdpa.per_group, []

    def failing(*arguments: Any) -> Any:
        variant = right(*arguments)
        call = variant._call

        def sometimes(q: Any, k: Any, v: Any) -> Any:
            calls.append(1)
            if len(calls) > after:
                raise RuntimeError("out of\n memory")
            return call(q, k, v)

        variant._call = sometimes
        if after == 0:
            variant.sample()
        return variant

    monkeypatch.setattr(sdpa, "per_group", failing)
    _, rows = run(SMALL)
    assert [(one.status, one.reason) for one in rows] == [("measured", ""), ("failed", "RuntimeError: out of memory")]
    assert rows[0].seconds is not None
    assert rows[1].seconds is None


def test_an_error_of_ours_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: Any, **options: Any) -> Any:
        raise RuntimeError("broken")

    monkeypatch.setattr(ours, "block_sparse_attention", broken)
    with pytest.raises(RuntimeError, match="broken"):
        run(SMALL)


def test_a_slow_peer_is_called_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "PATIENCE", 0.0)
    _, rows = run(SMALL)
    assert rows[0].rounds >= 3
    assert rows[1].rounds == 1
    assert rows[1].ratio == [pytest.approx(rows[1].seconds[0] / rows[0].seconds[0])] * 3


def test_when_ours_is_wrong_nothing_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ours, "block_sparse_attention", lambda q, k, v, plan, backend: 0 * (q + k + v))
    _, rows = run(SMALL)
    assert [one.status for one in rows] == ["wrong"]
    assert rows[0].seconds is None


def test_absent_peers_give_reasons() -> None:
    case = cases.Case("robot", "attention", "joint", "step", (natten.NATTEN, jax_arrays.SPLASH, "flex_attention"))
    _, rows = run(case)
    assert {one.name: one.reason for one in rows if one.status == "absent"} == {
        natten.NATTEN: "has only window masks",
        jax_arrays.SPLASH: "needs a TPU; its static cost stands beside ours in the table of bench/pallas_static.py",
        "flex_attention": "torch has no backward pass of flex_attention on the CPU",
    }


def test_jax_arrays_agree() -> None:
    pytest.importorskip("jax")
    _, rows = run(cases.Case("robot", "attention", "joint", "step", (jax_arrays.OURS_JAX, jax_arrays.JAX_MASKED)))
    assert [(one.name, one.status, one.reason) for one in rows[1:]] == [
        (jax_arrays.OURS_JAX, "measured", ""),
        (jax_arrays.JAX_MASKED, "measured", ""),
    ]


def test_masks_that_do_not_fit_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "total_bytes", lambda device: 1 << 20)
    _, rows = run(cases.Case("robot", "attention", "joint", "forward", (sdpa.MASKED,)))
    assert rows[1].status == "absent"
    assert "its mask of 320 x 320 would take about 0 GiB, more than half of the 0 GiB of this device" in rows[1].reason


# -- 0.5.0 --------------------------------------------------------------------------------------------------

DISPATCHER = cases.Case("robot", "dispatcher", "connection", "step", (old_release.OLD,))


@pytest.fixture
def fresh_worker() -> Any:
    old_release.stop()
    yield
    old_release.stop()


def test_without_the_old_release(fresh_worker: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(old_release.ENVIRONMENT, raising=False)
    monkeypatch.setattr(old_release, "FOLDER", tmp_path / "none")
    _, rows = run(DISPATCHER)
    assert rows[0].seconds is not None
    assert rows[1].status == "absent"
    assert "make bench-peers" in rows[1].reason


def test_an_interpreter_that_cannot_be_run(fresh_worker: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(old_release.ENVIRONMENT, str(tmp_path / "python"))
    _, rows = run(DISPATCHER)
    assert rows[1].status == "absent"
    assert "cannot be run: No such file or directory" in rows[1].reason


def test_an_interpreter_with_another_release(fresh_worker: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(old_release.ENVIRONMENT, sys.executable)
    _, rows = run(DISPATCHER)
    assert rows[1].status == "absent"
    assert "holds canvas-engineering 0.6" in rows[1].reason


def test_worker_with_this_release(fresh_worker: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The worker's protocol, with this package standing in for the old one: same answer, timed over there."""
    monkeypatch.setenv(old_release.ENVIRONMENT, sys.executable)
    monkeypatch.setattr(old_release, "VERSION", machine.versions()["canvas-engineering"])
    _, rows = run(DISPATCHER)
    assert rows[1].status == "measured", rows[1].reason
    assert rows[1].ratio[0] > 0
    assert rows[1].peak_bytes is None or rows[1].peak_bytes > 0
    process = old_release._process()
    with pytest.raises(old_release.WorkerError, match="KeyError"):
        process.ask("build")
    assert process.ask("hello")["torch"] == torch.__version__


@pytest.mark.skipif(not old_release.FOLDER.is_dir(), reason="canvas-engineering 0.5.0 is not installed")
def test_the_old_release_itself(fresh_worker: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(old_release.ENVIRONMENT, raising=False)
    _, rows = run(DISPATCHER)
    assert rows[1].status == "measured", rows[1].reason


# -- building and figures -----------------------------------------------------------------------------------


def build(builder: str, earlier: Any = None, patience: float = 10.0) -> Any:
    clock = timing.Clock()
    name = build_cost.canvases("quick")[0]
    return build_cost.build(name, builder, earlier, patience, clock.pedantic, lambda: clock.seconds)


@pytest.mark.parametrize("builder", build_cost.BUILDERS)
def test_builders_make_the_same_mask(builder: str) -> None:
    row = build(builder)
    assert row.status == "measured", row.reason
    assert row.num_tokens == 2048
    assert row.seconds[0] > 0
    assert row.result_bytes > 0


def test_a_wrong_mask_has_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_cost.Classes, "visited_blocks", lambda self, block: 1)
    row = build(build_cost.BLOCK_MASK)
    assert row.status == "wrong"
    assert row.reason == "visited blocks: 60, expected 1"
    assert row.seconds is None


def test_what_would_take_too_long_is_not_tried() -> None:
    earlier = build_cost.Built(build_cost.PROCESS_MASK, "smaller", 512, "measured", seconds=[1.0, 1.0, 1.0])
    row = build(build_cost.PROCESS_MASK, earlier)
    assert row.status == "absent"
    assert row.reason == "not tried from 2,048 positions on: 16 s expected, 1 s at 512"
    again = build(build_cost.PROCESS_MASK, row)
    assert again.reason == row.reason
    plan = build(build_cost.OURS_JOINT, build_cost.Built(build_cost.OURS_JOINT, "", 512, "measured", seconds=[1e3] * 3))
    assert plan.status == "measured"


def test_import_time_sees_what_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "_IMPORT", "import sys; print(0.1)")
    assert figures.import_time()["value"] == [0.1, 0.1, 0.1]
    monkeypatch.setattr(figures, "_IMPORT", "print(0.1, 'torch')")
    assert figures.import_time()["reason"] == "it loads torch"


def test_work_is_what_the_pairs_need() -> None:
    plan, _ = ours.build_plan(canvases.declared("dense"), "joint")
    for phase, per_pair in (("forward", 4), ("backward", 10), ("step", 14)):
        work = roofline.Work.of(plan, phase, 64, 4, heads=2, batch=3)
        assert work.true_flops == work.visited_flops == per_pair * 64 * 6 * 1024 * 1024
        assert work.padding_share == work.partial_share == 0
    assert roofline.Work.of(plan, "forward", 64, 4, 1, 1).moved == 4 * 1024 * 64 * 4
    robot, _ = ours.build_plan(canvases.declared("robot"), "joint")
    work, stats = roofline.Work.of(robot, "forward", 64, 4, 1, 1), robot.stats()
    assert work.visited_flops * (1 - work.padding_share - work.partial_share) == pytest.approx(work.true_flops)
    assert work.padding_share + work.partial_share == pytest.approx(1 - 1 / stats.computed_per_true)


def test_ceilings_keep_the_best() -> None:
    slow, fast = roofline.Ceilings("float32", 1e9, 4e9), roofline.Ceilings("float32", 2e9, 3e9)
    best = fast.at_least(slow)
    assert (best.matmul, best.copy) == (2e9, 4e9)
    assert fast.at_least(None) == fast
    assert roofline.floor_seconds(best.as_dict(), 4e9, 4e9) == 2.0
    found = roofline.measure_ceilings("cpu", "float32", seconds=0.01)
    assert found.matmul > 1e8
    assert found.copy > 1e7
