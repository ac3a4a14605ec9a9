"""The kernels compiled ahead of time, no GPU needed: registers, shared memory, tensor-core instructions.

``python bench/triton_table.py TARGET --check`` does this for every shipped entry in every variant; here are those
that most calls use, and the largest.
"""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import pytest

from canvas_engineering.errors import BackendError
from canvas_engineering.kernels.triton.candidates import TENSOR_COLUMNS
from canvas_engineering.kernels.triton.config import ARCHITECTURES, KERNELS, KernelConfig, Key, shipped_table

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("this process interprets its kernels (TRITON_INTERPRET=1)", allow_module_level=True)

from canvas_engineering.kernels.triton import aot
from canvas_engineering.kernels.triton.constants import Variant

#: What training compiles for a dispatcher: consecutive tokens, several softmax sets.
TRAINING = Variant(head_dim=128, block_q=128, block_kv=128, group=4, skip_dead=True)


def sound(report: aot.KernelReport) -> aot.KernelReport:
    """The report, after a look at what must hold for every kernel."""
    assert report.stack_bytes == 0, report
    assert 0 < report.registers <= 512, report
    assert report.shared_bytes <= report.shared_limit, report
    assert report.tensor_columns <= TENSOR_COLUMNS, report
    return report


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_hopper_multiplies_by_wgmma(kernel: str, head_dim: int, dtype: str) -> None:
    report = sound(aot.report(kernel, replace(TRAINING, head_dim=head_dim), dtype, "sm_90"))
    assert report.instruction == "wgmma"
    # At least one instruction per product: two in the forward pass, three for dQ, four for dK and dV.
    assert report.wgmma >= {"forward": 2, "backward_q": 3, "backward_kv": 4}[kernel]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("target", [target for target in ARCHITECTURES if target != "sm_90"])
def test_other_targets_use_their_tensor_cores(kernel: str, target: str) -> None:
    assert sound(aot.report(kernel, TRAINING, "bfloat16", target)).wgmma > 0


@pytest.mark.parametrize(
    "variant",
    [
        replace(TRAINING, many_sets=False, store_sets=False, skip_dead=True),
        replace(TRAINING, contiguous=False, dropout=True, head_dim=80),
        replace(TRAINING, sigmoid=True, store_lse=False),
        replace(TRAINING, sigmoid=True, head_dim=96, store_lse=False),
    ],
    ids=["one set", "gathered, dropout, head_dim 80", "sigmoid", "sigmoid, head_dim 96"],
)
@pytest.mark.parametrize("kernel", ["forward", "backward_kv"])
def test_variants_stay_in_registers(kernel: str, variant: Variant) -> None:
    assert sound(aot.report(kernel, variant, "bfloat16", "sm_90")).wgmma > 0


@pytest.mark.parametrize("precision", ["ieee", "tf32"])
def test_float32_stays_in_registers(precision: str) -> None:
    report = sound(aot.report("forward", replace(TRAINING, head_dim=64, precision=precision), "float32", "sm_90"))
    assert (report.wgmma + report.mma > 0) == (precision == "tf32")


@pytest.mark.parametrize("target", ARCHITECTURES)
def test_the_largest_shipped_configuration_fits_the_shared_memory(target: str) -> None:
    def size(item: tuple[Key, KernelConfig]) -> int:
        """Elements that a program holds: what it owns, and its pipeline of what it loops over."""
        key, config = item
        own, other = config.own_block(key.kernel), config.other_block(key.kernel)
        itemsize = 4 if key.dtype == "float32" else 2
        owned = 1 if key.kernel == "forward" else 2
        return key.head_dim * itemsize * (owned * own + 2 * config.num_stages * other)

    key, config = max(shipped_table(target).kernels.items(), key=size)
    variant = replace(
        TRAINING,
        head_dim=key.head_dim,
        # Tiles for which the table was chosen: of 128 in the direction that a program loops over.
        block_q=128 if key.kernel == "backward_kv" else config.block_m,
        block_kv=config.block_n if key.kernel == "backward_kv" else 128,
        many_sets=key.sets == "many",
        store_sets=key.sets == "many",
    )
    sound(aot.report(key.kernel, variant, key.dtype, target, config))


def test_the_report_of_a_target() -> None:
    found = aot.compile_report("sm_90", 64, "bfloat16")
    assert [kernel["name"] for kernel in found["kernels"]] == [*KERNELS, "delta"]
    assert found["fits"]
    assert found["sentence"] == (
        "Yes: sm_90, bfloat16, head_dim 64, tiles of 128 x 128: all in registers and shared memory."
    )
    for kernel in found["kernels"]:
        assert kernel.keys() >= {
            "name",
            "registers",
            "stack_bytes",
            "shared_bytes",
            "wgmma",
            "block_q",
            "block_kv",
            "block_m",
            "block_n",
            "num_warps",
            "num_stages",
        }
        assert kernel["stack_bytes"] == 0


# -- refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("sm_70", 64, "bfloat16"), "target must be one of sm_80, sm_90, sm_100, gfx942, got 'sm_70'"),
        (("sm_90", 64, "float64"), "dtype must be one of float16, bfloat16, float32, got 'float64'"),
        (("sm_90", 4, "bfloat16"), "head_dim must be from 8 to 256, got 4"),
        (("sm_90", 257, "bfloat16"), "head_dim must be from 8 to 256, got 257"),
    ],
)
def test_bad_arguments_are_refused(arguments: tuple[str, int, str], message: str) -> None:
    with pytest.raises(BackendError) as error:
        aot.compile_report(*arguments)
    assert str(error.value) == message


def test_a_report_that_does_not_fit_says_what(monkeypatch: pytest.MonkeyPatch) -> None:
    def spilling(kernel: str, variant: Variant, dtype: str, target: str, config: Any = None) -> aot.KernelReport:
        return aot.KernelReport(
            name=kernel,
            registers=255,
            stack_bytes=16 if kernel == "forward" else 0,
            shared_bytes=300_000 if kernel == "backward_q" else 1,
            shared_limit=232_448,
            tensor_columns=0,
            instruction="wgmma",
            wgmma=1,
            mma=0,
            block_q=128,
            block_kv=128,
            block_m=128,
            block_n=64,
            num_warps=8,
            num_stages=3,
        )

    monkeypatch.setattr(aot, "report", spilling)
    found = aot.compile_report("sm_90", 64, "bfloat16")
    assert not found["fits"]
    assert found["sentence"] == (
        "No: sm_90, bfloat16, head_dim 64, tiles of 128 x 128: forward spills 16 bytes per thread; "
        "backward_q needs 300,000 bytes of shared memory, at most 232,448 are there."
    )


def test_what_the_compiler_refuses_is_a_backend_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*_: object, **__: object) -> None:
        raise RuntimeError("PassManager::run failed")

    monkeypatch.setattr(aot.triton, "compile", refuses)
    with pytest.raises(BackendError, match=r"forward_kernel does not compile for sm_90 with KernelConfig.*PassManager"):
        aot.report("forward", TRAINING, "bfloat16", "sm_90")
