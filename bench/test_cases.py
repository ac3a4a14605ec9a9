"""Attention and dispatcher on every canvas, against everyone."""

from __future__ import annotations

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from bench import machine
from bench.cases import Case, cases
from bench.conftest import Recorder
from bench.measure import measure


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        option = metafunc.config.getoption
        found = cases(option("--bench-scale"), machine.kind(option("--bench-device")))
        metafunc.parametrize("case", found, ids=[case.id for case in found])


def test_case(case: Case, benchmark: BenchmarkFixture, recorder: Recorder) -> None:
    benchmark.group = f"{case.level}, {case.scope} softmax, {case.phase}"

    def seconds() -> list[float]:
        return [] if benchmark.stats is None else list(benchmark.stats.stats.data)

    row, variants = measure(case, benchmark.pedantic, seconds, device=recorder.device, budget=recorder.budget)
    if benchmark.stats is not None or variants[0].status == "wrong":
        recorder.add_case(row, variants)
        benchmark.extra_info["ratios"] = {one.name: one.ratio for one in variants if one.ratio is not None}
    assert variants[0].status == "measured", f"{case.id}: {variants[0].reason}"
