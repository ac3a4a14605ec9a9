"""Ahead-of-time compilation of the kernels for GPUs that are not there, and what the compiler says about them."""

from __future__ import annotations

import math
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from canvas_engineering.errors import BackendError
from canvas_engineering.kernels.triton import config as table
from canvas_engineering.kernels.triton.backward import backward_kv_kernel, backward_q_kernel, delta_kernel
from canvas_engineering.kernels.triton.config import KernelConfig
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
DTYPES = tuple(_POINTER)


@dataclass(frozen=True)
class KernelReport:
    """What the compiler made of one kernel.

    Attributes:
        name: Kernel and variant.
        registers: Per thread (AMD: vector registers, accumulation registers included).
        stack_bytes: Per thread; anything but 0 is spilled registers or a local array.
        shared_bytes: Per program.
        shared_limit: Of the target.
        instruction: The target's tensor-core instruction.
        wgmma: How many of them the code holds.
        block_q, block_kv: The plan's tile.
        block_m, block_n: What one step computes of it.
        num_warps, num_stages: As compiled.
    """

    name: str
    registers: int
    stack_bytes: int
    shared_bytes: int
    shared_limit: int
    instruction: str
    wgmma: int
    block_q: int
    block_kv: int
    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class Variant:
    """Which of the kernels' compile-time options to compile."""

    head_dim: int
    dtype: str
    block_q: int
    block_kv: int
    contiguous: bool = True
    many_sets: bool = True
    sigmoid: bool = False
    dropout: bool = False
    precision: str = "ieee"


def gpu_target(target: str) -> GPUTarget:
    """Triton's description of a target.

    Raises:
        BackendError: The target is not one of those the package ships a table for.
    """
    if target not in SHARED_MEMORY:
        raise BackendError(f"target must be one of {', '.join(SHARED_MEMORY)}, got {target!r}")
    if target.startswith("gfx"):
        return GPUTarget("hip", target, 64)
    return GPUTarget("cuda", int(target.removeprefix("sm_")), 32)


def _signature(kernel: Any, constants: dict[str, Any], dtype: str) -> tuple[dict[str, str], dict[Any, Any]]:
    """Argument types and alignments as a launch with aligned tensors specialises them."""
    signature: dict[str, str] = {}
    aligned: dict[Any, Any] = {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name in ("scale", "scale_log2", "dropout_scale"):
            signature[name] = "fp32"
        elif name == "dropout_threshold":
            signature[name] = "i64"
        elif name.startswith("p_"):
            signature[name] = _pointer_type(name, dtype)
            aligned[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "i32"
            if name.startswith("stride_"):
                aligned[(i,)] = [["tt.divisibility", 16]]
    return signature, aligned


def _pointer_type(name: str, dtype: str) -> str:
    if name in ("p_rows", "p_columns", "p_tokens", "p_masks"):
        return "*i32"
    if name == "p_seed":
        return "*i64"
    if name in ("p_lse", "p_delta", "p_weight", "p_grad_weight", "p_grad_lse"):
        return "*fp32"
    return _POINTER[dtype]


def compile_kernel(
    kernel: Any, constants: dict[str, Any], dtype: str, target: str, num_warps: int, num_stages: int
) -> Any:
    """The compiled kernel (``.asm``, ``.metadata``) for ``target``; needs no GPU."""
    if not hasattr(kernel, "cache_key"):
        raise BackendError("kernels cannot be compiled in a process that interprets them (TRITON_INTERPRET=1)")
    signature, aligned = _signature(kernel, constants, dtype)
    source = ASTSource(kernel, signature, constexprs=constants, attrs=aligned)
    options = {"num_warps": num_warps, "num_stages": num_stages}
    return triton.compile(source, target=gpu_target(target), options=options)
