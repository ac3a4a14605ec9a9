"""``canvas-engineering compile --backend pallas``: answers, refusals, and real compilation by libtpu."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from equivalence.build import plan_from_dense

from canvas_engineering import _optional
from canvas_engineering.cli.main import main
from canvas_engineering.errors import BackendError, MissingDependencyError
from canvas_engineering.kernels.pallas import aot, backend, lowering
from canvas_engineering.kernels.pallas.aot import compile_report, example_plan
from canvas_engineering.kernels.pallas.aot_worker import TARGETS
from canvas_engineering.kernels.pallas.schedule import read_schedule
from canvas_engineering.kernels.pallas.tiles import TPU_TILES
from canvas_engineering.plan import BlockSparsePlan

ROBOT = Path(__file__).parents[1] / "examples" / "canvases" / "robot.json"
KERNELS = ("forward", "dq", "dkv")
NUMBERS = ("bundles", "total_bundles", "vmem_bytes", "smem_bytes", "argument_bytes", "output_bytes", "temp_bytes")


def small_plan() -> BlockSparsePlan:
    return example_plan(128, 128, tiles=2)


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Any]]:
    """Instead of libtpu: an answer with small numbers, changed as asked for. Returns the requests made."""

    def install(**changes: Any) -> list[Any]:
        requests: list[Any] = []

        def answer(target: str, head_dim: int, dtype: str, plan: BlockSparsePlan) -> list[dict[str, Any]]:
            requests.append((target, head_dim, dtype, plan))
            sizes = {"block_q": plan.block_q, "block_kv": plan.block_kv}
            return [{"name": name, **sizes, **dict.fromkeys(NUMBERS, 2048), **changes} for name in KERNELS]

        monkeypatch.setattr(aot, "_compile_elsewhere", answer)
        monkeypatch.setattr(aot, "require", lambda *_: None)
        return requests

    return install


# -- answers ------------------------------------------------------------------------------------------------


def test_a_plan_that_fits(compiled: Any, capsys: pytest.CaptureFixture[str]) -> None:
    requests = compiled()
    assert main(["compile", "--backend", "pallas", "--target", "v5e", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [kernel["name"] for kernel in report["kernels"]] == list(KERNELS)
    assert report["fits"] is True
    assert report["sentence"] == (
        "Yes: 16,384 x 16,384 tokens in tiles of 512 x 512, bfloat16, head_dim 128: one head needs 6.0 KiB of the "
        "16.0 GiB of a v5e, and its kernels 2.0 KiB of vector memory and 2.0 KiB of scalar memory."
    )
    assert requests[0][:3] == ("v5e", 128, "bfloat16")


def test_a_plan_that_memory_does_not_hold(compiled: Any, capsys: pytest.CaptureFixture[str]) -> None:
    compiled(argument_bytes=17 * 2**30)
    assert main(["compile", "--backend", "pallas", "--target", "v5e"]) == 1
    out = capsys.readouterr().out
    assert "argument bytes" in out
    assert "No: 16,384 x 16,384 tokens" in out
    assert "one head needs 17.0 GiB of the 16.0 GiB of a v5e" in out
    assert main(["compile", "--backend", "pallas", "--target", "v6e"]) == 0


def test_a_kernel_that_the_compiler_refuses(compiled: Any, capsys: pytest.CaptureFixture[str]) -> None:
    compiled(error="RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem.\nmore\n")
    assert main(["compile", "--backend", "pallas", "--target", "tpu7x"]) == 1
    wanted = "dq: RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem."
    assert wanted in capsys.readouterr().out


def test_a_schema_is_compiled_with_tiles_that_a_tpu_takes(compiled: Any) -> None:
    requests = compiled()
    assert main(["compile", "--backend", "pallas", "--target", "v5e", "--plan", str(ROBOT)]) == 0
    plan = requests[0][3]
    assert (plan.block_q, plan.block_kv) in TPU_TILES
    assert plan.num_q == 320


def test_a_plan_file(compiled: Any, tmp_path: Path) -> None:
    requests = compiled()
    plan = small_plan()
    plan.save(tmp_path / "a.plan")
    assert main(["compile", "--backend", "pallas", "--target", "v5p", "--plan", str(tmp_path / "a.plan")]) == 0
    assert requests[0][3].digest == plan.digest


def test_tiles_that_no_tpu_takes(compiled: Any, capsys: pytest.CaptureFixture[str]) -> None:
    requests = compiled()
    asked = ["--plan", str(ROBOT), "--block-q", "8", "--block-kv", "64", "--json"]
    assert main(["compile", "--backend", "pallas", "--target", "v5e", *asked]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["kernels"] == []
    assert "block_q must be a multiple of 16 on a TPU for bfloat16, got 8; block_kv must be a m" in report["sentence"]
    assert not requests


def test_a_tile_with_too_many_entries(compiled: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled()
    monkeypatch.setattr(lowering, "LIST_BYTES", 4)
    report = compile_report(
        "v5e", 64, "float32", plan_from_dense(np.ones((1, 16, 300), bool), block_q=16, block_kv=128)
    )
    assert not report["fits"]
    assert (
        "the entries of one q tile must fit into 4 bytes of TPU scalar memory: at most 1 entries, got 3"
        in (report["sentence"])
    )


# -- no answer ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--target", "v4"), "target must be one of v5e, v5p, v6e, tpu7x, got 'v4'"),
        (("--target", "v5e", "--dtype", "float16"), "dtype must be one of bfloat16, float32, got 'float16'"),
        (("--target", "v5e", "--head-dim", "257"), "head_dim must be an integer from 1 to 256, got 257"),
        (("--target", "v5e", "--plan", "missing.plan"), "missing.plan"),
    ],
)
def test_bad_input(options: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compile", "--backend", "pallas", *options]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("package", ["jax", "libtpu"])
def test_a_missing_package(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = _optional.installed
    monkeypatch.setattr(_optional, "installed", lambda name: name != package and (name == "libtpu" or found(name)))
    monkeypatch.setattr(_optional.importlib, "import_module", lambda name: None)
    with pytest.raises(
        MissingDependencyError,
        match=rf"compiling for a TPU needs the package '{package}', .*pip install 'canvas-engineering\[tpu\]'",
    ):
        compile_report("v5e", 128, "bfloat16", small_plan())


def test_a_jax_that_is_too_old(compiled: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import jax

    compiled()
    monkeypatch.setattr(backend, "MIN_JAX", (99, 0))
    with pytest.raises(BackendError, match=rf"compiling for a TPU needs jax >= 99\.0, got {jax.__version__}"):
        compile_report("v5e", 128, "bfloat16", small_plan())
    ok, reason = backend.availability()
    assert not ok
    assert reason.startswith("needs jax >= 99.0, got ")


def test_a_crash_of_the_compiler_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aot, "require", lambda *_: None)
    monkeypatch.setattr(aot.sys, "executable", "/bin/false")
    with pytest.raises(BackendError, match="compiling for v5e must succeed, got exit status 1: no message"):
        compile_report("v5e", 128, "bfloat16", small_plan())


# -- the compiler's files -----------------------------------------------------------------------------------

_PASS = """  #allocation0 [shape = 'u8[8192]{0}', space=vmem, size = 0x2000, scoped, tag = 'input window']
  #allocation1_spill [shape = 'u8[4096]{0}', space=vmem, size = 0x1000, scoped]
  #allocation2 [shape = 'u32[]', space=smem, size = 0x4, offset = 0x4]
"""
_FINAL = """= control target key start
LH: loop header
= control target key end

     0   :  { %s1 = inlined_call_operand.hbm [shape: s32[4], index: 0, kind: input, shape index: {}] }
   0x1 LB: > { %p1 = scmp.ne.s32.totalorder %s1, 0 }
   0x2   : > { %2 = sbr.rel (%p1) target = $region8 }
   0x3   : > { %v1 = vmatmul.mubr.f32.gmra.mxu0 %v0; %v2 = vmatpush %v0
     /* a comment over two lines */ }
   0x4   : > { %v3 = vadd.f32 %v1, %v2 }
   0x5 PF: > { /* Start region 8 */ %3 = sbr.rel (%p2) target = $region9 }
   0x6   : > { %v4 = vmatmul.mubr.f32.gmra.mxu0 %v0;  %v9 = vmatprep.mubr.f32.mxu0 0.0 }
   0x7 PF: > { /* Start region 9 */ %4 = sbr.rel (%p3) target = $region10 }
   0x8   : > { %v5 = vst %v0 }
   0x9 PF: > { /* Start region 10 */ %5 = sbr.rel (!%p1) target = $region1 }
   0xa   :  { %6 = vsyncpa 0 }
"""


def test_reading_a_schedule(tmp_path: Path) -> None:
    (tmp_path / "7-canvas_attention_dq.1-05-allocated.txt").write_text(_PASS)
    (tmp_path / "7-canvas_attention_dq.1-09-final_bundles.txt").write_text(_FINAL)
    (tmp_path / "7-canvas_attention_dkv.1-09-final_bundles.txt").write_text("")
    schedule = read_schedule(tmp_path, "canvas_attention_dq")
    # The loop has 9 bundles. Of the two ways with products (2 and 1 bundles) one is taken, the longer; the branch
    # over the store is no part of a step between the first and the last of a tile.
    assert (schedule.bundles, schedule.total_bundles) == (7, 11)
    assert (schedule.vmem_bytes, schedule.smem_bytes) == (0x3000, 4)
    with pytest.raises(BackendError, match=r"libtpu must have written a schedule of the kernel 'other', got none"):
        read_schedule(tmp_path, "other")


# -- for real -----------------------------------------------------------------------------------------------


def check(report: dict[str, Any], head_dim: int, dtype: str, plan: BlockSparsePlan) -> None:
    """Every number is there, and those that can be computed are right."""
    assert report["fits"], report["sentence"]
    assert [kernel["name"] for kernel in report["kernels"]] == list(KERNELS)
    width, itemsize = 64 * -(-head_dim // 64), 4 if dtype == "float32" else 2
    operand = plan.num_q * width * itemsize
    for kernel in report["kernels"]:
        assert kernel.keys() >= {"block_q", "block_kv", *NUMBERS}
        assert 50 < kernel["bundles"] < kernel["total_bundles"]
        accumulator = 4 * plan.block_q * width
        assert accumulator <= kernel["vmem_bytes"] < 64 * 2**20
        assert 4 * lowering.lower_plan(plan).row_format.length < kernel["smem_bytes"] < 2**20
        assert kernel["argument_bytes"] >= 3 * operand
        assert kernel["output_bytes"] >= operand * (2 if kernel["name"] == "dkv" else 1)


@pytest.mark.libtpu
@pytest.mark.parametrize("target", TARGETS)
def test_every_target(target: str) -> None:
    plan = small_plan()
    check(compile_report(target, 128, "bfloat16", plan), 128, "bfloat16", plan)


@pytest.mark.libtpu
@pytest.mark.parametrize(
    ("head_dim", "dtype"), [(64, "float32"), (256, "float32"), (256, "bfloat16"), (40, "bfloat16")]
)
def test_every_head_dim(head_dim: int, dtype: str) -> None:
    plan = small_plan()
    check(compile_report("v5e", head_dim, dtype, plan), head_dim, dtype, plan)


@pytest.mark.libtpu
def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--backend", "pallas", "--target", "v6e", "--plan", str(ROBOT), "--head-dim", "64", "--json"]
    assert main(["compile", *options]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["sentence"].startswith("Yes: 320 x 320 tokens in tiles of ")
    assert all(kernel["bundles"] > 50 for kernel in report["kernels"])


@pytest.mark.libtpu
def test_libtpu_leaves_the_cpu_alone() -> None:
    """Installed on a machine without a TPU, it must not keep JAX from running there."""
    import jax

    assert jax.default_backend() in ("cpu", "gpu", "tpu")
    assert float(jax.numpy.ones(3).sum()) == 3
