"""Collects what the benchmarks measure and writes it down at the end of the session."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import machine
from bench.build_cost import Built
from bench.cases import Scale
from bench.peers import old_release
from bench.progress import Progress
from bench.results import FOLDER, Measured, Results, commit, today
from bench.roofline import Ceilings, measure_ceilings
from bench.summary import case_line
from bench.targets import targets
from canvas_engineering.cli.output import table
from canvas_engineering.errors import SchemaError

#: Files whose benchmarks take long and have no place in the quick run.
FULL_ONLY = ("bench_mask_info.py",)


@dataclass
class Recorder:
    """What the session has measured so far."""

    results: Results
    device: str
    budget: float
    out: Path | None
    built: dict[tuple[str, str], Built]
    ceilings: dict[str, Ceilings] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)
    progress: Progress | None = None
    commit: str | None = field(default_factory=commit)

    @property
    def scale(self) -> Scale:
        return "full" if self.results.scale == "full" else "quick"

    def add_case(self, row: dict[str, Any], variants: list[Measured]) -> None:
        self.results.add_case(row, variants)
        self.lines.append(case_line(self.results.cases[-1]))
        dtype = row["dtype"]
        self.ceilings[dtype] = measure_ceilings(self.device, dtype).at_least(self.ceilings.get(dtype))

    @property
    def partial(self) -> Path | None:
        """Where a run in progress keeps what it has, in case that it is killed."""
        return None if self.out is None else self.out.with_suffix(".partial")

    def save_partial(self) -> None:
        if self.partial is not None and self._complete():
            self.results.save(self.partial)

    def save(self) -> None:
        if self.out is not None and self.partial is not None and self._complete():
            self.results.save(self.out)
            self.partial.unlink(missing_ok=True)

    def _complete(self) -> bool:
        """Fill in what belongs to the run as a whole; whether there is anything to save."""
        results = self.results
        results.day, results.commit = today(), self.commit
        results.ceilings = {dtype: self.ceilings[dtype].as_dict() for dtype in sorted(self.ceilings)}
        return bool(results.cases or results.builds or results.figures)


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("canvas-engineering benchmarks")
    group.addoption("--bench-scale", choices=("quick", "full"), default="quick", help="how much to measure")
    group.addoption("--bench-device", default="cpu", help="torch device of the tensors")
    group.addoption("--bench-out", type=Path, help="file for the results")
    group.addoption("--bench-save", action="store_true", help="write the results to bench/results/")
    group.addoption("--bench-threads", type=int, help="threads that torch may use; all cores where omitted")


def pytest_configure(config: pytest.Config) -> None:
    threads = config.getoption("--bench-threads")
    if threads is not None:
        torch.set_num_threads(threads)
    device = config.getoption("--bench-device")
    results = Results(config.getoption("--bench-scale"), machine.describe(device))
    budget = 1.5 if results.scale == "quick" else 6.0
    out = config.getoption("--bench-out")
    if out is None and config.getoption("--bench-save"):
        out = default_path(results)
    config.stash[_RECORDER] = Recorder(results, device, budget, out, {})


def default_path(results: Results) -> Path:
    """Where the result of this device and scale is kept."""
    return FOLDER / f"{machine.slug(results.machine)}-{results.scale}.json"


_RECORDER = pytest.StashKey[Recorder]()


@pytest.fixture(scope="session")
def recorder(request: pytest.FixtureRequest) -> Iterator[Recorder]:
    yield request.config.stash[_RECORDER]
    old_release.stop()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here not in item.path.parents:
            continue
        quick = config.getoption("--bench-scale") == "quick"
        # Other people's packages may warn; and one case that hangs must not keep the others.
        item.add_marker(pytest.mark.filterwarnings("default"))
        item.add_marker(pytest.mark.timeout(900 if quick else 3600))
        if item.path.name in FULL_ONLY and quick:
            item.add_marker(pytest.mark.skip(reason="part of the full run"))


def pytest_collection_finish(session: pytest.Session) -> None:
    if not session.config.option.collectonly:
        recorder = _recorder(session.config)
        recorder.progress = Progress([item.nodeid for item in session.items], _seconds_before(recorder))
        _running[:] = [recorder]


def _seconds_before(recorder: Recorder) -> dict[str, float]:
    """What the tests took in the last run on this device, by node id."""
    path = default_path(recorder.results)
    try:
        return Results.load(path).took if path.exists() else {}
    except SchemaError:  # of another format
        return {}


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    for recorder in _running:
        took = recorder.results.took
        took[report.nodeid] = round(took.get(report.nodeid, 0.0) + report.duration, 3)
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            lines = str(report.longrepr if crash is None else crash.message).split("\n")
            recorder.results.failures.append({"id": report.nodeid.split("::")[-1], "reason": lines[0][:300]})
            recorder.lines.append(f"{report.nodeid}: FAILED, {lines[0][:300]}")


def pytest_runtest_logfinish(nodeid: str, location: tuple[str, int | None, str]) -> None:
    # Only here, between two tests, does pytest not capture what is written.
    for recorder in _running:
        if recorder.progress is not None:
            recorder.progress.step(nodeid)
            while recorder.lines:
                recorder.progress.write(recorder.lines.pop(0))
        recorder.save_partial()


def pytest_report_teststatus(report: Any, config: pytest.Config) -> tuple[str, str, str] | None:
    """No dots: the bar shows how far it is."""
    if report.when == "call" and (report.passed or report.failed):
        return report.outcome, "", report.outcome.upper()
    return ("skipped", "", "SKIPPED") if report.skipped else None


#: The recorder of the session in progress; the hook above is not told which one that is.
_running: list[Recorder] = []


def _recorder(config: pytest.Config) -> Recorder:
    return config.stash[_RECORDER]


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    recorder = _recorder(session.config)
    if recorder.progress is not None:
        recorder.progress.close()
    # An interrupted run leaves its partial file, and does not replace a whole result.
    if exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        recorder.save()


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    recorder = _recorder(config)
    promised = targets(recorder.results)
    if promised:
        met = {True: "yes", False: "NO", None: "-"}
        rows = [(met[one.met], one.wanted, one.measured, one.what) for one in promised]
        terminalreporter.write_line(table(("met", "promised", "measured", ""), rows))
    for path in (recorder.out, recorder.partial):
        if path is not None and path.exists():
            terminalreporter.write_line(f"written: {path}")
