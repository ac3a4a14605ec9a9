"""The packed arrays that the kernels read, decoded again; they are the plan and nothing else."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from equivalence.cases import CASES, Case

from canvas_engineering.errors import PlanError
from canvas_engineering.kernels.triton import layout
from canvas_engineering.kernels.triton.lower import lower_columns, lower_plan, mask_words, pack_columns, pack_rows
from canvas_engineering.plan import BlockSparsePlan
from triton_backend.operands import two_sets

CPU = torch.device("cpu")


def records(array: np.ndarray, *parts: tuple[int, Any]) -> list[np.ndarray]:
    """``(count, size)`` per part, and the unused entry at the end."""
    found, start = [], 0
    for count, size in parts:
        found.append(array[start : start + count * size.value].reshape(count, size.value))
        start += count * size.value
    assert array[start:].tolist() == [0] * layout.ENTRY_SIZE.value
    return found


def allowed(plan: BlockSparsePlan, words: np.ndarray, mask: int) -> np.ndarray:
    """The pairs of a tile, from words of 32 keys, as a kernel reads them."""
    if mask < 0:
        return np.ones((plan.block_q, plan.block_kv), bool)
    per_row = -(-plan.block_kv // 32)
    rows = words[mask * plan.block_q * per_row :][: plan.block_q * per_row].reshape(plan.block_q, per_row)
    keys = np.arange(plan.block_kv)
    return (rows[:, keys // 32] >> (keys % 32)) & 1 != 0


def tokens_of(plan: BlockSparsePlan, lowered: Any, position: int, count: int) -> np.ndarray:
    if plan.is_contiguous:
        return position + np.arange(count)
    return lowered.tokens.numpy()[position : position + count]


@pytest.mark.parametrize("blocks", [(16, 16), (8, 40), (24, 72)], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_arrays_mean_the_plan(case: Case, blocks: tuple[int, int]) -> None:
    plan = case.build(*blocks)
    lowered, words = lower_plan(plan, CPU), mask_words(plan)
    q_tiles, sets, entries = records(
        pack_rows(plan),
        (plan.num_q_tiles, layout.Q_TILE_SIZE),
        (plan.num_sets, layout.SET_SIZE),
        (plan.num_entries, layout.ENTRY_SIZE),
    )
    kv_tiles, seen = records(
        pack_columns(plan), (plan.num_kv_tiles, layout.KV_TILE_SIZE), (plan.num_entries, layout.ENTRY_SIZE)
    )
    want = plan.to_dense()[0].sum(0)
    by_rows, by_columns = np.zeros((2, plan.num_q, plan.num_kv), np.int64)
    work = []
    for position, count, first_set, last_set, end, *_ in q_tiles:
        rows = tokens_of(plan, lowered, position, count)
        work.append(0)
        for s in range(first_set, last_set):
            begin, end = end, sets[s, layout.SET_LAST_ENTRY.value]
            work[-1] += end - begin
            assert sets[s, layout.SET_POSITION.value] == position
            assert sets[s, layout.SET_COUNT.value] == count
            for key_position, key_count, mask, own_set in entries[begin:end]:
                keys = tokens_of(plan, lowered, key_position, key_count)
                assert own_set == s
                assert mask >= 0 or (count == plan.block_q and key_count == plan.block_kv)
                bits = allowed(plan, words, mask)
                assert not bits[count:].any()
                assert not bits[:, key_count:].any()
                by_rows[np.ix_(rows, keys)] += bits[:count, :key_count]
    assert work == sorted(work, reverse=True)  # longest first
    work = []
    for position, count, begin, end in kv_tiles:
        keys = tokens_of(plan, lowered, position, count)
        work.append(end - begin)
        for row_position, row_count, mask, _ in seen[begin:end]:
            rows = tokens_of(plan, lowered, row_position, row_count)
            by_columns[np.ix_(rows, keys)] += allowed(plan, words, mask)[:row_count, :count]
    assert work == sorted(work, reverse=True)
    np.testing.assert_array_equal(by_rows, want)
    np.testing.assert_array_equal(by_columns, want)


def test_lowered_once_per_device() -> None:
    plan = two_sets()
    assert lower_plan(plan, CPU) is lower_plan(plan, CPU)
    assert lower_columns(plan, CPU) is lower_columns(plan, CPU)
    assert lower_plan(plan, torch.device("meta")).rows.device.type == "meta"
    assert lower_plan(plan, CPU).rows.device.type == "cpu"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"row_weight": np.broadcast_to(np.float32(0), (2**27, 16))}, "at most 2147483647 row weights, got 2147483648"),
        ({"entry_kv": np.broadcast_to(np.int32(0), (2**31,))}, "at most 2147483647 blocks of tiles, got 2147483648"),
        (
            {"entry_kv": np.broadcast_to(np.int32(0), (2**29,)), "block_kv": 136},
            "at most 2147483647 blocks of tiles, got 2684354560",
        ),
    ],
)
def test_plans_beyond_32_bits_are_refused(change: dict[str, Any], message: str) -> None:
    """Before anything is allocated for them."""
    with pytest.raises(PlanError, match=message):
        lower_plan(replace(two_sets(), _lowered={}, **change), CPU)
