"""The PyTorch operators ``canvas_engineering::block_sparse_attention`` and its backward.

Functional, with the plan flattened to tensors and numbers: schema, fake, autograd and vmap rules are registered,
so they work under ``torch.compile(fullgraph=True)``, ``torch.func`` and CUDA-graph capture. The backward is an
operator of its own; a second derivative is refused by PyTorch with its name.
"""

from __future__ import annotations

from typing import Any

import torch

from canvas_engineering.kernels.triton import launch
from canvas_engineering.kernels.triton.launch import Call

NAMESPACE = "canvas_engineering"
FORWARD = f"{NAMESPACE}::block_sparse_attention"
BACKWARD = f"{NAMESPACE}::block_sparse_attention_backward"

# What a forward call leaves for the backward pass, and what may be skipped; see `forward`.
SAVE_NOTHING, SAVE_LSE, SAVE_SETS = 0, 1, 2

_TENSORS = "Tensor row_weight, Tensor? seed, Tensor rows, Tensor columns, Tensor tokens, Tensor masks"
_CALL = (
    "int block_q, int block_kv, int q_tiles, int kv_tiles, bool contiguous, bool many_sets, "
    "bool sigmoid, float scale, float dropout_p, str precision"
)

_library = torch.library.Library(NAMESPACE, "DEF")
_library.define(
    f"block_sparse_attention(Tensor q, Tensor k, Tensor v, {_TENSORS}, {_CALL}, "
    "int save, bool return_lse, bool own_weight) -> (Tensor, Tensor, Tensor)"
)
_library.define(
    f"block_sparse_attention_backward(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, "
    f"Tensor out, Tensor lse, Tensor set_out, {_TENSORS}, {_CALL}, "
    "bool own_weight, bool need_q, bool need_kv, bool need_weight) -> (Tensor, Tensor, Tensor, Tensor)"
)


def _call(numbers: tuple[Any, ...]) -> Call:
    return Call(*numbers)


def _lse_shape(q: torch.Tensor, row_weight: torch.Tensor, many_sets: bool) -> tuple[int, ...]:
    batch, heads, num_q, _ = q.shape
    return (batch, heads, row_weight.shape[0], row_weight.shape[1]) if many_sets else (batch, heads, num_q)


def _outputs(
    q: torch.Tensor, row_weight: torch.Tensor, many_sets: bool, sigmoid: bool, save: int, return_lse: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Empty ``out``, ``lse`` and ``set_out``; what is not asked for has no elements."""
    store_lse = not sigmoid and (return_lse or save != SAVE_NOTHING)
    batch, heads, _, head_dim = q.shape
    return (
        torch.empty_like(q),
        q.new_empty(_lse_shape(q, row_weight, many_sets) if store_lse else (0,), dtype=torch.float32),
        q.new_empty((batch, heads, *row_weight.shape, head_dim) if save == SAVE_SETS else (0,)),
    )


def _forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    row_weight: torch.Tensor,
    seed: torch.Tensor | None,
    rows: torch.Tensor,
    columns: torch.Tensor,
    tokens: torch.Tensor,
    masks: torch.Tensor,
    *numbers: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    *numbers_of_call, save, return_lse, _ = numbers
    call = _call(tuple(numbers_of_call))
    out, lse, set_out = _outputs(q, row_weight, call.many_sets, call.sigmoid, save, return_lse)
    launch.forward(
        q,
        k,
        v,
        row_weight,
        seed,
        rows,
        tokens,
        masks,
        call,
        out=out,
        lse=lse if lse.numel() else None,
        set_out=set_out if save == SAVE_SETS else None,
        skip_dead=save != SAVE_SETS and not return_lse,
    )
    return out, lse, set_out


def _forward_fake(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    row_weight: torch.Tensor,
    seed: torch.Tensor | None,
    rows: torch.Tensor,
    columns: torch.Tensor,
    tokens: torch.Tensor,
    masks: torch.Tensor,
    *numbers: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    *numbers_of_call, save, return_lse, _ = numbers
    call = _call(tuple(numbers_of_call))
    return _outputs(q, row_weight, call.many_sets, call.sigmoid, save, return_lse)


def _backward(
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    set_out: torch.Tensor,
    row_weight: torch.Tensor,
    seed: torch.Tensor | None,
    rows: torch.Tensor,
    columns: torch.Tensor,
    tokens: torch.Tensor,
    masks: torch.Tensor,
    *numbers: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    *numbers_of_call, own_weight, need_q, need_kv, need_weight = numbers
    call = _call(tuple(numbers_of_call))
    per_set = set_out.numel() > 0
    batch, heads = q.shape[:2]
    if grad_out.stride(-1) != 1:
        grad_out = grad_out.contiguous()
    if grad_lse is not None:
        grad_lse = grad_lse.contiguous()
    grad_q, grad_k, grad_v, _ = _gradients(q, k, v, row_weight, need_q, need_kv, need_weight)

    # Per batch and head, then added in a fixed order: no atomics.
    partial = q.new_empty((batch * heads, *row_weight.shape), dtype=torch.float32) if need_weight else None
    delta, shift = torch.empty_like(lse), torch.empty_like(lse)
    if not call.sigmoid or need_weight:
        launch.delta(
            set_out if per_set else out,
            grad_out,
            lse,
            grad_lse,
            row_weight,
            rows,
            tokens,
            call,
            per_set=per_set,
            delta=delta,
            shift=shift,
            grad_weight=partial,
        )
    if need_q:
        launch.backward_q(
            q,
            k,
            v,
            grad_out,
            shift,
            delta,
            row_weight,
            seed,
            rows,
            tokens,
            masks,
            call,
            grad_lse=grad_lse is not None,
            grad_q=grad_q,
        )
    if need_kv:
        if not own_weight and grad_lse is None and grad_k.numel():
            columns = launch.alive_columns(columns, row_weight, call.kv_tiles)
        launch.backward_kv(
            q,
            k,
            v,
            grad_out,
            shift,
            delta,
            row_weight,
            seed,
            columns,
            tokens,
            masks,
            call,
            grad_k=grad_k,
            grad_v=grad_v,
        )
    grad_weight = row_weight.new_empty(0) if partial is None else partial.sum(dim=0)
    return grad_q, grad_k, grad_v, grad_weight


def _gradients(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    row_weight: torch.Tensor,
    need_q: bool,
    need_kv: bool,
    need_weight: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Empty gradients; those not asked for have no elements."""
    return (
        torch.empty_like(q) if need_q else q.new_empty(0),
        torch.empty_like(k) if need_kv else k.new_empty(0),
        torch.empty_like(v) if need_kv else v.new_empty(0),
        torch.empty_like(row_weight) if need_weight else row_weight.new_empty(0),
    )


def _backward_fake(
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    set_out: torch.Tensor,
    row_weight: torch.Tensor,
    *rest: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    need_q, need_kv, need_weight = rest[-3:]
    return _gradients(q, k, v, row_weight, need_q, need_kv, need_weight)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    tensors, numbers = inputs[:9], inputs[9:]
    out, lse, set_out = output
    q, k, v, row_weight, seed, rows, columns, tokens, masks = tensors
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(set_out)
    ctx.has_seed = seed is not None
    optional = [seed] if seed is not None else []
    ctx.save_for_backward(q, k, v, out, lse, set_out, row_weight, rows, columns, tokens, masks, *optional)
    ctx.numbers = numbers


def _autograd_backward(
    ctx: Any, grad_out: torch.Tensor | None, grad_lse: torch.Tensor | None, grad_set_out: torch.Tensor | None
) -> tuple[torch.Tensor | None, ...]:
    q, k, v, out, lse, set_out, row_weight, rows, columns, tokens, masks, *optional = ctx.saved_tensors
    *numbers, save, return_lse, own_weight = ctx.numbers
    if save == SAVE_NOTHING:
        raise RuntimeError(
            f"{FORWARD} was called with save={save} and cannot be differentiated; call block_sparse_attention, "
            f"which passes save={SAVE_LSE} or {SAVE_SETS} when an input requires a gradient"
        )
    need_q, need_kv = ctx.needs_input_grad[0], ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
    need_weight = ctx.needs_input_grad[3]
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    grads = torch.ops.canvas_engineering.block_sparse_attention_backward(
        grad_out,
        grad_lse,
        q,
        k,
        v,
        out,
        lse,
        set_out,
        row_weight,
        optional[0] if ctx.has_seed else None,
        rows,
        columns,
        tokens,
        masks,
        *numbers,
        own_weight,
        need_q,
        need_kv,
        need_weight,
    )
    needs = (need_q, need_kv, need_kv, need_weight)
    return (*(g if need else None for g, need in zip(grads, needs, strict=True)), *(None,) * (len(ctx.numbers) + 5))


def _vmap(name: str, tensor_count: int) -> Any:
    """A vmap rule that runs the operator once per element: correct for every argument that can be batched."""

    def rule(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[tuple[torch.Tensor, ...], tuple[int, ...]]:
        seed_index = 4 if name == FORWARD else 9
        if name == FORWARD and args[seed_index] is not None and info.randomness != "different":
            if in_dims[seed_index] is None and info.randomness == "error":
                raise RuntimeError("vmap over block_sparse_attention with dropout needs randomness='same'")
        op = getattr(torch.ops.canvas_engineering, name.partition("::")[2])
        results = []
        for i in range(info.batch_size):
            element = [
                a.select(d, i) if d is not None else a for a, d in zip(args[:tensor_count], in_dims, strict=False)
            ]
            results.append(op(*element, *args[tensor_count:]))
        return tuple(torch.stack(column) for column in zip(*results, strict=True)), (0,) * len(results[0])

    return rule


for _key in ("CPU", "CUDA"):
    _library.impl("block_sparse_attention", _forward, _key)
    _library.impl("block_sparse_attention_backward", _backward, _key)
torch.library.register_fake(FORWARD, _forward_fake, lib=_library)
torch.library.register_fake(BACKWARD, _backward_fake, lib=_library)
torch.library.register_autograd(FORWARD, _autograd_backward, setup_context=_setup_context, lib=_library)
torch.library.register_vmap(FORWARD, _vmap(FORWARD, 9), lib=_library)
torch.library.register_vmap(BACKWARD, _vmap(BACKWARD, 14), lib=_library)
