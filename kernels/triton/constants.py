"""The compile-time constants of the kernels: one list for launches and ahead-of-time compilation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from canvas_engineering.kernels.triton.config import KernelConfig

#: Registers of a multiprocessor, of every NVIDIA GPU that the kernels run on.
REGISTERS = 65_536
#: Of the kernels that multiply no matrices; their blocks are fixed.
SMALL_KERNEL = KernelConfig(block_m=64, block_n=0, num_warps=4, num_stages=1)


@dataclass(frozen=True)
class Variant:
    """What a kernel is specialised for, beside its block sizes.

    Attributes:
        head_dim: As the tensors have it.
        block_q, block_kv: The plan's tile.
        contiguous: Tiles are slices of the tokens; else their tokens are gathered.
        many_sets: A row may stand in several softmax sets.
        sigmoid: Sigmoid instead of softmax.
        dropout: Attention probabilities are dropped.
        precision: Of float32 products: ``"ieee"`` or ``"tf32"``.
        group: Query heads per kv head.
        store_lse, store_sets: The forward pass keeps the log-sum-exp, and the output of every single set.
        skip_dead: The forward pass skips sets whose weights are all 0.
        grad_lse: The log-sum-exp has a gradient.
        grad_weight: The row weights want one.
    """

    head_dim: int
    block_q: int
    block_kv: int
    contiguous: bool = True
    many_sets: bool = True
    sigmoid: bool = False
    dropout: bool = False
    precision: str = "ieee"
    group: int = 1
    store_lse: bool = True
    store_sets: bool = True
    skip_dead: bool = False
    grad_lse: bool = False
    grad_weight: bool = True


def padded_head_dim(head_dim: int) -> int:
    """The power of two, at least 16, that the kernels compute with."""
    return max(16, 1 << (head_dim - 1).bit_length())


def kernel_constants(kernel: str, variant: Variant, config: KernelConfig) -> dict[str, Any]:
    """The constants of ``forward``, ``backward_q`` or ``backward_kv``."""
    constants: dict[str, Any] = {
        "HEAD_DIM": variant.head_dim,
        "D": padded_head_dim(variant.head_dim),
        "BLOCK_Q": variant.block_q,
        "BLOCK_KV": variant.block_kv,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "CONTIGUOUS": variant.contiguous,
        "MANY_SETS": variant.many_sets,
        "SIGMOID": variant.sigmoid,
        "DROPOUT": variant.dropout,
        "PRECISION": variant.precision,
    }
    match kernel:
        case "forward":
            constants["STORE_LSE"] = variant.store_lse
            constants["STORE_SETS"] = variant.store_sets
            constants["SKIP_DEAD"] = variant.skip_dead
        case "backward_q":
            constants["GRAD_LSE"] = variant.grad_lse
        case "backward_kv":
            constants["GROUP"] = variant.group
    return constants


def delta_constants(variant: Variant) -> dict[str, Any]:
    """The constants of ``delta_kernel``."""
    return {
        "HEAD_DIM": variant.head_dim,
        "D": padded_head_dim(variant.head_dim),
        "BLOCK_Q": variant.block_q,
        "BLOCK_M": max(16, min(SMALL_KERNEL.block_m, 1 << (variant.block_q - 1).bit_length())),
        "CONTIGUOUS": variant.contiguous,
        "MANY_SETS": variant.many_sets,
        "SIGMOID": variant.sigmoid,
        "PER_SET": variant.store_sets,
        "GRAD_LSE": variant.grad_lse,
        "GRAD_WEIGHT": variant.grad_weight,
    }


def compile_options(config: KernelConfig, *, all_registers: bool = False) -> dict[str, Any]:
    """Options of Triton's compiler. Fusing multiplications and additions is asked for: its default is changing.

    ``all_registers``, on NVIDIA GPUs only, gives a thread as many as there are. Products of float32 need it: left
    alone, the assembler spills a few of their values so that two programs share a multiprocessor.
    """
    options: dict[str, Any] = {
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        "enable_fp_fusion": True,
    }
    if all_registers:
        options["maxnreg"] = min(255, REGISTERS // (32 * config.num_warps))
    return options
