"""Host side of the kernels: grids, block sizes and arguments. Nothing here reads a value back from the device."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cache

import torch

from canvas_engineering.kernels.triton.backward import (
    backward_kv_kernel,
    backward_q_kernel,
    compact_kernel,
    delta_kernel,
)
from canvas_engineering.kernels.triton.config import KernelConfig, forget_tables, kernel_config
from canvas_engineering.kernels.triton.constants import (
    SMALL_KERNEL,
    Variant,
    compile_options,
    delta_constants,
    kernel_constants,
)
from canvas_engineering.kernels.triton.forward import forward_kernel

LOG2E = math.log2(math.e)


@dataclass(frozen=True)
class Plan:
    """A lowered plan as the launches see it: its tensors and its sizes.

    Attributes:
        rows, columns, tokens, masks: See ``lower.py``; ``columns`` only matters to the backward pass.
        row_weight: ``(num_sets, block_q)`` float32, the plan's own weights or others.
    """

    rows: torch.Tensor
    columns: torch.Tensor
    tokens: torch.Tensor
    masks: torch.Tensor
    row_weight: torch.Tensor
    block_q: int
    block_kv: int
    q_tiles: int
    kv_tiles: int
    contiguous: bool
    many_sets: bool

    @property
    def num_sets(self) -> int:
        return self.row_weight.shape[0]


@dataclass(frozen=True)
class Options:
    """The numbers of a call that do not come from its plan.

    Attributes:
        seed: int64, one element, on the device; None without dropout.
        precision: Of float32 products: ``"ieee"`` or ``"tf32"``.
    """

    sigmoid: bool
    scale: float
    dropout_p: float
    seed: torch.Tensor | None
    precision: str

    @property
    def numbers(self) -> tuple[float, int, float]:
        """``scale_log2, dropout_threshold, dropout_scale`` of the kernels."""
        threshold = min(math.floor(self.dropout_p * 2**32), 2**32 - 1)
        return self.scale * LOG2E, threshold, 1.0 / (1.0 - self.dropout_p)


def architecture(device: torch.device) -> str:
    """``"sm_90"``, ``"gfx942"``, ...; ``"interpreter"`` on the CPU."""
    if device.type != "cuda":
        return "interpreter"
    if torch.version.hip:
        return str(torch.cuda.get_device_properties(device).gcnArchName).partition(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


@cache
def _config(device: torch.device, kernel: str, dtype: torch.dtype, variant: Variant) -> KernelConfig:
    return kernel_config(
        architecture(device),
        kernel,
        variant.head_dim,
        str(dtype).removeprefix("torch."),
        many_sets=variant.many_sets,
        block_q=variant.block_q,
        block_kv=variant.block_kv,
        dropout=variant.dropout,
        contiguous=variant.contiguous,
        sigmoid=variant.sigmoid,
        device_name=torch.cuda.get_device_name(device) if device.type == "cuda" else None,
    )


def forget_configs() -> None:
    """Look the configurations up again, after a table was written."""
    forget_tables()
    _config.cache_clear()


def on_device(tensor: torch.Tensor) -> AbstractContextManager[object]:
    """Makes the tensor's GPU the current one, where Triton launches."""
    return torch.cuda.device(tensor.device) if tensor.device.type == "cuda" else nullcontext()


def _variant(head_dim: int, plan: Plan, options: Options) -> Variant:
    return Variant(
        head_dim=head_dim,
        block_q=plan.block_q,
        block_kv=plan.block_kv,
        contiguous=plan.contiguous,
        many_sets=plan.many_sets,
        sigmoid=options.sigmoid,
        dropout=options.seed is not None,
        precision=options.precision,
    )


def _all_registers(q: torch.Tensor) -> bool:
    return q.dtype == torch.float32 and torch.version.hip is None


def _blocks(tile: int, block: int) -> int:
    return -(-tile // block)


def _strides(tensor: torch.Tensor) -> tuple[int, int, int]:
    return tensor.stride(0), tensor.stride(1), tensor.stride(2)


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    plan: Plan,
    options: Options,
    *,
    out: torch.Tensor,
    lse: torch.Tensor | None,
    set_out: torch.Tensor | None,
    skip_dead: bool,
    config: KernelConfig | None = None,
) -> None:
    """Write ``out`` ``(B, Hq, Nq, D)`` and, where given, ``lse`` and ``set_out`` (see ``forward_kernel``).

    ``config`` replaces that of the tables, here and below; tuning measures so.
    """
    batch, heads, num_q, head_dim = q.shape
    if out.numel() == 0:
        return
    variant = replace(
        _variant(head_dim, plan, options),
        store_lse=lse is not None,
        store_sets=set_out is not None,
        skip_dead=skip_dead,
    )
    config = config or _config(q.device, "forward", q.dtype, variant)
    blocks = plan.q_tiles * _blocks(plan.block_q, config.block_m)
    forward_kernel[(blocks * batch * heads,)](
        q,
        k,
        v,
        out,
        lse,
        set_out,
        plan.row_weight,
        options.seed,
        plan.rows,
        plan.tokens,
        plan.masks,
        *_strides(q),
        *_strides(k),
        *_strides(v),
        *_strides(out),
        blocks,
        heads,
        heads // k.shape[1],
        num_q,
        plan.num_sets,
        *options.numbers,
        **kernel_constants("forward", variant, config),
        **compile_options(config, all_registers=_all_registers(q)),
    )


def delta(
    out: torch.Tensor,
    grad_out: torch.Tensor,
    lse: torch.Tensor | None,
    grad_lse: torch.Tensor | None,
    plan: Plan,
    options: Options,
    *,
    per_set: bool,
    delta: torch.Tensor | None,
    shift: torch.Tensor | None,
    grad_weight: torch.Tensor | None,
) -> None:
    """Write ``delta``, ``shift`` and the partial sums ``grad_weight`` (see ``delta_kernel``).

    ``out`` holds the outputs of the single sets if ``per_set``, else the output of the attention. For sigmoid
    attention only ``grad_weight`` is wanted, and the other results and ``lse`` are None.
    """
    batch, heads, num_q, head_dim = grad_out.shape
    variant = replace(
        _variant(head_dim, plan, options),
        store_sets=per_set,
        grad_lse=grad_lse is not None,
        grad_weight=grad_weight is not None,
    )
    constants = delta_constants(variant)
    blocks = plan.num_sets * _blocks(plan.block_q, constants["BLOCK_M"])
    if blocks * batch * heads == 0:
        return
    delta_kernel[(blocks * batch * heads,)](
        out,
        grad_out,
        grad_lse,
        lse,
        plan.row_weight,
        delta,
        shift,
        grad_weight,
        plan.rows,
        plan.tokens,
        *((0, 0, 0) if per_set else _strides(out)),
        *_strides(grad_out),
        plan.q_tiles,
        blocks,
        heads,
        num_q,
        plan.num_sets,
        **constants,
        **compile_options(SMALL_KERNEL),
    )


def backward_q(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    grad_out: torch.Tensor,
    delta: torch.Tensor | None,
    shift: torch.Tensor | None,
    plan: Plan,
    options: Options,
    *,
    grad_lse: bool,
    grad_q: torch.Tensor,
    config: KernelConfig | None = None,
) -> None:
    """Write ``grad_q``, shaped as ``q``."""
    batch, heads, num_q, head_dim = q.shape
    if grad_q.numel() == 0:
        return
    variant = replace(_variant(head_dim, plan, options), grad_lse=grad_lse)
    config = config or _config(q.device, "backward_q", q.dtype, variant)
    blocks = plan.q_tiles * _blocks(plan.block_q, config.block_m)
    backward_q_kernel[(blocks * batch * heads,)](
        q,
        k,
        v,
        grad_out,
        shift,
        delta,
        grad_q,
        plan.row_weight,
        options.seed,
        plan.rows,
        plan.tokens,
        plan.masks,
        *_strides(q),
        *_strides(k),
        *_strides(v),
        *_strides(grad_out),
        *_strides(grad_q),
        blocks,
        heads,
        heads // k.shape[1],
        num_q,
        plan.num_sets,
        options.scale,
        *options.numbers,
        **kernel_constants("backward_q", variant, config),
        **compile_options(config, all_registers=_all_registers(q)),
    )


def backward_kv(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    grad_out: torch.Tensor,
    delta: torch.Tensor | None,
    shift: torch.Tensor | None,
    plan: Plan,
    options: Options,
    *,
    grad_k: torch.Tensor,
    grad_v: torch.Tensor,
    config: KernelConfig | None = None,
) -> None:
    """Write ``grad_k`` and ``grad_v``, shaped as ``k`` and ``v``."""
    batch, kv_heads, _, head_dim = k.shape
    if grad_k.numel() == 0:
        return
    variant = replace(_variant(head_dim, plan, options), group=q.shape[1] // kv_heads)
    config = config or _config(q.device, "backward_kv", q.dtype, variant)
    blocks = plan.kv_tiles * _blocks(plan.block_kv, config.block_n)
    backward_kv_kernel[(blocks * batch * kv_heads,)](
        q,
        k,
        v,
        grad_out,
        shift,
        delta,
        grad_k,
        grad_v,
        plan.row_weight,
        options.seed,
        plan.columns,
        plan.tokens,
        plan.masks,
        *_strides(q),
        *_strides(k),
        *_strides(v),
        *_strides(grad_out),
        *_strides(grad_k),
        *_strides(grad_v),
        blocks,
        kv_heads,
        q.shape[2],
        plan.num_sets,
        options.scale,
        *options.numbers,
        **kernel_constants("backward_kv", variant, config),
        **compile_options(config, all_registers=_all_registers(q)),
    )


def without_dead_sets(plan: Plan) -> Plan:
    """The plan whose ``columns`` leave out the entries of softmax sets with only zero weights."""
    alive = (plan.row_weight != 0).any(dim=1).to(torch.int32)
    columns = plan.columns.clone()
    if plan.kv_tiles and plan.num_sets:
        compact_kernel[(plan.kv_tiles,)](
            plan.columns, alive, columns, plan.kv_tiles, BLOCK=128, **compile_options(SMALL_KERNEL)
        )
    return replace(plan, columns=columns)
