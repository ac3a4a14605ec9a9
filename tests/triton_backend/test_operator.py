"""The PyTorch operators: opcheck, fake tensors, torch.compile, autocast, torch.func, and what autograd asks of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from canvas_engineering import block_sparse_attention
from canvas_engineering.kernels.triton import backend
from canvas_engineering.plan import BlockSparsePlan
from triton_backend.operands import one_set, operands, portable, triton, two_sets, weights

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "dropout": {"dropout_p": 0.3, "seed": 5},
    "sigmoid": {"activation": "sigmoid"},
}


def captured_call(plan: BlockSparsePlan, device: str, **options: Any) -> tuple[Any, ...]:
    """The arguments with which a call of the backend reaches the operator."""
    seen: list[tuple[Any, ...]] = []

    class Recording:
        @staticmethod
        def apply(*arguments: Any) -> Any:
            seen.append(arguments)
            return real.apply(*arguments)

    from canvas_engineering.kernels.triton import operator

    real = operator.BlockSparseAttention
    q, k, v = operands(plan, device, requires_grad=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(operator, "BlockSparseAttention", Recording)
        triton(q, k, v, plan, **options)
    return seen[0]


# -- opcheck and fake tensors -------------------------------------------------------------------------------


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_opcheck(device: str, options: dict[str, Any]) -> None:
    plan = two_sets()
    row_weight = weights(plan, device, requires_grad=True) if options else None
    arguments = captured_call(plan, device, row_weight=row_weight, **options)
    torch.library.opcheck(torch.ops.canvas_engineering.block_sparse_attention.default, arguments)


def test_opcheck_of_the_log_sum_exp(device: str) -> None:
    arguments = captured_call(one_set(), device, return_lse=True)
    torch.library.opcheck(torch.ops.canvas_engineering.block_sparse_attention.default, arguments)


def test_opcheck_of_the_backward_operator(device: str) -> None:
    plan = two_sets()
    arguments = captured_call(plan, device, row_weight=weights(plan, device, requires_grad=True))
    inputs = [x.detach() if isinstance(x, torch.Tensor) else x for x in arguments]
    outputs = torch.ops.canvas_engineering.block_sparse_attention(*inputs)
    *inputs, _, _, own_weight = inputs
    torch.library.opcheck(
        torch.ops.canvas_engineering.block_sparse_attention_backward.default,
        (torch.ones_like(outputs[0]), None, *inputs[:3], *outputs, *inputs[3:], own_weight, True, True, True),
    )


def test_fake_tensors_tell_shape_dtype_and_strides(device: str) -> None:
    """Also before the plan was ever lowered, and without leaving fake tensors behind in the plan."""
    plan = two_sets()
    with FakeTensorMode() as mode:
        q, k, v = (mode.from_tensor(x.transpose(1, 2).contiguous().transpose(1, 2)) for x in operands(plan, device))
        fake = triton(q, k, v, plan)
    real = triton(*(x.transpose(1, 2).contiguous().transpose(1, 2) for x in operands(plan, device)), plan)
    assert (fake.shape, fake.dtype, fake.stride()) == (real.shape, real.dtype, real.stride())
    torch.testing.assert_close(real, portable(*operands(plan, device), plan))


# -- torch.compile ------------------------------------------------------------------------------------------


def results(call: Callable[..., Any], plan: BlockSparsePlan, device: str, batch: int, options: Any) -> list[Any]:
    """Output and gradients."""
    leaves = [*operands(plan, device, batch=batch, requires_grad=True), weights(plan, device, requires_grad=True)]
    q, k, v, row_weight = leaves
    out = call(q, k, v, plan, row_weight=row_weight, **options)
    return [out, *torch.autograd.grad(out.square().sum(), leaves)]


# torch looks at .grad of the operator's output and hides the warning in a way that does not hide errors.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor", "ignore:TensorFloat32 tensor cores")
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_compiled_into_one_graph(device: str, options: dict[str, Any]) -> None:
    torch.compiler.reset()
    compiled = torch.compile(triton, fullgraph=True, backend="aot_eager" if device == "cpu" else "inductor")
    plan = two_sets()
    got, want = (results(call, plan, device, 2, options) for call in (compiled, triton))
    torch.testing.assert_close(got, want, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
def test_a_dynamic_batch_is_compiled_once(device: str) -> None:
    torch.compiler.reset()
    graphs: list[Any] = []

    def count(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    plan = two_sets()
    compiled = torch.compile(triton, fullgraph=True, dynamic=True, backend=count)
    for batch in (4, 5, 6):  # no other size of the operands: equal sizes become one symbol
        got, want = (results(call, plan, device, batch, {}) for call in (compiled, triton))
        torch.testing.assert_close(got, want, rtol=0, atol=0)
    assert len(graphs) == 1


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
def test_a_dynamic_batch_through_aot_autograd(device: str) -> None:
    torch.compiler.reset()
    plan = two_sets()
    compiled = torch.compile(triton, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch in (2, 3):
        got, want = (results(call, plan, device, batch, {}) for call in (compiled, triton))
        torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_a_plan_lowered_first_while_compiling(device: str) -> None:
    """The plan's tensors are real ones, also for the calls that follow outside."""
    torch.compiler.reset()
    plan = one_set()
    compiled = torch.compile(triton, fullgraph=True, backend="aot_eager")
    got = compiled(*operands(plan, device), plan)
    torch.testing.assert_close(got, triton(*operands(plan, device), plan), rtol=0, atol=0)


# -- autocast -----------------------------------------------------------------------------------------------


def test_autocast_computes_in_its_dtype(device: str) -> None:
    plan = two_sets()
    leaves = [*operands(plan, device, requires_grad=True), weights(plan, device, requires_grad=True)]
    q, k, v, row_weight = leaves
    with torch.autocast(device, dtype=torch.bfloat16):
        out = triton(q, k, v, plan, row_weight=row_weight)
    grads = torch.autograd.grad(out.float().sum(), leaves)
    half = [x.detach().bfloat16().requires_grad_() for x in (q, k, v)]
    want = triton(*half, plan, row_weight=row_weight)
    want_grads = torch.autograd.grad(want.float().sum(), [*half, row_weight])
    torch.testing.assert_close(out, want, rtol=0, atol=0)
    assert [grad.dtype for grad in grads] == [torch.float32] * 4
    torch.testing.assert_close(grads, tuple(grad.float() for grad in want_grads), rtol=0, atol=0)


def test_autocast_accepts_operands_of_float64(device: str) -> None:
    """What counts is the dtype that the call computes in."""
    plan = two_sets()
    q, k, v = operands(plan, device, dtype=torch.float64)
    with torch.autocast(device, dtype=torch.float16):
        assert backend.reasons(q, k, v, plan) == []
        assert triton(q, k, v, plan).dtype == torch.float16
    assert backend.reasons(q, k, v, plan) != []


def test_the_operator_itself_has_an_autocast_rule(device: str) -> None:
    plan = two_sets()
    inputs = [x.detach() if isinstance(x, torch.Tensor) else x for x in captured_call(plan, device)]
    operator = torch.ops.canvas_engineering.block_sparse_attention
    with torch.autocast(device, dtype=torch.bfloat16):
        out, lse, _ = operator(*inputs)
    assert out.dtype == torch.bfloat16
    assert lse.dtype == torch.float32
    want, _, _ = operator(*(x.bfloat16() for x in inputs[:3]), *inputs[3:])
    torch.testing.assert_close(out, want, rtol=0, atol=0)


# -- torch.func ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", ["in the transform", "outside"])
def test_grad_transform(device: str, first: str) -> None:
    plan = two_sets()
    q, k, v = operands(plan, device)
    if first == "outside":
        triton(q, k, v, plan)

    def loss(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return torch.as_tensor(triton(q, k, v, plan).square().sum())

    got = torch.func.grad(loss, argnums=(0, 1, 2))(q, k, v)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    want = torch.autograd.grad(triton(*leaves, plan).square().sum(), leaves)
    torch.testing.assert_close(got, want, rtol=0, atol=0)
    for kept in plan._lowered.values():
        assert (kept if isinstance(kept, torch.Tensor) else kept.rows).data_ptr()  # no wrapper of the transform


def test_vmap_transform(device: str) -> None:
    """Over every operand; a batched seed gives every element a mask of its own."""
    plan = two_sets()
    q, k, v = (torch.stack([x, 2 * x, -x]) for x in operands(plan, device, batch=1))
    got = torch.vmap(lambda q, k, v: triton(q, k, v, plan))(q, k, v)
    torch.testing.assert_close(got, torch.stack([triton(*x, plan) for x in zip(q, k, v, strict=True)]), rtol=0, atol=0)
    shared = torch.vmap(lambda q: triton(q, k[0], v[0], plan))(q)
    torch.testing.assert_close(shared[1], triton(q[1], k[0], v[0], plan), rtol=0, atol=0)


def test_gradients_per_sample(device: str) -> None:
    plan = two_sets()
    q, k, v = (torch.stack([x, 2 * x]) for x in operands(plan, device, batch=1))

    def loss(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return torch.as_tensor(triton(q, k, v, plan).square().sum())

    got = torch.vmap(torch.func.grad(loss, argnums=(0, 1, 2)))(q, k, v)
    for i in range(2):
        want = torch.func.grad(loss, argnums=(0, 1, 2))(q[i], k[i], v[i])
        torch.testing.assert_close(tuple(grad[i] for grad in got), want, rtol=0, atol=0)


# -- autograd -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("needed", ["q", "k", "v", "w", "qk", "kv", "qv", "qw", "vw", "qkvw"])
@pytest.mark.parametrize("make", [two_sets, one_set])
def test_only_the_gradients_asked_for(device: str, make: Callable[[], BlockSparsePlan], needed: str) -> None:
    plan = make()
    names = dict(zip("qkvw", [*operands(plan, device, batch=1), weights(plan, device)], strict=True))

    def gradients(call: Callable[..., Any]) -> tuple[torch.Tensor, ...]:
        leaves = {name: x.detach().clone().requires_grad_(name in needed) for name, x in names.items()}
        out = call(leaves["q"], leaves["k"], leaves["v"], plan, row_weight=leaves["w"])
        return torch.autograd.grad(out.square().sum(), [leaves[name] for name in needed])

    torch.testing.assert_close(gradients(triton), gradients(portable))


def test_without_gradients_nothing_is_kept(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No log-sum-exp, no outputs of single sets, no plan seen from the keys."""
    from canvas_engineering.kernels.triton import launch

    kept: list[tuple[Any, Any]] = []
    forward = launch.forward

    def recording(*arguments: Any, **options: Any) -> None:
        kept.append((options["lse"], options["set_out"]))
        forward(*arguments, **options)

    monkeypatch.setattr(launch, "forward", recording)
    plan = two_sets()
    triton(*operands(plan, device), plan)
    with torch.no_grad():
        triton(*operands(plan, device, requires_grad=True), plan)
    assert kept == [(None, None)] * 2
    assert not any("columns" in str(key) for key in plan._lowered)


def test_one_operand_in_every_place(device: str) -> None:
    """Self-attention of the raw tokens: the three gradients add up."""
    n = np.arange(21)
    plan = BlockSparsePlan.from_mask(n[:, None] // 8 >= n // 8, block_q=16, block_kv=16)
    x, _, _ = operands(plan, device)
    one, two = (x.clone().requires_grad_() for _ in range(2))
    got = torch.autograd.grad(triton(one, one, one, plan).square().sum(), one)
    want = torch.autograd.grad(portable(two, two, two, plan).square().sum(), two)
    torch.testing.assert_close(got, want)


def test_a_second_backward_pass_gives_the_same(device: str) -> None:
    plan = two_sets()
    leaves = operands(plan, device, requires_grad=True)
    loss = triton(*leaves, plan).square().sum()
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(loss, leaves), first, rtol=0, atol=0)


def test_changed_operands_are_noticed(device: str) -> None:
    plan = two_sets()
    leaves = [x * 1 for x in operands(plan, device, requires_grad=True)]
    loss = triton(*leaves, plan).sum()
    with torch.no_grad():
        leaves[2].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_there_are_first_derivatives_only(device: str) -> None:
    plan = two_sets()
    leaves = operands(plan, device, requires_grad=True)
    (grad, *_) = torch.autograd.grad(triton(*leaves, plan).square().sum(), leaves, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"first derivatives only; use backend='portable' for gradients of"):
        grad.sum().backward()


def test_the_operator_says_what_it_did_not_keep(device: str) -> None:
    plan = two_sets()
    inputs = [x.detach() if isinstance(x, torch.Tensor) else x for x in captured_call(plan, device)]
    inputs[0].requires_grad_()
    inputs[-3] = 0
    out, _, _ = torch.ops.canvas_engineering.block_sparse_attention(*inputs)
    with pytest.raises(RuntimeError, match="was called with save=0, which does not keep what these gradients need"):
        out.sum().backward()


def test_backward_of_one_output_only(device: str) -> None:
    """The log-sum-exp alone, the output alone, both: what is not differentiated counts as zero."""
    plan = one_set()

    def gradients(call: Callable[..., Any], use: Callable[[Any, Any], torch.Tensor]) -> tuple[torch.Tensor, ...]:
        leaves = operands(plan, device, requires_grad=True)
        out, lse = call(*leaves, plan, return_lse=True)
        return torch.autograd.grad(use(out, lse), leaves, allow_unused=True, materialize_grads=True)

    def of_lse(out: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
        return torch.where(lse.isinf(), 0.0, lse).square().sum()

    for use in (lambda out, lse: out.sum(), of_lse, lambda out, lse: out.sum() + of_lse(out, lse)):
        torch.testing.assert_close(gradients(triton, use), gradients(portable, use))


def test_gradients_at_rows_without_keys_may_be_nan(device: str) -> None:
    """As those of a log-sum-exp of -inf are after ``logaddexp``: rows without keys have no part in the result."""
    plan = one_set()
    leaves = operands(plan, device, requires_grad=True)
    out, lse = triton(*leaves, plan, return_lse=True)
    grad_lse = torch.where(lse.isinf(), torch.nan, 1.0)
    for grad in torch.autograd.grad([out, lse], leaves, [torch.ones_like(out), grad_lse]):
        assert torch.isfinite(grad).all()


def test_public_call_takes_the_backend_by_name(device: str) -> None:
    plan = two_sets()
    q, k, v = operands(plan, device)
    torch.testing.assert_close(block_sparse_attention(q, k, v, plan, backend="triton"), portable(q, k, v, plan))
