"""The portable backend on torch: equally shaped problems batched into the framework's own attention.

On the CPU the calls go to torch's flash attention operator, forward and backward, inside one autograd function
that writes all gradients into three buffers. Other devices run ``F.scaled_dot_product_attention`` under torch's
own autograd. What that does not offer (log-sum-exp with gradient, sigmoid, dropout by the portable hash) runs
in :mod:`torch_math`, on every device.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from canvas_engineering.kernels.portable import torch_math
from canvas_engineering.kernels.portable.torch_math import Dropout, Scoring
from canvas_engineering.kernels.portable.torch_plan import (
    DevicePlan,
    DeviceRead,
    Places,
    on_device,
    pieces,
)
from canvas_engineering.plan import BlockSparsePlan


@dataclass(frozen=True)
class _Call:
    """The arguments of a call that are not tensors."""

    plan: DevicePlan
    group: int  # query heads per kv head
    heads_kv: int
    scale: float
    sigmoid: bool
    dropout_p: float
    seed: int
    return_lse: bool

    def plain(self, dtype: torch.dtype) -> bool:
        """Whether the framework's own attention computes this.

        In half precision torch's log-sum-exp is the sum of rounded exponentials, which is not enough to return.
        """
        half = dtype in (torch.float16, torch.bfloat16)
        return not self.sigmoid and self.dropout_p == 0 and not (self.return_lse and half)

    def scoring(self, read: DeviceRead, q: Tensor) -> Scoring:
        dropout = None
        if self.dropout_p > 0:
            device = read.row_token.device
            head = torch.arange(q.shape[0] * self.heads_kv * self.group, dtype=torch.int32, device=device)
            # (C, group) query heads of each kv head; a problem's rows are (row, query head) pairs.
            head = head.reshape(q.shape[0] * self.heads_kv, 1, self.group, 1)
            dropout = Dropout(
                self.dropout_p,
                self.seed,
                head.repeat(1, 1, read.row_token.shape[1], 1) if self.group > 1 else head,
                read.row_token.repeat_interleave(self.group, dim=1),
                read.key_token,
            )
        bias = read.mask_bias(torch_math.wide(q), self.group)
        return Scoring(self.scale, self.sigmoid, bias, dropout)


@torch.compiler.disable  # a torch.compile graph breaks here: the number of calls depends on the plan
def attention(
    q: Tensor,  # (B, Hq, Nq, D)
    k: Tensor,  # (B, Hkv, Nkv, D)
    v: Tensor,  # (B, Hkv, Nkv, D)
    plan: BlockSparsePlan,
    *,
    scale: float,
    row_weight: Tensor | None,
    activation: str,
    dropout_p: float,
    seed: int | Tensor | None,
    return_lse: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    """Output in q's dtype, or output and log-sum-exp; differentiable once."""
    device, dtype = q.device, q.dtype
    heads_kv = k.shape[1]
    if device.type == "cpu" and not _multiplies(dtype):
        q, k, v = (x.float() for x in (q, k, v))
    call = _Call(
        plan=on_device(plan, device),
        group=q.shape[1] // heads_kv,
        heads_kv=heads_kv,
        scale=scale,
        sigmoid=activation == "sigmoid",
        dropout_p=dropout_p,
        seed=0 if seed is None else int(seed) % 2**64,
        return_lse=return_lse,
    )
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    folded = _fold(q, call.group)
    with _no_autocast(device):
        if device.type == "cpu" or return_lse or not call.plain(q.dtype):
            out, lse = _Attention.apply(folded, k, v, row_weight, call)
        else:
            out, lse = _composed(folded, k, v, row_weight, call), None
    out = _unfold(out, call.group).to(dtype)
    if not return_lse:
        return out
    return out, _unfold(lse, call.group)[..., 0]


@functools.cache
def _multiplies(dtype: torch.dtype) -> bool:
    """Whether the CPU has instructions for matrix products in ``dtype``; without them float32 is faster, and exact."""
    needed = {torch.float16: "amx_fp16", torch.bfloat16: "amx_bf16"}
    if dtype not in needed:
        return True
    found: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(found.get(needed[dtype], False))


def _fold(x: Tensor, group: int) -> Tensor:
    """``(B, Hkv * group, N, D)`` to ``(B, Hkv, N, group * D)``: query heads of one kv head are rows beside each other.

    Rows that attend to the same keys without a mask are just more rows, so grouped heads need no copies of k and v.
    """
    if group == 1:
        return x
    return x.unflatten(1, (-1, group)).transpose(2, 3).flatten(3)


def _unfold(x: Tensor, group: int) -> Tensor:
    """The inverse of :func:`_fold`."""
    return x if group == 1 else x.unflatten(3, (group, -1)).transpose(2, 3).flatten(1, 2)


def _no_autocast(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Operands are used in the dtype they come in: autocast has had its say in the projections."""
    if torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()


_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class _Attention(torch.autograd.Function):
    """All batches of a call; operands as in :func:`_fold`, the log-sum-exp ``(B, Hkv, Nq, group)``."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, row_weight: Tensor | None, call: _Call
    ) -> tuple[Tensor, Tensor | None]:
        plan, group = call.plan, call.group
        ctx.set_materialize_grads(False)
        ctx.call = call
        ctx.pieces = []
        use_flash = call.plain(q.dtype) and q.device.type == "cpu"
        training = any(ctx.needs_input_grad)
        # Sums over several softmax sets are kept in float32 until the end.
        sums = any(not one.rows.assign for one in plan.problems) and q.dtype in (torch.float16, torch.bfloat16)
        out = torch.empty_like(q, dtype=torch.float32 if sums else None)
        if not plan.assigns_all_rows or row_weight is not None:
            out.zero_()
        lse = None
        if call.return_lse:
            wide = torch.float64 if q.dtype == torch.float64 else torch.float32
            lse = torch.full((*q.shape[:3], group), -torch.inf, dtype=wide, device=q.device)
        saved = []
        q_run, k_run, v_run = _ordered(q, k, v, plan)
        skippable = row_weight is not None and not ctx.needs_input_grad[3] and lse is None
        for batch in plan.problems if q.numel() else ():
            alive = batch.alive(row_weight) if skippable and row_weight is not None else batch
            for one in () if alive is None else pieces(alive, q, k, group):
                q_one = one.rows.take(q_run, group)
                total: Tensor | None = None
                for read in one.reads:
                    keys = read.padded if use_flash and read.padded is not None else read.keys
                    k_one, v_one = keys.take(k_run), keys.take(v_run)
                    if use_flash:
                        out_one, lse_one = _flash(
                            q_one, k_one, v_one, 0.0, False, attn_mask=read.bias(q.dtype, group), scale=call.scale
                        )
                    else:
                        out_one, lse_one = torch_math.forward(q_one, k_one, v_one, call.scoring(read, q))
                    total = _add_weighted(total, out_one, read.weights(row_weight, group), len(one.reads) > 1)
                    if training:
                        saved += [out_one, lse_one]
                if total is not None:
                    out = one.rows.put(out, total)
                if lse is not None:
                    lse = one.rows.put(lse, lse_one)
                if training:
                    ctx.pieces.append(one)
        if plan.q_place is not None:
            out = out.index_select(2, plan.q_place)
            lse = None if lse is None else lse.index_select(2, plan.q_place)
        ctx.save_for_backward(q, k, v, row_weight, *saved)
        return out.to(q.dtype), lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        call: _Call = ctx.call
        plan, group = call.plan, call.group
        q, k, v, row_weight, *saved = ctx.saved_tensors
        with _no_autocast(q.device):
            grad = torch.zeros_like(q) if grad is None else grad.to(q.dtype)
            grad = grad if grad.stride(-1) == 1 else grad.contiguous()
            use_flash = call.plain(q.dtype) and q.device.type == "cpu" and grad_lse is None
            q_run, k_run, v_run = _ordered(q, k, v, plan)
            if plan.q_order is not None:
                grad = grad.index_select(2, plan.q_order)
                grad_lse = None if grad_lse is None else grad_lse.index_select(2, plan.q_order)
            dq, dk, dv = (_accumulator(x) for x in (q, k, v))
            dweight = None
            if row_weight is not None and ctx.needs_input_grad[3]:
                wide = torch.float64 if row_weight.dtype == torch.float64 else torch.float32
                dweight = torch.zeros(row_weight.numel(), dtype=wide, device=q.device)
            results = iter(saved)
            for one in ctx.pieces:
                q_one, grad_rows = one.rows.take(q_run, group), one.rows.take(grad, group)
                lse_rows = None if grad_lse is None else one.rows.take(grad_lse, group)[..., 0]
                dq_one = None
                for read in one.reads:
                    out_one, lse_one = next(results), next(results)
                    keys = read.padded if use_flash and read.padded is not None else read.keys
                    k_one, v_one = keys.take(k_run), keys.take(v_run)
                    if dweight is not None:
                        products = (grad_rows.to(dweight.dtype) * out_one.to(dweight.dtype)).sum((0, 3))
                        dweight[read.slots.flatten()] = products.unflatten(1, (-1, group)).sum(2).flatten()
                    weight = read.weights(row_weight, group)
                    grad_one = grad_rows if weight is None else (grad_rows * weight).to(q.dtype)
                    if use_flash:
                        bias = read.bias(q.dtype, group)
                        dq_read, dk_one, dv_one = _flash_backward(
                            grad_one,
                            q_one,
                            k_one,
                            v_one,
                            out_one,
                            lse_one,
                            0.0,
                            False,
                            attn_mask=bias,
                            scale=call.scale,
                        )
                    else:
                        scoring = call.scoring(read, q)
                        dq_read, dk_one, dv_one = torch_math.backward(
                            grad_one, lse_rows, q_one, k_one, v_one, out_one, lse_one, scoring
                        )
                    dk = read.keys.put(dk, dk_one[:, :, : read.keys.index.shape[1]])
                    dv = read.keys.put(dv, dv_one[:, :, : read.keys.index.shape[1]])
                    dq_one = dq_read.to(dq.dtype) if dq_one is None else dq_one.add_(dq_read)
                dq = one.rows.put(dq, dq_one)
            if plan.q_place is not None and plan.kv_place is not None:
                dq = dq.index_select(2, plan.q_place)
                dk, dv = dk.index_select(2, plan.kv_place), dv.index_select(2, plan.kv_place)
            if dweight is not None:
                dweight = dweight.to(row_weight.dtype).reshape(row_weight.shape)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), dweight, None


def _add_weighted(total: Tensor | None, out: Tensor, weight: Tensor | None, several: bool) -> Tensor:
    """``total + weight * out``; sums of several half-precision outputs are kept in float32."""
    if total is None:
        if several and out.dtype in (torch.float16, torch.bfloat16):
            out = out.float()
        if weight is not None:
            return out * weight
        return out.clone() if several else out
    return total.add_(out) if weight is None else total.addcmul_(out.to(total.dtype), weight.to(total.dtype))


def _ordered(q: Tensor, k: Tensor, v: Tensor, plan: DevicePlan) -> tuple[Tensor, Tensor, Tensor]:
    """The operands in the order in which the problems find them."""
    if plan.q_order is None or plan.kv_order is None:
        return q, k, v
    return q.index_select(2, plan.q_order), k.index_select(2, plan.kv_order), v.index_select(2, plan.kv_order)


def _accumulator(x: Tensor) -> Tensor:
    """Zeros to sum the gradient of ``x`` in: float32 for half precision, because many problems may add to it."""
    half = x.dtype in (torch.float16, torch.bfloat16)
    return torch.zeros_like(x, dtype=torch.float32 if half else None)


def _composed(q: Tensor, k: Tensor, v: Tensor, row_weight: Tensor | None, call: _Call) -> Tensor:
    """The same from differentiable operations, for devices whose attention operator is their own."""
    plan, group = call.plan, call.group
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    out = torch.zeros(q.shape, dtype=wide, device=q.device)
    for batch in plan.problems if q.numel() else ():
        for one in pieces(batch, q, k, group):
            rows = one.rows.index if plan.q_order is None else plan.q_order[one.rows.index]
            rows_at = Places(rows, None, False)
            q_one = rows_at.take(q, group)
            for read in one.reads:
                keys = read.keys.index if plan.kv_order is None else plan.kv_order[read.keys.index]
                keys_at = Places(keys, None, False)
                allowed = read.allowed(group)
                out_one = F.scaled_dot_product_attention(
                    q_one,
                    keys_at.take(k),
                    keys_at.take(v),
                    attn_mask=None if allowed is None else allowed[None],
                    scale=call.scale,
                )
                weight = read.weights(row_weight, group)
                values = (out_one if weight is None else out_one * weight).to(wide)
                out = out.index_add(2, rows.flatten(), values.reshape(*q.shape[:2], -1, q.shape[3]))
    return out.to(q.dtype)
