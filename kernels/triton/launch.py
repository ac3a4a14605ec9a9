"""Host side of the kernels: grids, block sizes and arguments. Nothing here reads a value back from the device."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from canvas_engineering.kernels.triton.backward import (
    backward_kv_kernel,
    backward_q_kernel,
    compact_kernel,
    delta_kernel,
)
from canvas_engineering.kernels.triton.config import KernelConfig, fit_config, kernel_config
from canvas_engineering.kernels.triton.forward import forward_kernel

LOG2E = math.log2(math.e)
MAX_UINT32 = 2**32 - 1


@dataclass(frozen=True)
class Call:
    """The numbers of one call that are the same in the forward and the backward pass."""

    block_q: int
    block_kv: int
    q_tiles: int
    kv_tiles: int
    contiguous: bool
    many_sets: bool
    sigmoid: bool
    scale: float
    dropout_p: float
    precision: str

    @property
    def threshold(self) -> int:
        """Dropout bits below this are dropped."""
        return min(math.floor(self.dropout_p * 2**32), MAX_UINT32)

    @property
    def dropout_scale(self) -> float:
        return 1.0 / (1.0 - self.dropout_p)


def padded_head_dim(head_dim: int) -> int:
    """The power of two, at least 16, that the kernels compute with."""
    return max(16, 1 << (head_dim - 1).bit_length())


def architecture(device: torch.device) -> str:
    """``"sm_90"``, ``"gfx942"``, ...; ``"interpreter"`` on the CPU."""
    if device.type != "cuda":
        return "interpreter"
    if torch.version.hip:
        return str(torch.cuda.get_device_properties(device).gcnArchName).partition(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def _config(kernel: str, q: torch.Tensor, call: Call) -> KernelConfig:
    dtype = str(q.dtype).removeprefix("torch.")
    config = kernel_config(architecture(q.device), kernel, padded_head_dim(q.shape[-1]), dtype, call.many_sets)
    return fit_config(config, call.block_q, call.block_kv)


def shared_constants(head_dim: int, call: Call, config: KernelConfig) -> dict[str, Any]:
    """The constants that all three attention kernels take."""
    return {
        "HEAD_DIM": head_dim,
        "D": padded_head_dim(head_dim),
        "BLOCK_Q": call.block_q,
        "BLOCK_KV": call.block_kv,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "CONTIGUOUS": call.contiguous,
        "MANY_SETS": call.many_sets,
        "SIGMOID": call.sigmoid,
        "DROPOUT": call.dropout_p > 0.0,
        "PRECISION": call.precision,
    }


def _blocks(tile: int, block: int) -> int:
    return -(-tile // block)


def _strides(tensor: torch.Tensor) -> tuple[int, int, int]:
    return tensor.stride(0), tensor.stride(1), tensor.stride(2)


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    row_weight: torch.Tensor,
    seed: torch.Tensor | None,
    rows: torch.Tensor,
    tokens: torch.Tensor,
    masks: torch.Tensor,
    call: Call,
    *,
    out: torch.Tensor,
    lse: torch.Tensor | None,
    set_out: torch.Tensor | None,
    skip_dead: bool,
) -> None:
    """Write ``out`` ``(B, Hq, Nq, D)`` and, where given, ``lse`` and ``set_out`` (see ``forward_kernel``)."""
    batch, heads, num_q, head_dim = q.shape
    if out.numel() == 0:
        return
    config = _config("forward", q, call)
    blocks = call.q_tiles * _blocks(call.block_q, config.block_m)
    forward_kernel[(blocks * batch * heads,)](
        q,
        k,
        v,
        out,
        out if lse is None else lse,
        out if set_out is None else set_out,
        row_weight,
        rows if seed is None else seed,
        rows,
        tokens,
        masks,
        *_strides(q),
        *_strides(k),
        *_strides(v),
        *_strides(out),
        blocks,
        heads,
        heads // k.shape[1],
        num_q,
        row_weight.shape[0],
        call.scale * LOG2E,
        call.threshold,
        call.dropout_scale,
        **shared_constants(head_dim, call, config),
        STORE_LSE=lse is not None,
        STORE_SETS=set_out is not None,
        SKIP_DEAD=skip_dead,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )


def delta(
    out: torch.Tensor,
    grad_out: torch.Tensor,
    lse: torch.Tensor,
    grad_lse: torch.Tensor | None,
    row_weight: torch.Tensor,
    rows: torch.Tensor,
    tokens: torch.Tensor,
    call: Call,
    *,
    per_set: bool,
    delta: torch.Tensor,
    shift: torch.Tensor,
    grad_weight: torch.Tensor | None,
) -> None:
    """Write ``delta``, ``shift`` and the partial sums ``grad_weight`` ``(B*Hq, num_sets, block_q)`` (see ``delta_kernel``)."""
    batch, heads, num_q, head_dim = grad_out.shape
    num_sets = row_weight.shape[0]
    block_m = min(64, max(16, 1 << (call.block_q - 1).bit_length()))
    blocks = num_sets * _blocks(call.block_q, block_m)
    if blocks * batch * heads == 0:
        return
    delta_kernel[(blocks * batch * heads,)](
        out,
        grad_out,
        lse if grad_lse is None else grad_lse,
        lse,
        row_weight,
        delta,
        shift,
        delta if grad_weight is None else grad_weight,
        rows,
        tokens,
        *((0, 0, 0) if per_set else _strides(out)),
        *_strides(grad_out),
        call.q_tiles,
        blocks,
        heads,
        num_q,
        num_sets,
        HEAD_DIM=head_dim,
        D=padded_head_dim(head_dim),
        BLOCK_Q=call.block_q,
        BLOCK_M=block_m,
        CONTIGUOUS=call.contiguous,
        MANY_SETS=call.many_sets,
        SIGMOID=call.sigmoid,
        PER_SET=per_set,
        GRAD_LSE=grad_lse is not None,
        GRAD_WEIGHT=grad_weight is not None,
        num_warps=4,
    )


def backward_q(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    grad_out: torch.Tensor,
    shift: torch.Tensor,
    delta: torch.Tensor,
    row_weight: torch.Tensor,
    seed: torch.Tensor | None,
    rows: torch.Tensor,
    tokens: torch.Tensor,
    masks: torch.Tensor,
    call: Call,
    *,
    grad_lse: bool,
    grad_q: torch.Tensor,
) -> None:
    """Write ``grad_q``, shaped as ``q``."""
    batch, heads, num_q, head_dim = q.shape
    if grad_q.numel() == 0:
        return
    config = _config("backward_q", q, call)
    blocks = call.q_tiles * _blocks(call.block_q, config.block_m)
    backward_q_kernel[(blocks * batch * heads,)](
        q,
        k,
        v,
        grad_out,
        shift,
        delta,
        grad_q,
        row_weight,
        rows if seed is None else seed,
        rows,
        tokens,
        masks,
        *_strides(q),
        *_strides(k),
        *_strides(v),
        *_strides(grad_out),
        *_strides(grad_q),
        blocks,
        heads,
        heads // k.shape[1],
        num_q,
        row_weight.shape[0],
        call.scale,
        call.scale * LOG2E,
        call.threshold,
        call.dropout_scale,
        **shared_constants(head_dim, call, config),
        GRAD_LSE=grad_lse,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )


def backward_kv(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    grad_out: torch.Tensor,
    shift: torch.Tensor,
    delta: torch.Tensor,
    row_weight: torch.Tensor,
    seed: torch.Tensor | None,
    columns: torch.Tensor,
    tokens: torch.Tensor,
    masks: torch.Tensor,
    call: Call,
    *,
    grad_k: torch.Tensor,
    grad_v: torch.Tensor,
) -> None:
    """Write ``grad_k`` and ``grad_v``, shaped as ``k`` and ``v``."""
    batch, kv_heads, _, head_dim = k.shape
    if grad_k.numel() == 0:
        return
    config = _config("backward_kv", q, call)
    blocks = call.kv_tiles * _blocks(call.block_kv, config.block_n)
    backward_kv_kernel[(blocks * batch * kv_heads,)](
        q,
        k,
        v,
        grad_out,
        shift,
        delta,
        grad_k,
        grad_v,
        row_weight,
        columns if seed is None else seed,
        columns,
        tokens,
        masks,
        *_strides(q),
        *_strides(k),
        *_strides(v),
        *_strides(grad_out),
        *_strides(grad_k),
        *_strides(grad_v),
        blocks,
        kv_heads,
        q.shape[2],
        row_weight.shape[0],
        call.scale,
        call.scale * LOG2E,
        call.threshold,
        call.dropout_scale,
        GROUP=q.shape[1] // kv_heads,
        **shared_constants(head_dim, call, config),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )


def alive_columns(columns: torch.Tensor, row_weight: torch.Tensor, kv_tiles: int) -> torch.Tensor:
    """``columns`` without the entries of softmax sets whose weights are all zero."""
    alive = (row_weight != 0).any(dim=1).to(torch.int32)
    compacted = columns.clone()
    if kv_tiles and row_weight.shape[0]:
        compact_kernel[(kv_tiles,)](columns, alive, compacted, kv_tiles, BLOCK=128, num_warps=4)
    return compacted
