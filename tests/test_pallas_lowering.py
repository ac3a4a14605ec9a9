"""The lists and masks that the TPU kernels read, decoded again: no JAX involved."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from equivalence.build import plan_from_dense
from equivalence.cases import CASES, Case
from hypothesis import given, settings, strategies as st

from canvas_engineering.errors import PlanError
from canvas_engineering.kernels.pallas import lowering
from canvas_engineering.kernels.pallas.lowering import (
    FIRST_OF_SET,
    FIRST_OF_TILE,
    FULL,
    LAST_OF_SET,
    LAST_OF_TILE,
    MASKED,
    LoweredPlan,
    lower_plan,
)
from canvas_engineering.kernels.pallas.tiles import padded_head_dim, recommended_tiles, tile_problems, vmem_bytes
from canvas_engineering.plan import BlockSparsePlan


def decode(words: tuple[np.ndarray, ...], form: lowering.ListFormat) -> list[dict[str, int]]:
    """The entries of a list in order, as a kernel reads them."""
    entries = []
    flat = [word.reshape(-1).view(np.uint32) for word in words]
    for i in range(form.chunks * form.length):
        entry = dict.fromkeys(("tile", "other", "softmax_set", "mask", "flags"), 0)
        for name, field in form.fields:
            entry[name] = int(flat[field.word][i]) >> field.shift & (1 << field.bits) - 1
        entries.append(entry)
    return entries


def unpack(words: np.ndarray, rows: int) -> np.ndarray:
    """Row by row, by the definition in the module's docstring."""
    return np.stack(
        [words[8 * (i // 8 // 32) + i % 8].view(np.uint32) >> np.uint32(i // 8 % 32) & 1 for i in range(rows)]
    ).astype(bool)


def entry_mask(plan: BlockSparsePlan, lowered: LoweredPlan, entry: dict[str, int], transposed: bool) -> np.ndarray:
    """The pairs that an entry allows, ``(block_q, block_kv)``."""
    if entry["flags"] & FULL:
        return np.ones((plan.block_q, plan.block_kv), bool)
    if transposed:
        return unpack(lowered.col_masks[entry["mask"]], plan.block_kv).T
    return unpack(lowered.row_masks[entry["mask"]], plan.block_q)


def visits(plan: BlockSparsePlan) -> dict[tuple[int, int, int], np.ndarray]:
    """What the plan says: (q tile, set, kv tile) to the allowed pairs of real tokens."""
    found = {}
    for s in range(plan.num_sets):
        tile = plan.set_tile[s]
        for e in range(plan.entry_ptr[s], plan.entry_ptr[s + 1]):
            kv = plan.entry_kv[e]
            mask = plan.tile_mask(plan.entry_mask[e])[: plan.q_count[tile], : plan.kv_count[kv]]
            found[int(tile), int(s), int(kv)] = mask
    return found


def check_lists(plan: BlockSparsePlan, lowered: LoweredPlan) -> None:
    """Both lists say what the plan says, and their flags frame sets and tiles."""
    wanted = visits(plan)
    for words, form, transposed in (
        (lowered.rows, lowered.row_format, False),
        (lowered.cols, lowered.col_format, True),
    ):
        found = {}
        open_tile = open_set = None
        finished = []
        for entry in decode(words, form):
            flags, tile = entry["flags"], entry["tile"]
            if not flags:
                continue  # padding of a chunk
            if flags & FIRST_OF_TILE:
                assert open_tile is None
                open_tile = tile
            assert tile == open_tile
            q_tile = entry["other"] if transposed else tile
            own_set = entry["softmax_set"] if form.field("softmax_set") else q_tile
            if not transposed:
                if flags & FIRST_OF_SET:
                    assert open_set is None
                    open_set = own_set
                assert own_set == open_set
                if flags & LAST_OF_SET:
                    open_set = None
            if flags & (FULL | MASKED):
                kv = tile if transposed else entry["other"]
                mask = entry_mask(plan, lowered, entry, transposed)
                assert not mask[:, plan.kv_count[kv] :].any(), "padding keys must not be read"
                found[q_tile, own_set, kv] = mask[: plan.q_count[q_tile], : plan.kv_count[kv]]
            if flags & LAST_OF_TILE:
                assert open_set is None
                finished.append(open_tile)
                open_tile = None
        assert open_tile is None
        assert finished == list(range(plan.num_kv_tiles if transposed else plan.num_q_tiles)), "every tile is written"
        assert found.keys() == wanted.keys()
        for key, mask in wanted.items():
            np.testing.assert_array_equal(found[key], mask)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("blocks", [(8, 16), (16, 8), (264, 16)], ids=str)
def test_lists_say_what_the_plan_says(case: Case, blocks: tuple[int, int]) -> None:
    plan = case.plan(*blocks)
    lowered = lower_plan(plan)
    check_lists(plan, lowered)
    np.testing.assert_array_equal(lowered.row_weight[: plan.num_sets, 0], plan.row_weight)
    has_set = np.diff(plan.set_ptr) > 0
    np.testing.assert_array_equal(lowered.set_tile[lowered.tile_set[has_set]], np.flatnonzero(has_set))


@pytest.mark.parametrize("name", ["several_sets", "empty_rows", "topology", "permuted"])
def test_chunks_end_between_tiles(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = next(case for case in CASES if case.name == name)
    plan = case.plan(8, 16)
    monkeypatch.setattr(lowering, "_SPREAD_SHARE", 1 << 40)
    whole = lower_plan(plan)
    most = max(int(np.diff(plan.entry_ptr[plan.set_ptr]).max()), int(np.diff(plan.transpose.entry_ptr).max()))
    monkeypatch.setattr(lowering, "LIST_BYTES", 4 * whole.row_format.words * (most + 1))
    chunked = lower_plan(plan)
    assert chunked.row_format.chunks > 1
    assert chunked.row_format.length <= most + 1
    check_lists(plan, chunked)


def test_entries_of_a_tile_that_do_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_from_dense(np.ones((1, 16, 200), np.bool_), block_q=8, block_kv=8)
    monkeypatch.setattr(lowering, "LIST_BYTES", 40)
    with pytest.raises(
        PlanError,
        match=r"entries of one q tile must fit into 40 bytes of TPU scalar memory: at most 10 entries, got 25",
    ):
        lower_plan(plan)


def test_fields_take_as_few_words_as_they_need(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_from_dense(np.ones((1, 64, 64), np.bool_), block_q=8, block_kv=8)
    form = lower_plan(plan).row_format
    assert dict(form.fields).keys() == {"tile", "other", "flags"}, "sets are numbered like tiles, and no mask is needed"
    assert form.words == 3, "a short list: a word each"
    monkeypatch.setattr(lowering, "_SPREAD_SHARE", 1 << 40)
    form = lower_plan(plan).row_format
    assert form.words == 1
    assert (form.has_full, form.has_masked) == (True, False)


@given(
    st.integers(1, 5).flatmap(
        lambda n: st.lists(st.lists(st.integers(0, 2**20), min_size=n, max_size=n), min_size=5, max_size=5)
    )
)
@settings(max_examples=60)
def test_packing_loses_nothing(columns: list[list[int]]) -> None:
    flat = lowering.FlatEntries(*(np.array(column, np.int64) for column in columns))
    form, (words,) = lowering.pack_lists([flat], "q")
    for i, entry in enumerate(decode(words, form)):
        assert list(entry.values()) == [column[i] for column in columns]


@given(st.integers(1, 3), st.integers(1, 40), st.integers(1, 40), st.randoms(use_true_random=False))
@settings(max_examples=40)
def test_masks_survive_packing(num_masks: int, q_groups: int, kv_groups: int, random: Any) -> None:
    rng = np.random.default_rng(random.getrandbits(32))
    dense = rng.random((num_masks, 8 * q_groups, 8 * kv_groups)) < 0.5
    packed = np.packbits(dense, axis=-1, bitorder="little")
    rows = lowering.pack_along_sublanes(packed, 8 * kv_groups, transpose=False)
    cols = lowering.pack_along_sublanes(packed, 8 * kv_groups, transpose=True)
    for mask, by_row, by_col in zip(dense, rows, cols, strict=True):
        np.testing.assert_array_equal(unpack(by_row, 8 * q_groups), mask)
        np.testing.assert_array_equal(unpack(by_col, 8 * kv_groups).T, mask)


def test_unit_weights_are_recognised() -> None:
    mask = np.zeros((1, 16, 16), np.bool_)
    mask[0, :10, :3] = True  # rows 10.. have no key, and the weight 0
    assert lower_plan(plan_from_dense(mask)).unit_weight
    weights = np.ones((1, 16))
    weights[0, 4] = 0.5
    assert not lower_plan(plan_from_dense(mask, weights)).unit_weight
    weights[0, 4] = 0  # a row with keys that counts nothing
    assert not lower_plan(plan_from_dense(mask, weights)).unit_weight
    weights = np.zeros((1, 16))
    assert not lower_plan(plan_from_dense(np.ones((1, 16, 16), np.bool_), weights)).unit_weight


def test_tile_sizes() -> None:
    assert [padded_head_dim(d) for d in (1, 64, 65, 128, 129, 256)] == [64, 64, 128, 128, 256, 256]
    for dtype in ("bfloat16", "float32"):
        for head_dim in (64, 128, 256):
            assert tile_problems(*recommended_tiles(head_dim, dtype), head_dim, dtype) == []
    assert tile_problems(16, 128, 64, "bfloat16") == []
    assert tile_problems(8, 128, 64, "float32") == []
    (problem,) = tile_problems(8, 128, 64, "bfloat16")
    assert problem.startswith("block_q must be a multiple of 16 on a TPU for bfloat16, got 8 (compile the plan with ")
    problems = tile_problems(20, 64, 128, "float32")
    assert problems[0] == "block_q must be a multiple of 8 on a TPU for float32, got 20"
    assert problems[1].startswith("block_kv must be a multiple of 128 on a TPU, got 64 (compile the plan with block_q=")
    (problem,) = tile_problems(4096, 4096, 128, "float32")
    assert problem.startswith("tiles must fit into ")
    assert f"got about {vmem_bytes(4096, 4096, 128, 4)} bytes for block_q=4096, block_kv=4096" in problem
