"""``canvas-engineering compile --backend triton``: the report, the plan it compiles for, and what is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from cli_refusals import refused

from canvas_engineering import BlockSparsePlan, CanvasSchema
from canvas_engineering.cli.main import main
from canvas_engineering.kernels.triton import config
from canvas_engineering.kernels.triton.config import Table, Tile

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("this process interprets its kernels (TRITON_INTERPRET=1)", allow_module_level=True)

ROBOT = Path(__file__).resolve().parents[1] / "examples" / "canvases" / "robot.json"
TRITON = ["compile", "--backend", "triton", "--target", "sm_90"]


@pytest.fixture
def variants(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What would be compiled; nothing is."""
    from canvas_engineering.kernels.triton import aot

    seen: list[Any] = []

    def report(kernel: str, variant: Any, dtype: str, target: str, config: Any = None) -> aot.KernelReport:
        seen.append(variant)
        return aot.KernelReport(
            kernel, 128, 0, 1024, 232_448, 0, "wgmma", 8, 0, variant.block_q, variant.block_kv, 64, 32, 4, 2
        )

    monkeypatch.setattr(aot, "report", report)
    return seen


def test_a_canvas_is_compiled_for_a_gpu_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [*TRITON, "--head-dim", "64", "--dtype", "bfloat16", "--plan", str(ROBOT)]
    assert main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [kernel["name"] for kernel in found["kernels"]] == ["forward", "backward_q", "backward_kv", "delta"]
    for kernel in found["kernels"]:
        assert kernel["stack_bytes"] == 0
        assert 0 < kernel["registers"] <= 255
        assert 0 <= kernel["shared_bytes"] <= 232_448
        # Its tiles are small, and small blocks take the older instruction.
        assert (kernel["wgmma"] + kernel["mma"] > 0) == (kernel["name"] != "delta")
    assert main(arguments) == 0
    text = capsys.readouterr().out
    header = text.splitlines()[0].split("  ")
    names = [name.strip() for name in header if name.strip()]
    assert names == [
        "kernel",
        "registers",
        "stack",
        "shared memory",
        "wgmma",
        "mma",
        "tile",
        "block",
        "warps",
        "stages",
    ]
    for kernel in found["kernels"]:
        (line,) = [line for line in text.splitlines() if line.startswith(kernel["name"] + " ")]
        assert f" {kernel['registers']} " in line
        assert f"{kernel['shared_bytes']:,} of 232,448 B" in line
    assert text.splitlines()[-1] == found["sentence"]


def test_auto_tile_sizes_come_from_the_table_of_the_target(
    variants: list[Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = config.shipped_table

    def shipped(architecture: str) -> Table:
        table = real("sm_90")
        fast = (32, 128) if architecture == "sm_80" else (128, 32)
        return Table(architecture, "a test", table.kernels, {Tile(64, "float16", *fast): 1.0})

    monkeypatch.setattr(config, "shipped_table", shipped)
    for target, tile in (("sm_80", (32, 128)), ("sm_90", (128, 32))):
        variants.clear()
        assert (
            main(["compile", "--backend", "triton", "--target", target, "--head-dim", "64", "--plan", str(ROBOT)]) == 0
        )
        assert {(variant.block_q, variant.block_kv) for variant in variants} == {tile}
    variants.clear()
    assert main([*TRITON, "--head-dim", "64", "--plan", str(ROBOT), "--block-q", "64"]) == 0
    assert {(variant.block_q, variant.block_kv) for variant in variants} == {(64, 32)}


def test_a_plan_file_keeps_its_tiles(variants: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    schema = CanvasSchema.from_json(ROBOT)
    assert schema.topology is not None
    plan = BlockSparsePlan.from_topology(schema.topology, schema.layout, softmax="joint", block_q=48, block_kv=24)
    path = tmp_path / "robot.plan"
    plan.save(path)
    assert main([*TRITON, "--plan", str(path)]) == 0
    assert {(variant.block_q, variant.block_kv) for variant in variants} == {(48, 24)}
    assert {(variant.contiguous, variant.many_sets) for variant in variants} == {(plan.is_contiguous, False)}


def test_kernels_that_do_not_fit_end_with_status_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from canvas_engineering.kernels.triton import aot

    monkeypatch.setattr(
        aot,
        "report",
        lambda kernel, *_: aot.KernelReport(kernel, 255, 8, 0, 1, 0, "wgmma", 1, 0, 64, 64, 64, 64, 4, 2),
    )
    assert main(TRITON) == 1
    assert "No: sm_90, bfloat16, head_dim 128" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--target", "sm_70"], "target must be one of sm_80, sm_90, sm_100, gfx942, got 'sm_70'"),
        (["--target", "v5e"], "target must be one of sm_80, sm_90, sm_100, gfx942, got 'v5e'"),
        (["--dtype", "float64"], "dtype must be one of float16, bfloat16, float32, got 'float64'"),
        (["--head-dim", "7"], "head_dim must be from 8 to 256, got 7"),
        (["--head-dim", "512", "--plan", str(ROBOT)], "head_dim must be from 8 to 256, got 512"),
        (["--plan", "missing.json"], "missing.json: No such file or directory"),
        (
            ["--block-q", "64"],
            "--softmax, --block-q and --block-kv say how the canvas of --plan is compiled, got no --plan",
        ),
    ],
)
def test_refusals(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert refused([*TRITON, *arguments], capsys) == f"error: {message}"


def test_without_triton(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("canvas_engineering._optional.installed", lambda name: name != "triton")
    assert refused(TRITON, capsys) == (
        "error: compiling for a GPU needs the package 'triton', which is not installed: "
        "pip install 'canvas-engineering[triton]'"
    )


def test_under_the_interpreter() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "canvas_engineering.cli.main", *TRITON],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "error: compiling needs a process that does not interpret its kernels: unset TRITON_INTERPRET, got "
        "TRITON_INTERPRET=1\n"
    )
