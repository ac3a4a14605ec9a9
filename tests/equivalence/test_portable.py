"""The portable backend's own machinery: every way to cut a plan, pieces, skipped problems, other devices' path."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from canvas_engineering.attention.api import block_sparse_attention
from canvas_engineering.kernels.portable import (
    access,
    jax_backend,
    rectangles,
    row_classes,
    torch_backend,
    torch_math,
    torch_plan,
)
from canvas_engineering.kernels.portable.rectangles import Batch, lower_to_batches
from canvas_engineering.plan import BlockSparsePlan
from equivalence.backends import PORTABLE_JAX, PORTABLE_TORCH
from equivalence.build import plan_from_dense
from equivalence.cases import BY_NAME, CASES, Case, Options, make_inputs
from equivalence.tolerance import assert_close, round_inputs

#: Cost constants that leave one way to cut a plan.
WAYS = {
    "rectangles": {"KEY_COST": 0, "PROBLEM_COST": 0, "ROW_COST": 0, "DENSE_LIMIT": 0},
    "strips": {"KEY_COST": 5000, "DENSE_LIMIT": 0},
    "dense": {"BATCH_COST": 0, "MASKED_PAIR_COST": 0, "KEY_COST": 0},
}


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    for name, value in WAYS[request.param].items():
        monkeypatch.setattr(rectangles, name, value)
    return str(request.param)


def fresh(case: Case, block_q: int = 16, block_kv: int = 16) -> BlockSparsePlan:
    """A plan that has not been lowered yet."""
    return case.build(block_q, block_kv)


def meaning(plan: BlockSparsePlan, batches: list[Batch]) -> np.ndarray:
    """``(S, num_q, num_kv)``: how often each pair is computed; every slot must be met once."""
    counts = np.zeros(plan.to_dense()[0].shape, np.int64)
    met = np.zeros(plan.row_weight.size, np.int64)
    for batch in batches:
        for g, (rows, slots, keys) in enumerate(zip(batch.rows, batch.slots, batch.keys, strict=True)):
            mask = np.ones((rows.size, keys.size), bool)
            if batch.masks is not None and batch.mask_index is not None:
                mask = batch.masks[batch.mask_index[g]]
            assert mask.any(axis=1).all()
            s = slots // plan.block_q
            np.testing.assert_array_equal(plan.q_tokens[plan.set_tile[s], slots % plan.block_q], rows)
            i, j = np.nonzero(mask)
            np.add.at(counts, ((s - plan.set_ptr[plan.set_tile[s]])[i], rows[i], keys[j]), 1)
            np.add.at(met, slots, 1)
    assert met.max(initial=0) <= 1
    return counts


@pytest.mark.parametrize("blocks", [(16, 16), (8, 32), (64, 8)], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_batches_mean_the_plan(way: str, case: Case, blocks: tuple[int, int]) -> None:
    plan = fresh(case, *blocks)
    batches = lower_to_batches(plan)
    np.testing.assert_array_equal(meaning(plan, batches), plan.to_dense()[0])
    if way == "rectangles":
        assert all(batch.masks is None for batch in batches)
    if way == "strips" and case.name == "window" and blocks == (16, 16):
        assert any(batch.masks is not None for batch in batches)


def test_ways_are_chosen_by_cost() -> None:
    """Blocks become rectangles, bands become strips, small scattered masks one dense problem."""
    n = np.arange(4096)
    blocks = BlockSparsePlan.from_mask(n[:, None] // 512 == n // 512, block_q=64, block_kv=64)
    (batch,) = lower_to_batches(blocks)
    assert batch.shape == (8, 512, 512)
    assert batch.masks is None
    band = BlockSparsePlan.from_mask(np.abs(n[:, None] - n) <= 8, block_q=64, block_kv=64)
    batches = lower_to_batches(band)
    assert all(batch.masks is not None for batch in batches)
    computed = sum(np.prod(batch.shape) for batch in batches)
    assert computed < 0.7 * band.stats().computed_pairs
    # Interior strips repeat their masks.
    assert max(batch.rows.shape[0] / batch.masks.shape[0] for batch in batches if batch.masks is not None) > 10
    scattered = np.random.default_rng(0).uniform(size=(100, 100)) < 0.3
    (batch,) = lower_to_batches(BlockSparsePlan.from_mask(scattered))
    assert batch.shape[0] == 1


OPTIONS = (Options(override_weight=True), Options(override_weight=True, dropout_p=0.2, seed=9))


@pytest.mark.parametrize("name", ["several_sets", "window", "permuted", "topology", "empty_rows"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_way_gives_the_same_numbers(way: str, name: str, options: Options) -> None:
    plan = fresh(BY_NAME[name])
    inputs = round_inputs(BY_NAME[name].inputs(plan), "float32")
    assert_close(PORTABLE_TORCH.run(plan, inputs, "float32", options), plan, inputs, options, "float32")


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_plan, "CPU_GATHER_BYTES", 4096)
    monkeypatch.setattr(torch_plan, "KEPT_BYTES", 4096)
    monkeypatch.setattr(torch_math, "CPU_SCORES", 500)
    monkeypatch.setattr(jax_backend, "CPU_SCORES", 500)
    monkeypatch.setattr(row_classes, "CHUNK", 100)
    monkeypatch.setattr(rectangles, "CHUNK", 100)


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("name", ["several_sets", "window", "permuted", "joint"])
def test_pieces_give_the_same_numbers(way: str, name: str) -> None:
    plan = fresh(BY_NAME[name])
    np.testing.assert_array_equal(meaning(plan, lower_to_batches(plan)), plan.to_dense()[0])
    inputs = round_inputs(BY_NAME[name].inputs(plan), "float32")
    for options in OPTIONS:
        assert_close(PORTABLE_TORCH.run(plan, inputs, "float32", options), plan, inputs, options, "float32")


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("name", ["several_sets", "window"])
def test_pieces_of_jax_give_the_same_numbers(name: str) -> None:
    plan = fresh(BY_NAME[name])
    inputs = round_inputs(BY_NAME[name].inputs(plan), "float32")
    options = OPTIONS[1]
    assert_close(PORTABLE_JAX.run(plan, inputs, "float32", options), plan, inputs, options, "float32")


def test_operands_in_plan_order_are_slices() -> None:
    """Regions in plan order need no gathers; in canvas order one permutation moves less than many gathers."""
    region = np.random.default_rng(0).permutation(256) // 64  # four scattered regions
    own = region[:, None] == region
    others = [np.tile(region == index, (256, 1)) for index in range(4)]
    order = np.argsort(region, kind="stable")
    plan = plan_from_dense(np.stack([own, *others]), block_q=16, block_kv=16, q_order=order, kv_order=order)
    lowering = access.lower(plan)
    assert lowering.q_order is not None
    assert lowering.kv_order is not None
    for lowered in (lowering, access.lower(plan.in_plan_order)):
        assert lowered.assigns_all_rows
        for problems in lowered.problems:
            assert problems.rows.run is not None
            assert all(read.keys.run is not None for read in problems.reads)
    assert access.lower(plan.in_plan_order).q_order is None
    inputs = round_inputs(make_inputs(plan, 2, 2, 1, 8, seed=0), "float32")
    for backend in (PORTABLE_TORCH, PORTABLE_JAX):
        assert_close(backend.run(plan, inputs, "float32", OPTIONS[1]), plan, inputs, OPTIONS[1], "float32")


def test_hash_collisions_are_resolved() -> None:
    high = np.array([7, 7, 5, 7], np.uint64)
    low = np.array([1, 2, 1, 1], np.uint64)
    first, inverse = row_classes._unique(high, low)
    assert first.tolist() == [0, 1, 2]
    assert inverse.tolist() == [0, 1, 2, 0]


def test_dead_problems_are_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights of 0 that need no gradient cost nothing: inactive regions and triggers that do not fire."""
    calls: list[int] = []
    flash = torch_backend._flash

    def counted(q: torch.Tensor, *rest: object, **options: object) -> object:
        calls.append(q.shape[1] * q.shape[2])
        return flash(q, *rest, **options)

    monkeypatch.setattr(torch_backend, "_flash", counted)
    n = np.arange(2048)
    plan = BlockSparsePlan.from_mask(n[:, None] // 256 == n // 256, block_q=64, block_kv=64)
    q, k, v = torch.randn(3, 1, 1, 2048, 8)
    whole = block_sparse_attention(q, k, v, plan)
    assert sum(calls) == 2048
    weight = torch.from_numpy(plan.row_weight.copy())
    token = torch.from_numpy(plan.q_tokens)[plan.set_tile]
    weight[token < 1024] = 0
    calls.clear()
    half = block_sparse_attention(q, k, v, plan, row_weight=weight)
    assert sum(calls) == 1024
    assert not half[:, :, :1024].any()
    torch.testing.assert_close(half[:, :, 1024:], whole[:, :, 1024:])
    calls.clear()
    assert not block_sparse_attention(q, k, v, plan, row_weight=torch.zeros_like(weight)).any()
    assert not calls
    # A gradient of the weights needs every output.
    block_sparse_attention(q, k, v, plan, row_weight=weight.requires_grad_()).sum().backward()
    assert sum(calls) == 2048
    assert weight.grad is not None
    assert bool(weight.grad[token < 1024].any())


@pytest.mark.parametrize("name", ["several_sets", "window", "permuted", "blocks"])
def test_other_devices_use_the_frameworks_own_autograd(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """The path of devices that are neither CPU nor have a kernel here, forced on the CPU."""

    def composed(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, w: torch.Tensor, call: object
    ) -> tuple[object, None]:
        return torch_backend._composed(q, k, v, w, call), None  # type: ignore[arg-type]

    monkeypatch.setattr(torch_backend._Attention, "apply", composed)
    plan = fresh(BY_NAME[name])
    inputs = round_inputs(BY_NAME[name].inputs(plan), "float32")
    for options in (Options(), Options(override_weight=True)):
        assert_close(PORTABLE_TORCH.run(plan, inputs, "float32", options), plan, inputs, options, "float32")


def test_gradients_survive_a_second_backward_pass() -> None:
    plan = BY_NAME["several_sets"].plan()
    q, k, v = torch.randn(3, 1, 2, plan.num_q, 8, requires_grad=True)
    out = block_sparse_attention(q, k, v, plan).sum()
    first = torch.autograd.grad(out, (q, k, v), retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(out, (q, k, v)), first)


def test_changed_operands_are_noticed() -> None:
    plan = BY_NAME["several_sets"].plan()
    q, k, v = torch.randn(3, 1, 2, plan.num_q, 8, requires_grad=True).unbind()
    out = block_sparse_attention(q * 1, k * 1, kept := v * 1, plan).sum()
    kept.data.add_(0)  # not a change that autograd sees
    with torch.no_grad():
        kept.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()


def test_a_renumbered_plan_gives_renumbered_results() -> None:
    plan = BY_NAME["topology"].plan()
    q, k, v = torch.randn(3, 1, 2, plan.num_q, 8)
    order = torch.from_numpy(plan.q_order.astype(np.int64))
    kv_order = torch.from_numpy(plan.kv_order.astype(np.int64))
    want = block_sparse_attention(q, k, v, plan)[:, :, order]
    got = block_sparse_attention(q[:, :, order], k[:, :, kv_order], v[:, :, kv_order], plan.in_plan_order)
    torch.testing.assert_close(got, want)


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
def test_results_do_not_depend_on_threads() -> None:
    plan = BY_NAME["several_sets"].plan()
    q, k, v = torch.randn(3, 1, 2, plan.num_q, 8, requires_grad=True)
    results = []
    for count in (1, 2, 1):
        torch.set_num_threads(count)
        out = block_sparse_attention(q, k, v, plan)
        results.append([out, *torch.autograd.grad(out.square().sum(), (q, k, v))])
    for one in results[1:]:
        for a, b in zip(one, results[0], strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", ["several_sets", "window"])
@pytest.mark.parametrize("has_instructions", [False, True])
def test_half_precision_on_either_kind_of_cpu(
    has_instructions: bool, name: str, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With instructions for it and without; then it is float32 within, rounded once at the end."""
    monkeypatch.setattr(torch_backend, "_multiplies", lambda dtype: has_instructions or dtype.itemsize > 2)
    used = set()
    flash = torch_backend._flash

    def seen(q: torch.Tensor, *rest: object, **options: object) -> object:
        used.add(q.dtype)
        return flash(q, *rest, **options)

    monkeypatch.setattr(torch_backend, "_flash", seen)
    case, options = BY_NAME[name], Options(override_weight=True)
    plan = fresh(case)
    inputs = round_inputs(case.inputs(plan), dtype)
    assert_close(PORTABLE_TORCH.run(plan, inputs, dtype, options), plan, inputs, options, dtype)
    assert used == {getattr(torch, dtype) if has_instructions else torch.float32}


def test_capabilities_of_the_cpu_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    multiplies = torch_backend._multiplies.__wrapped__
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True}, raising=False)
    assert multiplies(torch.bfloat16)
    assert not multiplies(torch.float16)
    assert multiplies(torch.float32)
    assert multiplies(torch.float64)
    monkeypatch.delattr(torch.cpu, "get_capabilities")  # torch before it knew
    assert not multiplies(torch.bfloat16)
