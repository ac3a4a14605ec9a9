"""The PyTorch operators ``canvas_engineering::block_sparse_attention`` and its backward.

Functional, with the plan flattened to tensors and numbers. Fake, autograd, autocast and vmap rules are registered, so
the operators work under ``torch.compile(fullgraph=True)``, ``torch.func`` and CUDA-graph capture. The backward is an
operator of its own, without a derivative.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from canvas_engineering.kernels.triton import launch
from canvas_engineering.kernels.triton.launch import Options, Plan

NAMESPACE = "canvas_engineering"
FORWARD = f"{NAMESPACE}::block_sparse_attention"
BACKWARD = f"{NAMESPACE}::block_sparse_attention_backward"

# What a forward call leaves for the backward pass: nothing; the log-sum-exp; that and the output of every set that has
# a weight; or of every set, which the derivative by the weights needs.
SAVE_NOTHING, SAVE_LSE, SAVE_SETS, SAVE_DEAD_SETS = range(4)

_PLAN = (
    "Tensor rows, Tensor columns, Tensor tokens, Tensor masks, Tensor row_weight, "
    "int block_q, int block_kv, int q_tiles, int kv_tiles, bool contiguous, bool many_sets"
)
_OPTIONS = "bool sigmoid, float scale, float dropout_p, Tensor? seed, str precision"
_PLAN_SIZE, _OPTIONS_SIZE = len(_PLAN.split(",")), len(_OPTIONS.split(","))
_ROW_WEIGHT = 4  # its place among the arguments of a plan

Tensors = tuple[torch.Tensor, ...]

_library = torch.library.Library(NAMESPACE, "DEF")
_library.define(
    f"block_sparse_attention(Tensor q, Tensor k, Tensor v, {_PLAN}, {_OPTIONS}, "
    # own_weight: row_weight is the plan's own, in which no softmax set is dead
    "int save, bool return_lse, bool own_weight) -> (Tensor out, Tensor lse, Tensor set_out)"
)
_library.define(
    "block_sparse_attention_backward(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor out, "
    f"Tensor lse, Tensor set_out, {_PLAN}, {_OPTIONS}, "
    "bool own_weight, bool need_q, bool need_kv, bool need_weight) -> (Tensor, Tensor, Tensor, Tensor)"
)


def _plan_and_options(arguments: tuple[Any, ...]) -> tuple[Plan, Options, tuple[Any, ...]]:
    """The arguments behind the operands, put together again, and those that follow."""
    rest = arguments[_PLAN_SIZE:]
    return Plan(*arguments[:_PLAN_SIZE]), Options(*rest[:_OPTIONS_SIZE]), rest[_OPTIONS_SIZE:]


def _lse_shape(q: torch.Tensor, plan: Plan) -> tuple[int, ...]:
    """Per token where it has one softmax set at most, else per row of every set."""
    return (*q.shape[:2], *plan.row_weight.shape) if plan.many_sets else tuple(q.shape[:3])


# -- forward ------------------------------------------------------------------------------------------------


def _outputs(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *arguments: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Empty ``out``, ``lse`` and ``set_out``; what is not asked for has no elements. Also the fake."""
    plan, options, (save, return_lse, _) = _plan_and_options(arguments)
    store_lse = not options.sigmoid and (return_lse or save != SAVE_NOTHING)
    return (
        torch.empty_like(q),
        q.new_empty(_lse_shape(q, plan) if store_lse else (0,), dtype=torch.float32),
        q.new_empty((*q.shape[:2], *plan.row_weight.shape, q.shape[3]) if save >= SAVE_SETS else (0,)),
    )


def _forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *arguments: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    plan, options, (save, return_lse, _) = _plan_and_options(arguments)
    out, lse, set_out = _outputs(q, k, v, *arguments)
    with launch.on_device(q):
        launch.forward(
            q,
            k,
            v,
            plan,
            options,
            out=out,
            lse=lse if lse.numel() else None,
            set_out=set_out if save >= SAVE_SETS else None,
            # The log-sum-exp and the derivative by a weight do not depend on the weight being 0.
            skip_dead=save != SAVE_DEAD_SETS and not return_lse,
        )
    return out, lse, set_out


# -- backward -----------------------------------------------------------------------------------------------


def _gradients(
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    set_out: torch.Tensor,
    *arguments: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Empty gradients of q, k, v and the weights; those not asked for have no elements. Also the fake."""
    plan, _, (_, need_q, need_kv, need_weight) = _plan_and_options(arguments)
    return (
        torch.empty_like(q) if need_q else q.new_empty(0),
        torch.empty_like(k) if need_kv else k.new_empty(0),
        torch.empty_like(v) if need_kv else v.new_empty(0),
        torch.empty_like(plan.row_weight) if need_weight else plan.row_weight.new_empty(0),
    )


def _backward(
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    set_out: torch.Tensor,
    *arguments: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    plan, options, (own_weight, need_q, need_kv, need_weight) = _plan_and_options(arguments)
    grad_q, grad_k, grad_v, grad_weight = _gradients(grad_out, grad_lse, q, k, v, out, lse, set_out, *arguments)
    if grad_out.stride(-1) != 1:
        grad_out = grad_out.contiguous()
    if grad_lse is not None:
        grad_lse = grad_lse.contiguous()
    per_set = set_out.ndim > 1
    with launch.on_device(q):
        partial = q.new_empty((*q.shape[:2], *plan.row_weight.shape), dtype=torch.float32) if need_weight else None
        delta = shift = None
        if not options.sigmoid:
            delta, shift = torch.empty_like(lse), torch.empty_like(lse)
        if need_weight or not options.sigmoid:
            launch.delta(
                set_out if per_set else out,
                grad_out,
                None if options.sigmoid else lse,
                grad_lse,
                plan,
                options,
                per_set=per_set,
                delta=delta,
                shift=shift,
                grad_weight=partial,
            )
        if need_q:
            launch.backward_q(
                q, k, v, grad_out, delta, shift, plan, options, grad_lse=grad_lse is not None, grad_q=grad_q
            )
        if need_kv:
            if not own_weight and grad_lse is None and grad_k.numel():
                plan = launch.without_dead_sets(plan)
            launch.backward_kv(q, k, v, grad_out, delta, shift, plan, options, grad_k=grad_k, grad_v=grad_v)
    if partial is not None:
        # Added in a fixed order, hence the same bits on every run.
        grad_weight = partial.sum(dim=(0, 1))
    return grad_q, grad_k, grad_v, grad_weight


# -- autograd -----------------------------------------------------------------------------------------------


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensors) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[2])
    ctx.is_tensor = [isinstance(value, torch.Tensor) for value in inputs]
    ctx.numbers = [value for value in inputs if not isinstance(value, torch.Tensor)]
    ctx.save_for_backward(*output, *(value for value in inputs if isinstance(value, torch.Tensor)))


def _autograd(
    ctx: Any, grad_out: torch.Tensor | None, grad_lse: torch.Tensor | None, *_: torch.Tensor | None
) -> tuple[torch.Tensor | None, ...]:
    out, lse, set_out, *tensors = ctx.saved_tensors
    saved, numbers = iter(tensors), iter(ctx.numbers)
    inputs = [next(saved) if is_tensor else next(numbers) for is_tensor in ctx.is_tensor]
    *inputs, save, _, own_weight = inputs
    weight_place = 3 + _ROW_WEIGHT
    need_q, need_k, need_v = ctx.needs_input_grad[:3]
    needs = (need_q, need_k or need_v, need_k or need_v, ctx.needs_input_grad[weight_place])
    if save == SAVE_NOTHING or (needs[3] and save != SAVE_DEAD_SETS):
        raise RuntimeError(
            f"{FORWARD} was called with save={save}, which does not keep what these gradients need; "
            f"call block_sparse_attention, which chooses save by what requires a gradient"
        )
    operator: Any = torch.ops.canvas_engineering.block_sparse_attention_backward
    grads = (operator if torch.compiler.is_compiling() else BlockSparseAttentionBackward.apply)(
        torch.zeros_like(out) if grad_out is None else grad_out,
        grad_lse,
        *inputs[:3],
        out,
        lse,
        set_out,
        *inputs[3:],
        own_weight,
        needs[0],
        needs[1],
        needs[3],
    )
    result: list[torch.Tensor | None] = [None] * len(ctx.is_tensor)
    for place, grad, need in zip((0, 1, 2, weight_place), grads, needs, strict=True):
        result[place] = grad if need else None
    return tuple(result)


class BlockSparseAttention(torch.autograd.Function):
    """The forward operator with the same gradients, in the form that ``torch.func`` transforms understand."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*inputs: Any) -> Tensors:
        result: Tensors = torch.ops.canvas_engineering.block_sparse_attention(*inputs)
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensors) -> None:
        _setup_context(ctx, inputs, output)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        return _autograd(ctx, *grads)


class BlockSparseAttentionBackward(torch.autograd.Function):
    """The backward operator, refusing to be differentiated again."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*inputs: Any) -> Tensors:
        result: Tensors = torch.ops.canvas_engineering.block_sparse_attention_backward(*inputs)
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensors) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        raise NotImplementedError(
            "block_sparse_attention on the triton backend has first derivatives only; "
            "use backend='portable' for gradients of gradients"
        )


# -- vmap ---------------------------------------------------------------------------------------------------


def _vmap(operator: str) -> Callable[..., tuple[Tensors, tuple[int, ...]]]:
    """The vmap rule of an operator: one call per element, correct for every argument that may be batched.

    The dropout mask is a function of the seed and the place within an element, so elements that share a seed
    share their mask.
    """

    def rule(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Tensors, tuple[int, ...]]:
        call = getattr(getattr(torch.ops, NAMESPACE), operator.partition("::")[2])
        results = [
            call(*(arg if dim is None else arg.select(dim, i) for arg, dim in zip(args, in_dims, strict=True)))
            for i in range(info.batch_size)
        ]
        stacked = tuple(torch.stack(column) for column in zip(*results, strict=True))
        return stacked, (0,) * len(stacked)

    return rule


# -- autocast -----------------------------------------------------------------------------------------------


def _autocast(device_type: str) -> Callable[..., Tensors]:
    """The autocast rule of the forward operator: q, k and v in the dtype of autocast, the row weights as they are."""

    def rule(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *arguments: Any) -> Tensors:
        dtype = torch.get_autocast_dtype(device_type)
        with torch.autocast(device_type, enabled=False):
            result: Tensors = torch.ops.canvas_engineering.block_sparse_attention(
                q.to(dtype), k.to(dtype), v.to(dtype), *arguments
            )
        return result

    return rule


for _key in ("CPU", "CUDA"):  # ROCm devices are CUDA devices to torch
    _library.impl("block_sparse_attention", _forward, _key)
    _library.impl("block_sparse_attention_backward", _backward, _key)
    _library.impl("block_sparse_attention", _autocast(_key.lower()), f"Autocast{_key}")
torch.library.register_fake(FORWARD, _outputs, lib=_library)
torch.library.register_fake(BACKWARD, _gradients, lib=_library)
torch.library.register_autograd(FORWARD, _autograd, setup_context=_setup_context, lib=_library)
torch.library.register_vmap(FORWARD, _vmap(FORWARD), lib=_library)
torch.library.register_vmap(BACKWARD, _vmap(BACKWARD), lib=_library)
