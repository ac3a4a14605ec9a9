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
from bench.results import FOLDER, Measured, Results, commit, today
from bench.roofline import Ceilings, measure_ceilings
from bench.summary import case_line

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
    bar: Any = None

    @property
    def scale(self) -> Scale:
        return "full" if self.results.scale == "full" else "quick"

    def add_case(self, row: dict[str, Any], variants: list[Measured]) -> None:
        self.results.add_case(row, variants)
        self.lines.append(case_line(self.results.cases[-1]))
        dtype = row["dtype"]
        self.ceilings[dtype] = measure_ceilings(self.device, dtype).at_least(self.ceilings.get(dtype))


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
        out = FOLDER / f"{machine.slug(results.machine)}-{results.scale}.json"
    config.stash[_RECORDER] = Recorder(results, device, budget, out, {})


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
        # Other people's packages may warn, and a full run takes longer than a test may.
        item.add_marker(pytest.mark.filterwarnings("default"))
        item.add_marker(pytest.mark.timeout(3600))
        if item.path.name in FULL_ONLY and config.getoption("--bench-scale") == "quick":
            item.add_marker(pytest.mark.skip(reason="part of the full run"))


def pytest_collection_finish(session: pytest.Session) -> None:
    from tqdm import tqdm

    if not session.config.option.collectonly:
        # disable=None: no bar where standard error is no terminal
        bar = tqdm(total=len(session.items), unit="case", dynamic_ncols=True, disable=None)
        _recorder(session.config).bar = bar
        _running[:] = [_recorder(session.config)]


def pytest_runtest_logfinish(nodeid: str, location: tuple[str, int | None, str]) -> None:
    # Only here, between two tests, does pytest not capture what is written.
    for recorder in _running:
        recorder.bar.update()
        while recorder.lines:
            recorder.bar.write(recorder.lines.pop(0))


def pytest_report_teststatus(report: Any, config: pytest.Config) -> tuple[str, str, str] | None:
    """No dots: the bar shows how far it is."""
    if report.when == "call" and report.passed:
        return "passed", "", "PASSED"
    return None


#: The recorder of the session in progress; the hook above is not told which one that is.
_running: list[Recorder] = []


def _recorder(config: pytest.Config) -> Recorder:
    return config.stash[_RECORDER]


def pytest_sessionfinish(session: pytest.Session) -> None:
    recorder = _recorder(session.config)
    if recorder.bar is not None:
        recorder.bar.close()
    results = recorder.results
    if recorder.out is None or not (results.cases or results.builds or results.figures):
        return
    results.day, results.commit = today(), commit()
    results.ceilings = {dtype: recorder.ceilings[dtype].as_dict() for dtype in sorted(recorder.ceilings)}
    results.save(recorder.out)
