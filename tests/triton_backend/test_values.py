"""Values where the kernels have the most to go wrong: tile and head sizes, strides, dropout bits, weights of zero."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from equivalence.backends import TRITON_INTERPRETED, Backend, poisoned_memory
from equivalence.build import plan_from_dense
from equivalence.cases import Options, make_inputs
from equivalence.tolerance import assert_close, round_inputs

from canvas_engineering.kernels.reference.dropout import keep_mask
from canvas_engineering.kernels.triton import launch
from canvas_engineering.plan import BlockSparsePlan
from triton_backend.operands import one_set, operands, portable, triton, two_sets, weights

EVERYTHING = Options(override_weight=True, dropout_p=0.2, seed=11)


@pytest.fixture
def backend(device: str) -> Backend:
    return replace(TRITON_INTERPRETED, device=device)


def test_memory_is_poisoned(device: str) -> None:
    """What the suite relies on to see an element that no kernel wrote."""
    like = torch.ones(4, 3, device=device)
    with poisoned_memory():
        assert torch.empty_like(like).isnan().all()
        assert like.new_empty((2, 5)).isnan().all()


# -- sizes --------------------------------------------------------------------------------------------------


def plan_of_tiles(block_q: int, block_kv: int, *, permuted: bool = False) -> BlockSparsePlan:
    """A little more than one tile each way, in two sets: a full tile, a partial one, and padding."""
    rng = np.random.default_rng(block_q * 1000 + block_kv)
    num_q, num_kv = block_q + 3, block_kv + 5
    masks = np.zeros((2, num_q, num_kv), np.bool_)
    masks[0, : block_q + 1] = True
    masks[1] = rng.uniform(size=(num_q, num_kv)) < 0.3
    masks[1, :, :4] = False  # at least one key in every row, below
    masks[1, :, 4] = True
    orders: dict[str, Any] = {}
    if permuted:
        orders = {"q_order": rng.permutation(num_q), "kv_order": rng.permutation(num_kv)}
    weight = rng.uniform(0.1, 1, (2, num_q))
    return plan_from_dense(masks, weight, block_q=block_q, block_kv=block_kv, **orders)


@pytest.mark.parametrize("permuted", [False, True], ids=["slices", "gathers"])
@pytest.mark.parametrize(
    "tile", [(8, 8), (8, 128), (24, 40), (48, 72), (64, 8), (96, 32), (16, 160), (128, 64)], ids=str
)
def test_tile_sizes(backend: Backend, tile: tuple[int, int], permuted: bool) -> None:
    """Tiles that are one block, several blocks, or less than a block; of any multiple of 8."""
    plan = plan_of_tiles(*tile, permuted=permuted)
    inputs = round_inputs(make_inputs(plan, 1, 1, 1, 8, seed=0), "float32")
    assert_close(backend.run(plan, inputs, "float32", EVERYTHING), plan, inputs, EVERYTHING, "float32")


@pytest.mark.parametrize("head_dim", [8, 16, 40, 64, 72, 96, 128, 192, 256])
def test_head_dims(backend: Backend, head_dim: int) -> None:
    plan = two_sets()
    for dtype, options in (("float32", Options()), ("bfloat16", EVERYTHING)):
        inputs = round_inputs(make_inputs(plan, 1, 1, 1, head_dim, seed=0), dtype)
        assert_close(backend.run(plan, inputs, dtype, options), plan, inputs, options, dtype)


@pytest.mark.parametrize("num_q", [1, 7, 17])
@pytest.mark.parametrize("num_kv", [1, 15, 16, 18])
def test_any_number_of_tokens(backend: Backend, num_q: int, num_kv: int) -> None:
    plan = plan_from_dense(np.ones((1, num_q, num_kv), np.bool_), block_q=16, block_kv=16)
    inputs = round_inputs(make_inputs(plan, 1, 2, 1, 8, seed=0), "float32")
    options = Options(lse=True)
    assert_close(backend.run(plan, inputs, "float32", options), plan, inputs, options, "float32")


def test_scale_of_either_sign_and_none(backend: Backend) -> None:
    plan = one_set()
    inputs = round_inputs(make_inputs(plan, 1, 1, 1, 8, seed=0), "float32")
    for scale in (-1.0, 0.0, 2.5):
        options = Options(lse=True, scale=scale)
        assert_close(backend.run(plan, inputs, "float32", options), plan, inputs, options, "float32")


# -- strides ------------------------------------------------------------------------------------------------


def tokens_first(x: torch.Tensor) -> torch.Tensor:
    """The same values, stored (B, N, H, D)."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def inside_nan(x: torch.Tensor) -> torch.Tensor:
    """A slice of a larger tensor, stored (B, N, H, D), that is NaN everywhere else: a wrong address is seen."""
    batch, heads, tokens, head_dim = x.shape
    around = x.new_full((batch + 1, tokens + 4, heads + 2, head_dim + 8), torch.nan)
    inside = around[1:, 2:-2, 1:-1, 4:-4].transpose(1, 2)
    inside.copy_(x)
    return inside


def heads_last(x: torch.Tensor) -> torch.Tensor:
    """Stored (B, N, D, H), so that features are not neighbours."""
    return x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)


@pytest.mark.parametrize("make", [two_sets, one_set])
@pytest.mark.parametrize("stored", [tokens_first, inside_nan, heads_last])
def test_strides(
    device: str, stored: Callable[[torch.Tensor], torch.Tensor], make: Callable[[], BlockSparsePlan]
) -> None:
    """The same bits from operands, and a gradient of the output, that lie otherwise in memory."""
    plan = make()
    plain = operands(plan, device, requires_grad=True)
    strided = [stored(x.detach()).requires_grad_() for x in plain]
    grad_out = torch.randn_like(plain[0])
    want = triton(*plain, plan)
    with poisoned_memory():
        got = triton(*strided, plan)
        grads = torch.autograd.grad(got, strided, stored(grad_out))
    torch.testing.assert_close(got, want, rtol=0, atol=0)
    torch.testing.assert_close(grads, torch.autograd.grad(want, plain, grad_out), rtol=0, atol=0)


def test_strided_operands_are_not_copied(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[int]] = []
    forward = launch.forward

    def recording(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any, **options: Any) -> None:
        seen.append([q.data_ptr(), k.data_ptr(), v.data_ptr()])
        forward(q, k, v, *rest, **options)

    monkeypatch.setattr(launch, "forward", recording)
    plan = two_sets()
    for stored in (tokens_first, inside_nan):
        strided = [stored(x) for x in operands(plan, device)]
        out = triton(*strided, plan)
        assert seen.pop() == [x.data_ptr() for x in strided]
        # The output lies as the queries do, so that the next layer merges heads without a copy.
        assert out.transpose(1, 2).is_contiguous()


def test_expanded_operands(device: str) -> None:
    """One batch element, one head or one token standing for many."""
    plan = two_sets()
    q, k, v = (x.detach().requires_grad_() for x in (y[:1, :1] for y in operands(plan, device)))
    one_query = q[:, :, :1].detach()
    for expand in (
        lambda x: x.expand(2, -1, -1, -1),
        lambda x: x.expand(-1, 2, -1, -1),
        lambda x: one_query.expand(1, 1, x.shape[2], -1),
    ):
        with poisoned_memory():
            got = triton(expand(q), expand(k), expand(v), plan)
        torch.testing.assert_close(got, triton(*(expand(x).contiguous() for x in (q, k, v)), plan), rtol=0, atol=0)
    out = triton(*(x.expand(2, 2, -1, -1) for x in (q, k, v)), plan)
    grads = torch.autograd.grad(out.sum(), (q, k, v))  # the gradient of a sum is an expanded scalar
    want = torch.autograd.grad(4 * portable(q, k, v, plan).sum(), (q, k, v))
    torch.testing.assert_close(grads, want)


def test_addresses_beyond_32_bits(device: str) -> None:
    """Tokens so far apart that the offset of the last ones exceeds 2**31 elements."""
    plan = one_set()
    apart = 2**31 // 20  # of 21 and more tokens
    elements = 28 * apart
    if device == "cuda" and torch.cuda.mem_get_info()[0] < 3 * elements:
        pytest.skip(f"needs {3 * elements:,} bytes of free GPU memory, got {torch.cuda.mem_get_info()[0]:,}")
    buffer = torch.empty(elements, dtype=torch.float16, device=device)  # on the CPU, only the touched pages exist
    plain = operands(plan, device, batch=1, heads=(1, 1), dtype=torch.float16)
    far = []
    for i, x in enumerate(plain):
        view = buffer.as_strided(x.shape, (0, 0, apart, 1), 64 * i)
        view.copy_(x)
        far.append(view.requires_grad_())
    leaves = [x.requires_grad_() for x in plain]
    got, want = triton(*far, plan), triton(*leaves, plan)
    torch.testing.assert_close(got, want, rtol=0, atol=0)
    grads = torch.autograd.grad(got.sum(), far)
    torch.testing.assert_close(grads, torch.autograd.grad(want.sum(), leaves), rtol=0, atol=0)


# -- dropout ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 2**31, 2**63 + 12345, 2**64 - 1])
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropped_pairs_are_those_of_the_reference(device: str, seed: int, p: float) -> None:
    """With equal scores and unit vectors as values, the output is the mask itself; likewise the gradient of v."""
    plan = plan_from_dense(np.ones((1, 19, 24), np.bool_), block_q=16, block_kv=16)
    q = torch.zeros(2, 1, 19, 24, device=device)
    k = torch.zeros(2, 1, 24, 24, device=device)
    v = torch.eye(24, device=device).expand(2, 1, 24, 24).clone().requires_grad_()
    out = triton(q, k, v, plan, dropout_p=p, seed=seed)
    tokens = np.arange(2)[:, None, None, None], np.arange(19)[:, None], np.arange(24)
    want = torch.from_numpy(keep_mask(seed, p, *tokens)).to(device)
    assert torch.equal(out != 0, want)
    torch.testing.assert_close(out, want / (24 * (1 - p)))
    grad_out = torch.zeros_like(out)
    grad_out[..., :19] = torch.eye(19, device=device)
    (dv,) = torch.autograd.grad(out, v, grad_out)
    assert torch.equal(dv[..., :19] != 0, want.transpose(-1, -2))


def test_seeds_as_tensors(device: str) -> None:
    plan = two_sets()
    q, k, v = operands(plan, device)
    want = triton(q, k, v, plan, dropout_p=0.5, seed=2**64 - 3)
    got = triton(q, k, v, plan, dropout_p=0.5, seed=torch.tensor([-3], device=device))
    torch.testing.assert_close(got, want, rtol=0, atol=0)


# -- weights ------------------------------------------------------------------------------------------------


def three_regions() -> BlockSparsePlan:
    """48 tokens in three tiles; set 0 reads the own tile, set 1 the next one."""
    tile = np.arange(48) // 16
    own = tile[:, None] == tile
    following = (tile[:, None] + 1) % 3 == tile
    return plan_from_dense(np.stack([own, following]), block_q=16, block_kv=16)


@pytest.mark.parametrize("kept", [0, 1])
@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_sets_with_weight_zero_are_not_computed(device: str, activation: str, kept: int) -> None:
    """Keys that only dead sets read are NaN, which any computation with them would spread."""
    plan = three_regions()
    alive = np.zeros(plan.row_weight.shape, np.float32)
    dead_keys = slice(32, 48) if kept == 0 else slice(0, 16)
    for s in range(plan.num_sets):  # sets of a tile: its own keys, then the next tile's, in the order of the masks
        tile, which = plan.set_tile[s], s - plan.set_ptr[plan.set_tile[s]]
        alive[s] = float(which == kept and tile != 2)
    row_weight = torch.from_numpy(alive).to(device)
    q, k, v = operands(plan, device)
    for x in (k, v):
        x[:, :, dead_keys] = torch.nan
    leaves = [x.requires_grad_() for x in (q, k, v)]
    with poisoned_memory():
        out = triton(*leaves, plan, row_weight=row_weight, activation=activation)
        grads = torch.autograd.grad(out.sum(), leaves)
    finite = [x.detach().nan_to_num().requires_grad_() for x in leaves]
    want = portable(*finite, plan, row_weight=row_weight, activation=activation)
    torch.testing.assert_close(out, want)
    torch.testing.assert_close(grads, torch.autograd.grad(want.sum(), finite))


def test_part_of_a_tile_without_weight(device: str) -> None:
    """Rows that the forward kernel skips in a tile that it does not: their own output is never written."""
    plan = plan_of_tiles(96, 32)
    row_weight = torch.from_numpy(plan.row_weight.copy())
    row_weight[0, :40] = 0  # one block of 32 rows, and some of the next
    row_weight[1, 32:] = 0
    row_weight = row_weight.to(device)
    leaves = operands(plan, device, batch=1, requires_grad=True)
    with poisoned_memory():
        out = triton(*leaves, plan, row_weight=row_weight)
        grads = torch.autograd.grad(out.square().sum(), leaves)
    want = portable(*leaves, plan, row_weight=row_weight)
    torch.testing.assert_close(out, want)
    torch.testing.assert_close(grads, torch.autograd.grad(want.square().sum(), leaves))


def test_dead_sets_leave_the_list_of_the_keys(device: str) -> None:
    """The entries that stay keep their order, whatever their number: the compaction runs in blocks of 128."""
    mask = np.ones((1, 8 * 300, 8), np.bool_)
    plan = plan_from_dense(mask, block_q=8, block_kv=8)
    alive = np.random.default_rng(0).uniform(size=plan.num_sets) < 0.4
    row_weight = torch.from_numpy(plan.row_weight * alive[:, None]).to(device)
    from canvas_engineering.kernels.triton.lower import lower_columns, lower_plan

    lowered = lower_plan(plan, torch.device(device))
    seen = launch.Plan(
        rows=lowered.rows,
        columns=lower_columns(plan, torch.device(device)),
        tokens=lowered.tokens,
        masks=lowered.masks,
        row_weight=row_weight,
        block_q=8,
        block_kv=8,
        q_tiles=plan.num_q_tiles,
        kv_tiles=plan.num_kv_tiles,
        contiguous=lowered.contiguous,
        many_sets=False,
    )
    columns = launch.without_dead_sets(seen).columns.cpu().numpy()
    (_, _, begin, end), entries = columns[:4], columns[4:].reshape(-1, 4)
    assert (begin, end) == (0, alive.sum())
    np.testing.assert_array_equal(entries[:end, 3], np.flatnonzero(alive))
    np.testing.assert_array_equal(entries[:end, 0], 8 * np.flatnonzero(alive))


def test_a_weight_of_zero_has_a_gradient(device: str) -> None:
    plan = three_regions()
    q, k, v = operands(plan, device)
    zeros = [torch.zeros(plan.row_weight.shape, device=device, requires_grad=True) for _ in range(2)]
    got = torch.autograd.grad(triton(q, k, v, plan, row_weight=zeros[0]).sum(), zeros[0])
    want = torch.autograd.grad(portable(q, k, v, plan, row_weight=zeros[1]).sum(), zeros[1])
    assert want[0].any()
    torch.testing.assert_close(got, want)


def test_weights_of_other_dtypes(device: str) -> None:
    plan = two_sets()
    q, k, v = operands(plan, device)
    row_weight = weights(plan, device).double().requires_grad_()
    out = triton(q, k, v, plan, row_weight=row_weight)
    torch.testing.assert_close(out, triton(q, k, v, plan, row_weight=row_weight.detach().float()), rtol=0, atol=0)
    assert torch.autograd.grad(out.sum(), row_weight)[0].dtype == torch.float64


# -- from run to run ----------------------------------------------------------------------------------------


def test_the_same_bits_on_every_run(device: str) -> None:
    plan = two_sets()
    results = []
    for _ in range(2 if device == "cpu" else 20):
        leaves = [
            *operands(plan, device, heads=(4, 2), dtype=torch.float16, requires_grad=True),
            weights(plan, device, requires_grad=True),
        ]
        out = triton(*leaves[:3], plan, row_weight=leaves[3], dropout_p=0.2, seed=1)
        results.append([out, *torch.autograd.grad(out.float().square().sum(), leaves)])
    for one in results[1:]:
        for a, b in zip(one, results[0], strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_results_are_rounded_to_nearest(device: str, dtype: torch.dtype) -> None:
    """One key per row, with score 0: the result is its value times the weight, and only the last step rounds."""
    plan = plan_from_dense(np.eye(40, dtype=np.bool_)[None], np.full((1, 40), 0.7), block_q=16, block_kv=16)
    _, k, v = operands(plan, device, heads=(1, 1), dtype=dtype)
    want = (v.float() * torch.tensor(0.7, dtype=torch.float32, device=device)).to(dtype)
    assert torch.equal(triton(torch.zeros_like(k), k, v, plan), want)
