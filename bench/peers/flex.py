"""Compiled ``flex_attention`` with ``create_block_mask``, tokens in canvas order."""

from __future__ import annotations

import time
import warnings
from typing import Any

import torch
from torch import Tensor

from bench.memory import too_large
from bench.pairs import Pairs
from bench.roofline import Phase
from bench.variant import Absent, TorchVariant

FLEX = "flex_attention"
BLOCK = 128


def check_runs(num_tokens: int, phase: Phase, device: str) -> None:
    """Raise :class:`Absent` where it cannot run."""
    if device == "cpu" and phase != "forward":
        raise Absent("torch has no backward pass of flex_attention on the CPU")
    check_block_mask(num_tokens, device)


def eager_bytes(num_tokens: int) -> int:
    """What ``create_block_mask`` takes unless it is compiled: the mask itself, and the sums over its blocks."""
    return 10 * num_tokens**2


def check_block_mask(num_tokens: int, device: str) -> None:
    """Raise :class:`Absent` where ``create_block_mask`` would fill the memory; a GPU can compile it instead."""
    why = too_large(eager_bytes(num_tokens), device)
    if why and device == "cpu":
        raise Absent(f"create_block_mask of {num_tokens:,} positions {why}")


def block_mask(pairs: Pairs, device: str) -> Any:
    """``create_block_mask`` of the canvas, in blocks of 128 as by default; on a GPU compiled where it must be."""
    from torch.nn.attention.flex_attention import create_block_mask

    size = pairs.num_tokens
    compiled = device != "cpu" and bool(too_large(eager_bytes(size), device))
    return create_block_mask(
        pairs.mask_mod(device), None, None, size, size, device=device, BLOCK_SIZE=BLOCK, _compile=compiled
    )


def attention(pairs: Pairs, leaves: dict[str, Tensor], grad_out: Tensor, phase: Phase, device: str) -> TorchVariant:
    """Compile for this canvas; building the mask and compiling are timed on their own."""
    from torch.nn.attention.flex_attention import flex_attention

    check_runs(pairs.num_tokens, phase, device)
    start = time.perf_counter()
    mask = block_mask(pairs, device)
    mask_seconds = time.perf_counter() - start
    torch.compiler.reset()
    compiled = torch.compile(flex_attention, dynamic=False)
    variant = TorchVariant(
        FLEX,
        lambda q, k, v: compiled(q, k, v, block_mask=mask),
        leaves,
        grad_out,
        phase,
        device,
        {"mask": mask_seconds},
    )
    start = time.perf_counter()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # inductor's remarks on its own code
            variant.sample()
    except (RuntimeError, NotImplementedError) as error:
        # torch's compiler errors are RuntimeErrors: no C++ compiler, an unsupported processor, ...
        reason = " ".join(str(error).split())
        raise Absent(f"torch.compile failed: {reason[:200]}") from None
    variant.setup["compile"] = time.perf_counter() - start
    return variant
