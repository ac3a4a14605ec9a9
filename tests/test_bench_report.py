"""Results as data, the page that is made of them, regressions, and the command line around them."""

from __future__ import annotations

import argparse
import copy
import json
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from canvas_engineering.cli import bench as command
from canvas_engineering.cli.bench import load
from canvas_engineering.errors import CanvasError, MissingDependencyError, SchemaError

compare, conftest, foreign = load("compare"), load("conftest"), load("foreign")
machine, plots = load("machine"), load("plots")
report, results, summary, targets = load("report"), load("results"), load("summary"), load("targets")
OLD, MASKED, FLEX = "canvas-engineering 0.5.0", "masked SDPA", "flex_attention"


def row(canvas: str, level: str, scope: str, phase: str, **extra: Any) -> dict[str, Any]:
    parts = {"dtype": "float32", "head_dim": 64, "heads": 4, "batch": 1} | extra
    sizes = f"d{parts['head_dim']}-h{parts['heads']}-b{parts['batch']}"
    return {
        "id": f"{level}-{scope}-{phase}-{parts['dtype']}-{sizes}-{canvas}",
        "canvas": canvas,
        "level": level,
        "scope": scope,
        "phase": phase,
        **parts,
        "title": canvas.replace("_", " "),
        "provenance": f"examples/canvases/{canvas}.json",
        "num_tokens": 320,
        "backend": "portable",
        "plan": {"density": 0.25, "computed_per_true": 1.25, "block_q": 64, "block_kv": 32},
        "true_flops": 4e9,
        "visited_flops": 5e9,
        "moved_bytes": 1e6,
        "padding_share": 0.15,
        "partial_share": 0.05,
        "wall_seconds": 1.0,
    }


def timed(name: str, seconds: float, ratio: float | None = None, **extra: Any) -> Any:
    spread = [seconds, 0.95 * seconds, 1.05 * seconds]
    ratios = None if ratio is None else [ratio, 0.9 * ratio, 1.1 * ratio]
    return results.Measured(name, "measured", seconds=spread, ratio=ratios, peak_bytes=3 << 20, **extra)


@pytest.fixture
def measured() -> Any:
    """A result with every kind of row."""
    found = results.Results("quick", machine.describe("cpu"), "0123456789", "2026-01-02")
    found.ceilings = {"float32": {"dtype": "float32", "matmul": 1e11, "copy": 1e10}}
    flex_absent = results.Measured(FLEX, "absent", "no compiler")
    old_wrong = results.Measured(OLD, "wrong", "out: max error 1e-1, at most 1e-6", error=float("nan"))
    found.add_case(
        row("robot", "attention", "joint", "forward"),
        [timed("canvas-engineering", 0.1, setup={"plan": 0.01}), timed(MASKED, 0.2, 2.0), flex_absent],
    )
    found.add_case(
        row("robot", "dispatcher", "connection", "forward"),
        [timed("canvas-engineering", 0.1), timed(OLD, 0.31, 3.1)],
    )
    found.add_case(
        row("robot", "dispatcher", "connection", "step"), [timed("canvas-engineering", 0.3), timed(OLD, 0.6, 2.0)]
    )
    found.add_case(
        row("computer_use_2048_once", "dispatcher", "connection", "forward"),
        [timed("canvas-engineering", 0.3), old_wrong],
    )
    found.add_case(
        row("length_1x32x32", "attention", "joint", "forward"), [timed("canvas-engineering", 0.1), timed(MASKED, 1, 10)]
    )
    found.add_case(
        row("sparse_10", "attention", "joint", "forward"), [timed("canvas-engineering", 0.1), timed(FLEX, 0.05, 0.5)]
    )
    found.add_case(
        row("multi_robot", "attention", "joint", "forward", dtype="float32", batch=8),
        [results.Measured("canvas-engineering", "wrong", "out: max error")],
    )
    for tokens, seconds in ((2048, 0.01), (16384, 0.05), (1048576, 12.0)):
        found.builds.append(
            {
                "builder": "plan, joint",
                "canvas": f"length_{tokens}",
                "num_tokens": tokens,
                "status": "measured",
                "reason": "",
                "seconds": [seconds] * 3,
                "peak_bytes": 2 << 20,
                "result_bytes": 100,
            }
        )
    found.builds.append(
        {
            **found.builds[0],
            "builder": "create_block_mask",
            "status": "absent",
            "reason": "not tried",
            "seconds": None,
            "peak_bytes": None,
        }
    )
    found.failures.append({"id": "test_case[lost]", "reason": "RuntimeError: gone"})
    found.figures.append({"id": "import_seconds", "value": [0.1] * 3, "unit": "s", "status": "measured", "reason": ""})
    found.figures.append(
        {"id": "computed_per_true-joint-robot", "value": [1.3] * 3, "unit": "x", "status": "measured", "reason": ""}
    )
    for name, ratio in (("causal-128-forward", 30.0), ("local-512-dkv", 9.0)):
        ratios = {"id": f"process_mask-{name}", "value": [ratio] * 3, "unit": "x", "status": "measured", "reason": ""}
        found.figures.append(ratios)
    return found


# -- results ------------------------------------------------------------------------------------------------


def test_results_survive_a_file(measured: Any, tmp_path: Path) -> None:
    path = tmp_path / "new" / "result.json"
    measured.save(path)
    again = results.Results.load(path)
    assert again == measured
    wrong = results.variant(again.case("dispatcher-connection-forward-float32-d64-h4-b1-computer_use_2048_once"), OLD)
    assert wrong["status"] == "wrong"
    assert wrong["error"] is None  # NaN
    assert again.case("nothing") is None


def test_a_result_names_no_host_and_no_folder(measured: Any) -> None:
    text = json.dumps(measured.machine)
    assert platform.node() not in text
    assert str(Path.home()) not in text
    assert str(Path.cwd()) not in text
    assert {"device", "threads", "versions", "python"} <= measured.machine.keys()
    assert machine.slug({"kind": "cpu", "device": "AMD EPYC", "threads": 2}) == "cpu-amd-epyc-2-threads"
    assert machine.slug({"kind": "gpu", "device": "NVIDIA H200", "threads": 2}) == "gpu-nvidia-h200"


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ([], "must hold results"),
        ({"kind": "something", "format": 1}, "must hold results"),
        ({"kind": "canvas-engineering benchmarks", "format": 99}, "format must be 1, got 99"),
        ({"kind": "canvas-engineering benchmarks", "format": 1, "scale": "quick"}, "lacks builds, cases"),
    ],
)
def test_foreign_files_are_refused(content: Any, match: str, tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    path.write_text(json.dumps(content))
    with pytest.raises(SchemaError, match=match):
        results.Results.load(path)


def test_one_line_per_case(measured: Any) -> None:
    lines = [summary.case_line(case) for case in measured.cases]
    assert lines[0].endswith("-robot: 100 ms; masked SDPA 2.00x; flex_attention absent")
    assert lines[3].endswith("canvas-engineering 0.5.0 wrong")
    assert lines[-1].endswith("-multi_robot: wrong out: max error")
    wrong = {**measured.figures[0], "reason": "it loads torch"}
    assert summary.figure_line(wrong) == "import_seconds: 100 ms it loads torch"
    assert summary.figure_line(measured.figures[1]) == "computed_per_true-joint-robot: 1.30 ×"


@pytest.mark.parametrize(("status", "whole"), [(0, True), (1, True), (2, False), (3, False)])
def test_only_a_run_to_the_end_replaces_a_result(status: int, whole: bool, measured: Any, tmp_path: Path) -> None:
    """Status 1: a result was wrong. 2: interrupted. 3: pytest itself failed."""
    out = tmp_path / "result.json"
    out.write_text("before")
    recorder = conftest.Recorder(measured, "cpu", 1.0, out, {})
    recorder.save_partial()
    assert out.read_text() == "before"
    session = argparse.Namespace(config=argparse.Namespace(stash={conftest._RECORDER: recorder}))
    conftest.pytest_sessionfinish(session, status)
    assert (out.read_text() == "before") is not whole
    kept = out if whole else out.with_suffix(".partial")
    assert [path.name for path in sorted(tmp_path.iterdir())] == sorted({out.name, kept.name})
    assert len(results.Results.load(kept).cases) == len(measured.cases)


# -- targets ------------------------------------------------------------------------------------------------


def test_targets(measured: Any) -> None:
    found = {target.what: target for target in targets.targets(measured)}
    old = "AttentionDispatcher against canvas-engineering 0.5.0: "
    assert found[f"{old}robot, forward"].met is True
    assert found[f"{old}robot, training step"].met is False
    once = found[f"{old}computer use 2048 once, forward"]
    assert once.met is None
    assert once.measured.startswith("wrong: out: max error")
    assert found["Plan of 16,384 positions (joint)"].met is True
    assert found["Plan of 1,048,576 positions (joint)"].met is False
    assert found["Plan of 1,048,576 positions (joint), peak memory"].met is True
    assert found["import canvas_engineering"].met is True
    assert found["Computed pairs per true pair on the shipped canvases (joint)"].met is False
    process_mask = found["process_mask against JAX's own, 16,384 positions"]
    assert (process_mask.met, process_mask.measured) == (False, "9.0 × (local-512-dkv)")
    never = found["Never slower than masked SDPA on a shipped canvas: joint softmax, forward"]
    assert (never.met, never.measured) == (True, "2.00 × (robot)")
    slow = copy.deepcopy(measured)
    for ratio, met in (([0.8, 0.7, 0.9], False), ([0.97, 0.9, 1.01], True), ([0.02, 0.01, 15.0], False)):
        results.variant(slow.cases[0], MASKED)["ratio"] = ratio
        found = {target.what: target for target in targets.targets(slow)}
        assert found["Never slower than masked SDPA on a shipped canvas: joint softmax, forward"].met is met


# -- report -------------------------------------------------------------------------------------------------


def test_report(measured: Any, tmp_path: Path) -> None:
    folder, page, images = tmp_path / "results", tmp_path / "docs" / "page.md", tmp_path / "docs" / "images"
    measured.save(folder / "cpu.quick.json")
    (folder / "tables.json").write_text(
        json.dumps(
            {"title": "Tables", "tables": [{"title": "One", "columns": ["a", "b|c"], "rows": [["x|y", 1.23456]]}]}
        )
    )
    (folder / "rows.json").write_text(json.dumps({"rows": [{"target": "v5e", "splash": {"bundles": 7}}, {"ratio": 1}]}))
    (folder / "other.json").write_text(json.dumps({"b": 1, "a": 2}))
    (folder / "list.json").write_text("[]")
    written = report.write_report(page, images, folder)
    text = page.read_text()
    assert written[0] == page
    assert {path.name.rsplit("_", 1)[1] for path in written[1:]} == {
        "canvases.png",
        "length.png",
        "sparsity.png",
        "roofline.png",
        "build.png",
    }
    for path in written[1:]:
        assert path.read_bytes().startswith(b"\x89PNG")
        assert f"](images/{path.name})" in text
    assert "`bench/results/cpu.quick.json`, 2026-01-02, revision 0123456789." in text
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    assert ["robot", "100 ms (95 ms – 105 ms)", "2.50 ×", "2.00 ×", "200 ms, 2.00 × (1.80 – 2.20)", "-"] in cells
    assert ["multi robot, batch 8", "*wrong*", "", "", "", ""] in cells
    assert [FLEX, "absent: no compiler", "attention joint forward robot"] in cells
    assert [OLD, "wrong: out: max error 1e-1, at most 1e-6"] in [cell[:2] for cell in cells]
    assert ["1,048,576", "12 s, 2.0 MiB", "-", "-", "-", "-"] in cells
    assert ["robot", "attention, joint, forward", "plan 10 ms"] in cells
    assert ["robot", "attention, joint, forward", "3.0", "3.0", "", ""] in cells  # MiB of ours and SDPA
    assert "Backend of canvas-engineering there: portable." in text
    gaps = text[text.index("### Where others are faster") : text.index("### Furthest above")]
    assert "sparse 10" in gaps
    assert "0.50 × (0.45 – 0.55)" in gaps
    assert "length" not in gaps
    assert ["canvas-engineering", "failed: RuntimeError: gone", "test_case[lost]"] in cells
    assert any(cell[:1] == ["target"] and "splash bundles" in cell for cell in cells)
    assert "x\\|y" in text
    assert "1.235" in text
    assert "Not rendered; it holds a, b." in text
    assert "Not rendered: a list." in text
    assert "**no**" in text
    assert ["process_mask-local-512-dkv", "9.00 ×", "9.00 ×", "9.00 ×"] in cells
    assert ["import_seconds", "100 ms", "100 ms", "100 ms"] in cells

    before = {path: path.read_bytes() for path in written}
    report.write_report(page, images, folder)
    assert before == {path: path.read_bytes() for path in written}


def test_report_without_results(tmp_path: Path) -> None:
    assert report.write_report(tmp_path / "page.md", tmp_path / "images", tmp_path / "none") == [tmp_path / "page.md"]
    assert "No results yet." in (tmp_path / "page.md").read_text()


# -- compare ------------------------------------------------------------------------------------------------


def by_id(changes: list[Any]) -> dict[str, Any]:
    return {change.id: change for change in changes}


def test_compare_flags_what_is_beyond_the_noise(measured: Any) -> None:
    now = copy.deepcopy(measured)
    joint = "attention-joint-forward-float32-d64-h4-b1-robot"
    assert {change.verdict for change in compare.compare(measured, now)} == {"same"}
    now.cases[0]["variants"][0]["seconds"] = [0.13, 0.12, 0.14]
    now.cases[1]["variants"][0]["seconds"] = [0.07, 0.06, 0.08]
    now.cases[2]["variants"][0]["seconds"] = [0.36, 0.3, 0.5]  # slower, but within the noise
    now.cases[4]["variants"][0]["seconds"] = [0.108, 0.107, 0.109]  # beyond the noise, but little
    del now.cases[5]
    now.builds[0]["canvas"] = "length_other"
    found = by_id(compare.compare(measured, now))
    assert found[joint].verdict == "slower"
    assert found[joint].factor == pytest.approx(1.3)
    assert found["dispatcher-connection-forward-float32-d64-h4-b1-robot"].verdict == "faster"
    assert found["dispatcher-connection-step-float32-d64-h4-b1-robot"].verdict == "same"
    assert found["attention-joint-forward-float32-d64-h4-b1-length_1x32x32"].verdict == "same"
    assert found["attention-joint-forward-float32-d64-h4-b1-sparse_10"].verdict == "gone"
    assert found["build-plan, joint-length_2048"].verdict == "gone"
    assert found["build-plan, joint-length_other"].verdict == "new"
    assert found["import_seconds"].verdict == "same"
    assert not any("create_block_mask" in name for name in found)


def test_compare_takes_a_busy_machine_into_account(measured: Any) -> None:
    now = copy.deepcopy(measured)
    now.ceilings["float32"]["matmul"] /= 2
    now.cases[0]["variants"][0]["seconds"] = [0.2, 0.19, 0.21]
    assert by_id(compare.compare(measured, now))[measured.cases[0]["id"]].verdict == "same"


@pytest.mark.parametrize(("key", "value", "what"), [("device", "another", "device"), ("threads", 64, "threads")])
def test_compare_refuses_another_machine(measured: Any, key: str, value: Any, what: str) -> None:
    other = copy.deepcopy(measured)
    other.machine[key] = value
    with pytest.raises(CanvasError, match=f"results must be of one {what} to be compared"):
        compare.compare(measured, other)


def test_compare_refuses_another_scale(measured: Any) -> None:
    other = copy.deepcopy(measured)
    other.scale = "full"
    with pytest.raises(CanvasError, match="results must be of one scale to be compared, got 'quick' and 'full'"):
        compare.compare(measured, other)


def test_committed_results_are_read_from_git(measured: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    measured.save(tmp_path / "bench" / "results" / "one.json")

    def git(*arguments: str) -> None:
        identity = ["-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false"]
        subprocess.run(["git", "-C", str(tmp_path), *identity, *arguments], check=True, capture_output=True)

    git("init", "-q")
    git("add", "bench")
    git("commit", "-q", "-m", "results")
    ask = results.git
    monkeypatch.setattr(compare, "git", lambda *arguments: ask(*arguments, folder=tmp_path))
    assert compare.committed(Path("elsewhere/one.json")) == measured
    assert compare.committed(Path("two.json")) is None
    assert compare.committed(Path("one.json"), "no-such-revision") is None


# -- command line -------------------------------------------------------------------------------------------


def run(*words: str) -> int:
    parser = argparse.ArgumentParser()
    command.add_parser(parser.add_subparsers())
    arguments = parser.parse_args(["bench", *words])
    status: int = arguments.command(arguments)
    return status


def test_outside_of_a_checkout(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    installed = tmp_path / "site-packages" / "canvas_engineering" / "__init__.py"
    monkeypatch.setattr(command.canvas_engineering, "__file__", str(installed))
    monkeypatch.chdir(tmp_path)
    for action in ("run", "report", "compare"):
        with pytest.raises(CanvasError, match="part of the repository, not of the installed package: run this in a"):
            run(action)
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "measure.py").touch()
    assert command.checkout() == tmp_path


def test_run_starts_pytest(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    started: list[list[str]] = []
    status = 0

    def fake(words: list[str], **_: Any) -> Any:
        started.append(words)
        return argparse.Namespace(returncode=status)

    monkeypatch.setattr(command.subprocess, "run", fake)
    assert run("run") == 0
    assert started[-1][:3] == [sys.executable, "-m", "pytest"]
    assert started[-1][-3:] == ["--bench-scale", "quick", "--bench-save"]
    assert run("run", "--full", "--only", "robot", "--threads", "1") == 0
    assert started[-1][-6:] == ["--bench-scale", "full", "--bench-threads", "1", "-k", "robot"]
    run("run", "--out", str(tmp_path / "x.json"))
    assert started[-1][-2:] == ["--bench-out", str(tmp_path / "x.json")]
    status = 1
    assert run("run") == 1
    status = 5
    with pytest.raises(CanvasError, match="pytest ended with status 5"):
        run("run", "--only", "nothing")


@pytest.mark.parametrize("threads", ["0", "-1", "two"])
def test_threads_must_be_positive(threads: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run("run", f"--threads={threads}")
    assert f"must be a positive number, got {threads!r}" in capsys.readouterr().err


def test_run_needs_pytest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pytest_benchmark", None)
    with pytest.raises(MissingDependencyError, match="dev"):
        run("run")


def test_compare_command(measured: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    measured.save(tmp_path / "before.json")
    measured.cases[0]["variants"][0]["seconds"] = [0.2, 0.19, 0.21]
    measured.save(tmp_path / "after.json")
    before, after = str(tmp_path / "before.json"), str(tmp_path / "after.json")
    assert run("compare", before, "--against", before) == 0
    assert "the same as in" in capsys.readouterr().out
    assert run("compare", after, "--against", before) == 1
    out = capsys.readouterr().out
    assert "slower  100 ms  200 ms  2.00 x  attention-joint-forward" in out
    assert run("compare", after, "--against", before, "--json") == 1
    changes = json.loads(capsys.readouterr().out)["after.json"]
    assert [one["verdict"] for one in changes].count("slower") == 1
    assert run("compare", after) == 0
    assert "after.json: nothing to compare with in HEAD" in capsys.readouterr().out


def test_compare_without_results(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    assert run("compare") == 0
    assert "no results to compare" in capsys.readouterr().out


def test_report_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(report, "write_report", lambda: [Path("docs/benchmarks.md")])
    assert run("report") == 0
    assert capsys.readouterr().out == "written: docs/benchmarks.md\n"


def test_one_case_from_the_command_to_the_page(tmp_path: Path) -> None:
    """The whole way in a process of its own: pytest, gate, clock, file."""
    out = tmp_path / "result.json"
    wanted = "attention-connection-forward-float32-d64-h4-b1-robot or length_8x16x16-create_block_mask"
    words = ["run", "--only", wanted, "--threads", "1", "--out", str(out)]
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT, *words], cwd=root, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = results.Results.load(out)
    assert [one["id"] for one in found.cases] == ["attention-connection-forward-float32-d64-h4-b1-robot"]
    assert [one["status"] for one in found.cases[0]["variants"]] == ["measured", "measured"]
    assert [one["builder"] for one in found.builds] == ["create_block_mask"]
    assert found.ceilings["float32"]["matmul"] > 0
    assert found.machine["threads"] == 1
    assert found.failures == []
    assert len(found.took) == 2
    assert not out.with_suffix(".partial").exists()
    assert "[1/2 0:0" in done.stdout
    assert "attention-connection-forward-float32-d64-h4-b1-robot: " in done.stderr + done.stdout


_SCRIPT = """
import argparse, sys
from canvas_engineering.cli import bench
parser = argparse.ArgumentParser()
bench.add_parser(parser.add_subparsers())
arguments = parser.parse_args(["bench", *sys.argv[1:]])
sys.exit(arguments.command(arguments))
"""
