"""Ahead-of-time compilation of the kernels for GPUs that are not there, and what the compiler says about them."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.errors import TritonError

from canvas_engineering.errors import BackendError
from canvas_engineering.kernels.triton import config as table
from canvas_engineering.kernels.triton.backward import backward_kv_kernel, backward_q_kernel, delta_kernel
from canvas_engineering.kernels.triton.config import KernelConfig, kernel_config
from canvas_engineering.kernels.triton.constants import (
    SMALL_KERNEL,
    Variant,
    compile_options,
    delta_constants,
    kernel_constants,
)
from canvas_engineering.kernels.triton.forward import forward_kernel
from canvas_engineering.plan import BlockSparsePlan

#: Shared memory that one program may use, in bytes.
SHARED_MEMORY = {"sm_80": 166_912, "sm_90": 232_448, "sm_100": 232_448, "gfx942": 65_536}
TENSOR_INSTRUCTION = {"sm_80": "mma", "sm_90": "wgmma", "sm_100": "tcgen05", "gfx942": "mfma"}
_INSTRUCTION_PATTERN = {
    "mma": r"\bmma\.sync",
    "wgmma": r"\bwgmma\.mma_async",
    "tcgen05": r"\btcgen05\.mma",
    "mfma": r"\bv_mfma_",
}
_POINTER = {"float16": "*fp16", "bfloat16": "*bf16", "float32": "*fp32"}
_INT32_POINTERS = ("p_rows", "p_columns", "p_tokens", "p_masks")
_FLOAT32_POINTERS = ("p_lse", "p_shift", "p_delta", "p_weight", "p_grad_weight", "p_grad_lse")
_FLOAT32_NUMBERS = ("scale", "scale_log2", "dropout_scale")


@dataclass(frozen=True)
class KernelReport:
    """What the compiler made of one kernel.

    Attributes:
        name: The kernel.
        registers: Per thread (AMD: vector registers, accumulation registers included).
        stack_bytes: Per thread; anything but 0 is spilled registers or a local array.
        shared_bytes: Per program.
        shared_limit: Of the target.
        tensor_columns: Of tensor memory, which sm_100 has; 512 are there.
        instruction: The target's tensor-core instruction: wgmma, mma, tcgen05 or mfma.
        wgmma: How many of these the code holds; 0 in kernels that multiply no matrices, and for float32.
        mma: The same for the older instruction, which sm_90 and sm_100 take for blocks of fewer than 64 rows.
        block_q, block_kv: The plan's tile.
        block_m, block_n: The part of it that one step computes.
        num_warps, num_stages: As compiled.
    """

    name: str
    registers: int
    stack_bytes: int
    shared_bytes: int
    shared_limit: int
    tensor_columns: int
    instruction: str
    wgmma: int
    mma: int
    block_q: int
    block_kv: int
    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


def compile_report(target: str, head_dim: int, dtype: str, plan: BlockSparsePlan | None = None) -> dict[str, Any]:
    """Compile every kernel ahead of time; no GPU is needed.

    Args:
        target: ``"sm_80"``, ``"sm_90"``, ``"sm_100"`` or ``"gfx942"``.
        head_dim: From 8 to 256.
        dtype: ``"float16"``, ``"bfloat16"`` or ``"float32"``.
        plan: Compile for its tiles and softmax sets; without one for the largest shipped blocks and several sets.

    Returns:
        ``"kernels"``: a list of the fields of :class:`KernelReport`. ``"fits"``: whether none of them spills
        registers and all fit the shared memory. ``"sentence"``: the answer in words. And the arguments.

    Raises:
        BackendError: An argument is not one of those above, or the process interprets its kernels.
    """
    check_arguments(target, head_dim, dtype)
    many_sets = plan.max_sets > 1 if plan is not None else True
    variant = Variant(  # as for training
        head_dim=head_dim,
        block_q=plan.block_q if plan is not None else 128,
        block_kv=plan.block_kv if plan is not None else 128,
        contiguous=plan.is_contiguous if plan is not None else True,
        many_sets=many_sets,
        store_sets=many_sets,
        skip_dead=True,
    )
    reports = [report(kernel, variant, dtype, target) for kernel in (*table.KERNELS, "delta")]
    spilling = [f"{one.name} spills {one.stack_bytes} bytes per thread" for one in reports if one.stack_bytes]
    too_large = [
        f"{one.name} needs {one.shared_bytes:,} bytes of shared memory, at most {one.shared_limit:,} are there"
        for one in reports
        if one.shared_bytes > one.shared_limit
    ]
    problems = [*spilling, *too_large]
    what = f"{target}, {dtype}, head_dim {head_dim}, tiles of {variant.block_q} x {variant.block_kv}"
    answer = f"No: {what}: {'; '.join(problems)}." if problems else f"Yes: {what}: all in registers and shared memory."
    return {
        "backend": "triton",
        "target": target,
        "head_dim": head_dim,
        "dtype": dtype,
        "kernels": [asdict(one) for one in reports],
        "fits": not problems,
        "sentence": answer,
    }


def check_arguments(target: str, head_dim: int, dtype: str) -> None:
    """Refuse what :func:`compile_report` refuses.

    Raises:
        BackendError: See there.
    """
    gpu_target(target)
    if dtype not in _POINTER:
        raise BackendError(f"dtype must be one of {', '.join(_POINTER)}, got {dtype!r}")
    if not 8 <= head_dim <= 256:
        raise BackendError(f"head_dim must be from 8 to 256, got {head_dim}")
    _refuse_interpreter(forward_kernel)


def _refuse_interpreter(kernel: Any) -> None:
    if not hasattr(kernel, "cache_key"):
        raise BackendError(
            "compiling needs a process that does not interpret its kernels: unset TRITON_INTERPRET, got "
            "TRITON_INTERPRET=1"
        )


def report(kernel: str, variant: Variant, dtype: str, target: str, config: KernelConfig | None = None) -> KernelReport:
    """Compile one kernel (``"delta"`` or one of ``config.KERNELS``), in its shipped configuration by default."""
    if kernel == "delta":
        constants = delta_constants(variant)
        config = replace(SMALL_KERNEL, block_m=constants["BLOCK_M"])
        compiled = compile_kernel(delta_kernel, constants, dtype, target, config)
    else:
        if config is None:
            config = kernel_config(
                target,
                kernel,
                variant.head_dim,
                dtype,
                many_sets=variant.many_sets,
                block_q=variant.block_q,
                block_kv=variant.block_kv,
                dropout=variant.dropout,
                contiguous=variant.contiguous,
                sigmoid=variant.sigmoid,
            )
        functions = {
            "forward": forward_kernel,
            "backward_q": backward_q_kernel,
            "backward_kv": backward_kv_kernel,
        }
        compiled = compile_kernel(functions[kernel], kernel_constants(kernel, variant, config), dtype, target, config)
    registers, stack = _resources(compiled)
    instruction = TENSOR_INSTRUCTION[target]
    code = compiled.asm["amdgcn" if "amdgcn" in compiled.asm else "ptx"]
    return KernelReport(
        name=kernel,
        registers=registers,
        stack_bytes=stack,
        shared_bytes=compiled.metadata.shared,
        shared_limit=SHARED_MEMORY[target],
        tensor_columns=getattr(compiled.metadata, "tmem_size", None) or 0,
        instruction=instruction,
        wgmma=len(re.findall(_INSTRUCTION_PATTERN[instruction], code)),
        mma=len(re.findall(_INSTRUCTION_PATTERN["mma"], code)),
        block_q=variant.block_q,
        block_kv=variant.block_kv,
        block_m=config.block_m,
        block_n=config.block_n,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )


def gpu_target(target: str) -> GPUTarget:
    """Triton's description of a target.

    Raises:
        BackendError: There is no table of configurations for it.
    """
    if target not in SHARED_MEMORY:
        raise BackendError(f"target must be one of {', '.join(SHARED_MEMORY)}, got {target!r}")
    if target.startswith("gfx"):
        return GPUTarget("hip", target, 64)
    return GPUTarget("cuda", int(target.removeprefix("sm_")), 32)


def compile_kernel(kernel: Any, constants: dict[str, Any], dtype: str, target: str, config: KernelConfig) -> Any:
    """The compiled kernel (with ``asm`` and ``metadata``), specialised as for a launch with aligned tensors.

    Raises:
        BackendError: The process interprets its kernels, or the compiler fails.
    """
    _refuse_interpreter(kernel)
    signature: dict[str, str] = {}
    aligned: dict[Any, Any] = {}
    for i, name in enumerate(kernel.arg_names):
        signature[name] = "constexpr" if name in constants else _argument_type(name, dtype)
        if name not in constants and name.startswith(("p_", "stride_")):
            aligned[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constexprs=constants, attrs=aligned)
    options = compile_options(config, all_registers=dtype == "float32" and target.startswith("sm_"))
    try:
        return triton.compile(source, target=gpu_target(target), options=options)
    except (TritonError, RuntimeError) as error:  # RuntimeError: a pass of the compiler failed
        raise BackendError(f"{kernel.__name__} does not compile for {target} with {config}: {error}") from error


def _argument_type(name: str, dtype: str) -> str:
    if name in _INT32_POINTERS:
        return "*i32"
    if name in _FLOAT32_POINTERS:
        return "*fp32"
    if name == "p_seed":
        return "*i64"
    if name.startswith("p_"):
        return _POINTER[dtype]
    if name in _FLOAT32_NUMBERS:
        return "fp32"
    return "i64" if name == "dropout_threshold" else "i32"


def _resources(compiled: Any) -> tuple[int, int]:
    """Registers and stack bytes per thread."""
    if "amdgcn" in compiled.asm:
        code = compiled.asm["amdgcn"]
        return _field(r"\.vgpr_count:\s+(\d+)", code), _field(r"\.private_segment_fixed_size:\s+(\d+)", code)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        usage = subprocess.run(
            [triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(cubin)], capture_output=True, text=True, check=True
        ).stdout
    return _field(r"REG:(\d+)", usage), _field(r"STACK:(\d+)", usage)


def _field(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise BackendError(f"the compiler's report has no {pattern!r}:\n{text[:2000]}")
    return int(found[1])
