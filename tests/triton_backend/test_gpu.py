"""What only a GPU can show: no synchronisation, CUDA graphs, streams, TF32, another device than the current one."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from canvas_engineering.kernels.triton import backend
from canvas_engineering.plan import BlockSparsePlan
from triton_backend.operands import one_set, operands, portable, triton, two_sets, weights

pytestmark = pytest.mark.gpu


def leaves_of(plan: BlockSparsePlan, device: str = "cuda", **options: Any) -> list[torch.Tensor]:
    return [*operands(plan, device, requires_grad=True, **options), weights(plan, device, requires_grad=True)]


def forward_and_backward(
    plan: BlockSparsePlan, leaves: list[torch.Tensor], seed: torch.Tensor | int
) -> list[torch.Tensor]:
    out = triton(*leaves[:3], plan, row_weight=leaves[3], dropout_p=0.25, seed=seed)
    return [out, *torch.autograd.grad(out.square().sum(), leaves)]


# torch warns that it does not see every synchronisation.
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.parametrize("seed", [7, torch.tensor([7])], ids=["int", "tensor"])
def test_the_host_never_waits_for_the_device(seed: torch.Tensor | int) -> None:
    plan = two_sets()
    leaves = leaves_of(plan)
    seed = seed if isinstance(seed, int) else seed.cuda()
    want = forward_and_backward(plan, leaves, seed)  # the first call lowers the plan, which copies it to the device
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = forward_and_backward(plan, leaves, seed)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_captured_in_a_cuda_graph() -> None:
    """Forward and backward, replayed with other operands, weights and seed than were captured."""
    plan = two_sets()
    static, seed = leaves_of(plan), torch.tensor([3], device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            forward_and_backward(plan, static, seed)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = forward_and_backward(plan, static, seed)
    for number in (3, 4):
        with torch.no_grad():
            seed.fill_(number)
            for x in static:
                x.copy_(torch.rand_like(x))
            static[3][0] = 0  # a set whose weights are all zero: compaction of the lists is part of the graph
        graph.replay()
        want = forward_and_backward(plan, [x.detach().clone().requires_grad_() for x in static], number)
        torch.testing.assert_close(captured, want, rtol=0, atol=0)


def test_another_stream_than_the_default_one() -> None:
    plan = two_sets()
    want = forward_and_backward(plan, leaves_of(plan), 1)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        got = forward_and_backward(plan, leaves_of(plan), 1)
    stream.synchronize()
    torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_another_gpu_than_the_current_one() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip(f"needs 2 GPUs, got {torch.cuda.device_count()}")
    plan = two_sets()
    want = forward_and_backward(plan, leaves_of(plan, "cuda:0"), 1)
    with torch.cuda.device(0):
        got = forward_and_backward(plan, leaves_of(plan, "cuda:1"), 1)
    torch.testing.assert_close([x.cpu() for x in got], [x.cpu() for x in want], rtol=0, atol=0)


def test_tf32_by_choice() -> None:
    """Off by default; on, results differ from IEEE products by TF32's rounding and no more."""
    plan = one_set()
    q, k, v = operands(plan, "cuda", head_dim=64)
    exact = portable(q, k, v, plan)
    torch.testing.assert_close(triton(q, k, v, plan), exact)
    rounded = backend.attention(q, k, v, plan, scale=64**-0.5, allow_tf32=True)
    assert isinstance(rounded, torch.Tensor)
    if torch.version.hip is None:
        assert not torch.equal(rounded, triton(q, k, v, plan))
    # Products of operands with 10 bits; the result is a mean of values of size 1 with weights off by scores' errors.
    torch.testing.assert_close(rounded, exact, rtol=0, atol=16 * 2.0**-11)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor", "ignore:TensorFloat32 tensor cores")
def test_compiled_by_inductor_with_cuda_graphs() -> None:
    torch.compiler.reset()
    plan = two_sets()
    q, k, v = operands(plan, "cuda")
    compiled = torch.compile(lambda q, k, v: triton(q, k, v, plan) + 1, fullgraph=True, mode="reduce-overhead")
    for _ in range(3):
        torch.compiler.cudagraph_mark_step_begin()
        got = compiled(q, k, v).clone()
    torch.testing.assert_close(got, triton(q, k, v, plan) + 1, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("head_dim", [64, 72, 128, 256])
def test_large_plans_with_every_block_of_the_tables(dtype: torch.dtype, head_dim: int) -> None:
    """Several hundred tiles: more programs than the GPU runs at once, and loops long enough to be pipelined."""
    from equivalence.backends import TRITON_GPU
    from equivalence.cases import Options, make_inputs
    from equivalence.tolerance import assert_close, round_inputs

    name = str(dtype).removeprefix("torch.")
    for block_q, block_kv in ((128, 128), (64, 32), (16, 64)):
        plan = BlockSparsePlan.from_mask(
            (torch.arange(700)[:, None] // 96 == torch.arange(900) // 120).numpy(), block_q=block_q, block_kv=block_kv
        )
        inputs = round_inputs(make_inputs(plan, 1, 2, 1, head_dim, seed=0), name)
        options = Options(override_weight=True, dropout_p=0.1, seed=2)
        assert_close(TRITON_GPU.run(plan, inputs, name, options), plan, inputs, options, name)
