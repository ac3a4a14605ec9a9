"""The benchmarks' correctness gate, and the masks that peers get."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from canvas_strategies import layouts, topologies
from hypothesis import given, settings, strategies as st

from canvas_engineering.attention.api import block_sparse_attention
from canvas_engineering.canvas import CanvasLayout
from canvas_engineering.cli.bench import load
from canvas_engineering.connectivity import CanvasTopology
from canvas_engineering.dispatch import AttentionDispatcher
from canvas_engineering.plan import BlockSparsePlan

gate = load("gate")
pairs_module = load("pairs")
canvas_module = load("canvases")

LAYOUT = CanvasLayout(T=3, H=4, W=4, d_model=16, regions={"a": (0, 3, 0, 3, 0, 4), "b": (0, 3, 3, 4, 0, 3)})
TOPOLOGY = CanvasTopology.causal_temporal(["a", "b"])


def problem(dtype: torch.dtype, softmax: str = "connection") -> tuple[BlockSparsePlan, list[torch.Tensor]]:
    plan = BlockSparsePlan.from_topology(TOPOLOGY, LAYOUT, softmax=softmax)  # type: ignore[arg-type]
    torch.manual_seed(0)
    return plan, [torch.randn(1, 2, plan.num_q, 8).to(dtype) for _ in range(3)]


def ours(plan: BlockSparsePlan, operands: list[torch.Tensor], cotangent: Any) -> dict[str, Any]:
    q, k, v = leaves = [x.clone().requires_grad_() for x in operands]
    out = block_sparse_attention(q, k, v, plan)
    grads = torch.autograd.grad(out, leaves, torch.from_numpy(cotangent).to(out))
    named = {"out": out} | dict(zip(("dq", "dk", "dv"), grads, strict=True))
    return {name: tensor.detach().double().numpy() for name, tensor in named.items()}


@pytest.mark.parametrize("softmax", ["connection", "joint"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_right_result_passes(dtype: torch.dtype, softmax: str) -> None:
    plan, operands = problem(dtype, softmax)
    expected = gate.expect_attention(plan, *operands)
    verdict = expected.judge(ours(plan, operands, expected.cotangent), gradients=True)
    assert verdict.ok, verdict.reason
    assert 0 < verdict.error < verdict.allowed < 0.2


@pytest.mark.parametrize("name", ["out", "dq", "dk", "dv"])
@pytest.mark.parametrize("wrong", [1e-4, float("nan")])
def test_one_wrong_number_is_red(name: str, wrong: float) -> None:
    plan, operands = problem(torch.float32)
    expected = gate.expect_attention(plan, *operands)
    actual = ours(plan, operands, expected.cotangent)
    actual[name][0, 1, 3, 2] += wrong
    verdict = expected.judge(actual, gradients=True)
    assert not verdict.ok
    assert verdict.reason.startswith(f"{name}: max error")


def test_what_is_missing_or_misshapen_is_red() -> None:
    plan, operands = problem(torch.float32)
    expected = gate.expect_attention(plan, *operands)
    actual = ours(plan, operands, expected.cotangent)
    assert "dk is missing" in expected.judge({"out": actual["out"]}, gradients=True).reason
    assert expected.judge({"out": actual["out"]}, gradients=False).ok
    actual["dv"] = actual["dv"][:, :1]
    assert "dv has shape" in expected.judge(actual, gradients=True).reason


def test_sampled_tiles_cover_part_of_the_rows_and_all_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    plan, operands = problem(torch.float32)
    assert gate.sampled_tiles(plan, 2) == list(range(plan.num_q_tiles))
    small = BlockSparsePlan.from_topology(TOPOLOGY, LAYOUT, block_q=8, block_kv=8)
    tiles = gate.sampled_tiles(small, 2, budget=40_000)
    assert 1 <= len(tiles) < small.num_q_tiles
    monkeypatch.setattr(gate, "sampled_tiles", lambda plan, heads: tiles)
    expected = gate.expect_attention(small, *operands)
    assert 0 < expected.rows.size < plan.num_q
    actual = ours(small, operands, expected.cotangent)
    assert expected.judge(actual, gradients=True).ok
    unseen = np.setdiff1d(np.arange(plan.num_q), expected.rows)
    assert not np.asarray(expected.cotangent)[:, :, unseen].any()


def test_dispatcher_gate() -> None:
    torch.manual_seed(0)
    module = AttentionDispatcher(TOPOLOGY, LAYOUT, 16, n_heads=2)
    x = torch.randn(2, LAYOUT.num_positions, 16)
    expected = gate.expect_dispatcher(module, x)
    leaf = x.clone().requires_grad_()
    out = module(leaf)
    cotangent = torch.from_numpy(expected.cotangent).to(out)
    actual = {"out": out.detach().double().numpy()} | gate.named_gradients(module, leaf, out, cotangent)
    assert set(actual) == set(expected.arrays)
    assert expected.judge(actual, gradients=True).ok
    with torch.no_grad():
        dict(module.named_parameters())["fn_modules.cross_attention.out_proj.bias"][0] += 1e-4
    assert not expected.judge({"out": module(x).detach().double().numpy()}, gradients=False).ok


@settings(max_examples=15)
@given(data=st.data())
def test_masks_for_peers_equal_the_plan(data: st.DataObject) -> None:
    layout = data.draw(layouts())
    topology = data.draw(topologies(layout))
    mine = pairs_module.Pairs(canvas_module.Declared(layout, topology))
    plan = BlockSparsePlan.from_topology(topology, layout, softmax="joint")
    masks, _ = plan.to_dense()
    dense = masks.any(axis=0)
    assert np.array_equal(mine.dense(), dense)
    everything = torch.arange(layout.num_positions)
    by_mod = mine.mask_mod("cpu")(None, None, everything[:, None], everything[None])
    assert np.array_equal(np.broadcast_to(by_mod.numpy(), dense.shape), dense)
    if mine.classes is not None:
        assert mine.classes.true_pairs() == dense.sum()
        size = -(-dense.shape[0] // 4) * 4
        padded = np.zeros((size, size), np.bool_)
        padded[: dense.shape[0], : dense.shape[0]] = dense
        blocks = padded.reshape(size // 4, 4, size // 4, 4).any(axis=(1, 3))
        assert mine.classes.visited_blocks(4) == blocks.sum()


def test_window_and_looked_up_masks() -> None:
    for name in ("video_small", "sparse_05"):
        given_canvas = canvas_module.declared(name)
        mine = pairs_module.Pairs(given_canvas)
        rows = torch.arange(0, given_canvas.layout.num_positions, 97)
        cols = torch.arange(given_canvas.layout.num_positions)
        by_mod = mine.mask_mod("cpu")(None, None, rows[:, None], cols[None])
        assert np.array_equal(by_mod.numpy(), mine.dense()[rows.numpy()])


def test_weights_of_groups_sum_to_one() -> None:
    mine = pairs_module.Pairs(canvas_module.Declared(LAYOUT, TOPOLOGY))
    total = np.zeros(LAYOUT.num_positions)
    for group, weight in zip(mine.groups, mine.weights, strict=True):
        total[group.rows] += weight
    covered = total > 0
    np.testing.assert_allclose(total[covered], 1, rtol=1e-6)
    assert covered.sum() == 3 * 12 + 3 * 3
