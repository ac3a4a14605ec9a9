"""Building plans and masks, from 2,048 to 1,048,576 positions."""

from __future__ import annotations

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from bench.build_cost import BUILDERS, PATIENCE, build, canvases
from bench.conftest import Recorder
from canvas_engineering.cli.output import seconds as readable


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "canvas" in metafunc.fixturenames:
        names = canvases(metafunc.config.getoption("--bench-scale"))
        metafunc.parametrize("canvas", names)


@pytest.mark.parametrize("builder", BUILDERS)
def test_build(canvas: str, builder: str, benchmark: BenchmarkFixture, recorder: Recorder) -> None:
    benchmark.group = f"build, {canvas}"
    earlier = [row for (name, _), row in recorder.built.items() if name == builder]

    def seconds() -> list[float]:
        return [] if benchmark.stats is None else list(benchmark.stats.stats.data)

    row = build(
        canvas,
        builder,
        earlier[-1] if earlier else None,
        PATIENCE[recorder.scale],
        benchmark.pedantic,
        seconds,
        recorder.device,
    )
    recorder.built[builder, canvas] = row
    recorder.results.builds.append(row.as_dict())
    took = readable(row.seconds[0]) if row.seconds else f"{row.status}: {row.reason}"
    recorder.lines.append(f"build {canvas}, {builder}: {took}")
    if row.status in ("absent", "failed"):
        pytest.skip(f"{row.status}: {row.reason}")
    assert row.status == "measured", row.reason
