"""The single numbers."""

from __future__ import annotations

from pytest_benchmark.fixture import BenchmarkFixture

from bench import figures
from bench.conftest import Recorder
from bench.summary import figure_line


def test_import_time(benchmark: BenchmarkFixture, recorder: Recorder) -> None:
    _keep(recorder, [benchmark.pedantic(figures.import_time)])


def test_attention_mask(benchmark: BenchmarkFixture, recorder: Recorder) -> None:
    _keep(recorder, [benchmark.pedantic(figures.attention_mask)])


def test_computed_per_true(benchmark: BenchmarkFixture, recorder: Recorder) -> None:
    _keep(recorder, benchmark.pedantic(figures.computed_per_true))


def _keep(recorder: Recorder, found: list[dict[str, object]]) -> None:
    recorder.results.figures += found
    for figure in found:
        recorder.lines.append(figure_line(figure))
        assert figure["status"] == "measured", figure["reason"]
