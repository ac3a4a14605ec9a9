"""MaskInfo against JAX's own and against its meaning; ``test_mask_info_splash.py`` runs a kernel with it."""

from __future__ import annotations

import subprocess
import sys
import tracemalloc
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

jax = pytest.importorskip("jax")
import jax.numpy as jnp  # noqa: E402
from jax.experimental.pallas.ops.tpu.splash_attention import (  # noqa: E402
    splash_attention_mask as masks,
    splash_attention_mask_info as jax_info,
)

from canvas_engineering.errors import CanvasError  # noqa: E402
from canvas_engineering.kernels.pallas.mask_info import (  # noqa: E402
    MaskInfo,
    mask_info_from_blocks,
    process_dynamic_mask,
    process_dynamic_mask_dkv,
    process_mask,
    process_mask_dkv,
)

PROCESS = {False: process_mask, True: process_mask_dkv}
JAX_PROCESS = {False: jax_info.process_mask, True: jax_info.process_mask_dkv}


class Case(NamedTuple):
    heads: masks.MultiHeadMask
    block_shape: tuple[int, int]
    is_dkv: bool
    options: dict[str, Any]


def divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def block_structured(seed: int, rows: int, columns: int, block_q: int, block_kv: int) -> np.ndarray:
    """A mask ``(rows * block_q, columns * block_kv)`` of empty and full blocks and three partial patterns."""
    rng = np.random.default_rng(seed)
    patterns = rng.random((5, block_q, block_kv)) < 0.5
    patterns[:2] = np.array([False, True])[:, None, None]
    weights = rng.dirichlet(np.full(5, 0.4))
    chosen = patterns[rng.choice(5, size=(rows, columns), p=weights)]
    return chosen.swapaxes(1, 2).reshape(rows * block_q, columns * block_kv)


@st.composite
def single_masks(draw: st.DrawFn, rows: int, columns: int, block_q: int, block_kv: int, depth: int = 2) -> Any:
    """One mask of any of JAX's classes, ``&`` and ``|`` of them included."""
    shape = num_q, num_kv = rows * block_q, columns * block_kv
    size = st.integers(-2, num_kv + 2)
    kind = draw(st.sampled_from(["blocks", "cells", "causal", "local", "chunked", "full", "and", "or"]))
    if kind in ("and", "or") and depth:
        left, right = (draw(single_masks(rows, columns, block_q, block_kv, depth - 1)) for _ in range(2))
        return left & right if kind == "and" else left | right
    if kind == "full":
        return masks.FullMask(shape)
    mask: Any
    if kind == "causal":
        mask = masks.CausalMask(shape, offset=draw(st.integers(-num_q, num_kv)))
    elif kind == "local":
        window = draw(st.tuples(st.none() | size, st.none() | size))
        mask = masks.LocalMask(shape, window, offset=draw(st.integers(-num_q, num_kv)))
    elif kind == "chunked":
        mask = masks.ChunkedCausalMask(shape, draw(st.integers(1, num_kv + 1)))
    else:
        seed = draw(st.integers(0, 2**32 - 1))
        if kind == "blocks":
            array = block_structured(seed, rows, columns, block_q, block_kv)
        else:
            array = np.random.default_rng(seed).random(shape) < draw(st.sampled_from([0.0, 0.02, 0.5, 0.98]))
        return masks.NumpyMask(np.asfortranarray(array) if draw(st.booleans()) else array)
    if draw(st.integers(0, 5)) == 0:  # queries in another order, as for zigzag sharding
        mask.q_sequence = np.array(draw(st.permutations(range(num_q))), dtype=np.int32)
    return mask


@st.composite
def cases(draw: st.DrawFn) -> Case:
    block_q, block_kv = (draw(st.sampled_from([1, 2, 3, 4, 8, 16])) for _ in range(2))
    rows, columns = draw(st.integers(1, 8)), draw(st.integers(1, 8))
    num_heads = draw(st.integers(1, 6))
    pool = draw(st.lists(single_masks(rows, columns, block_q, block_kv), min_size=1, max_size=3))
    choice = st.sampled_from(pool)
    head_shards = draw(st.sampled_from(divisors(num_heads)))
    if draw(st.booleans()):  # one mask per shard of heads, which is stored once per shard
        per_shard = [draw(choice) for _ in range(head_shards)]
        heads = [mask for mask in per_shard for _ in range(num_heads // head_shards)]
    else:
        heads = [draw(choice) for _ in range(num_heads)]
    return Case(
        masks.MultiHeadMask(heads),
        (block_q, block_kv),
        draw(st.booleans()),
        {
            "downcast_smem_data": draw(st.booleans()),
            "head_shards": head_shards,
            "q_seq_shards": draw(st.sampled_from(divisors(rows))),
            "shrink_grid": draw(st.booleans()),
        },
    )


def dense_of(mask: Any) -> np.ndarray:
    num_q, num_kv = mask.shape
    return np.asarray(mask[(slice(0, num_q), slice(0, num_kv))]).astype(bool)


def tiles_of(dense: np.ndarray, block_shape: tuple[int, int]) -> np.ndarray:
    """``(num_q, num_kv)`` cut into ``(num_q_blocks, num_kv_blocks, block_q, block_kv)``."""
    (num_q, num_kv), (block_q, block_kv) = dense.shape, block_shape
    return dense.reshape(num_q // block_q, block_q, num_kv // block_kv, block_kv).swapaxes(1, 2)


def jax_can_answer(case: Case) -> bool:
    """False for the two inputs on which JAX's own fails: an empty shard, shards without partial blocks."""
    if not case.options["shrink_grid"] or len(set(case.heads.masks)) > 1:
        return True
    tiles = tiles_of(dense_of(case.heads.masks[0]), case.block_shape)
    some, every = tiles.any(axis=(2, 3)), tiles.all(axis=(2, 3))
    shards = some.reshape(case.options["q_seq_shards"], -1)
    return bool(shards.any(axis=1).all()) and (len(shards) == 1 or bool((some & ~every).any()))


def assert_equal_info(actual: Any, expected: Any) -> None:
    assert actual._fields == expected._fields
    for field, ours, theirs in zip(actual._fields, actual, expected, strict=True):
        if theirs is None or isinstance(theirs, bool):
            assert ours is theirs, field
        else:
            assert ours is not None, field
            assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype), field
            np.testing.assert_array_equal(ours, theirs, err_msg=field)


def decode(info: MaskInfo, plane: int, grid: tuple[int, int], is_dkv: bool, q_seq_shards: int) -> np.ndarray:
    """The tiles that the kernel computes with, visit by visit, from the arrays of one plane."""
    assert info.data_next is not None
    assert info.block_mask is not None
    data_next, block_mask = np.asarray(info.data_next[plane]), np.asarray(info.block_mask[plane])
    partial = info.partial_mask_blocks
    stored = None if partial is None else np.asarray(partial).swapaxes(1, 2) if is_dkv else np.asarray(partial)
    block = (1, 1) if stored is None else stored.shape[1:]
    tiles = np.zeros((*grid, *block), bool)
    for row, column in zip(*np.nonzero(block_mask), strict=True):
        where = (row, int(data_next[row, column]))
        if is_dkv:
            shard = row // (len(data_next) // q_seq_shards)
            where = (shard * (grid[0] // q_seq_shards) + int(data_next[row, column]), column)
        assert not tiles[where].any(), "visited twice"
        if block_mask[row, column] == 2:
            tiles[where] = True
        else:
            assert stored is not None
            assert info.mask_next is not None
            tiles[where] = stored[info.mask_next[plane, row, column]]
    return tiles


@settings(max_examples=250, deadline=None)
@given(cases())
def test_equal_to_jax_on_any_mask(case: Case) -> None:
    info, function = PROCESS[case.is_dkv](case.heads, case.block_shape, **case.options)
    if jax_can_answer(case):
        expected, expected_function = JAX_PROCESS[case.is_dkv](case.heads, case.block_shape, **case.options)
        assert_equal_info(info, expected)
        assert (function is None) == (expected_function is None)
    if function is not None:
        assert info.q_sequence is not None
        computed = function(info.q_sequence[:, None], np.arange(case.heads.shape[2])[None, :])
        np.testing.assert_array_equal(computed, dense_of(case.heads.masks[0]))


@settings(max_examples=150, deadline=None)
@given(cases())
def test_arrays_decode_to_the_mask(case: Case) -> None:
    stored = [masks.NumpyMask(dense_of(mask)) for mask in case.heads.masks]
    info, _ = process_mask(masks.MultiHeadMask(stored), case.block_shape, is_dkv=case.is_dkv, **case.options)
    assert info.block_mask is not None
    heads_per_plane = len(stored) // info.block_mask.shape[0]
    for head, mask in enumerate(stored):
        tiles = tiles_of(mask.array, case.block_shape)
        decoded = decode(info, head // heads_per_plane, tiles.shape[:2], case.is_dkv, case.options["q_seq_shards"])
        np.testing.assert_array_equal(np.broadcast_to(decoded, tiles.shape), tiles)


@settings(max_examples=150, deadline=None)
@given(cases(), st.integers(0, 2**32 - 1))
def test_from_blocks_equals_process_mask(case: Case, seed: int) -> None:
    rng = np.random.default_rng(seed)
    tiles = tiles_of(dense := dense_of(case.heads.masks[0]), case.block_shape)
    rows, columns = tiles.shape[:2]
    # Empty blocks may be listed, full ones may come as masks, masks may repeat in any order or be unused.
    listed = tiles.any(axis=(2, 3)) | (rng.random((rows, columns)) < 0.1)
    row, column = np.nonzero(listed)
    as_mask = ~tiles[row, column].all(axis=(1, 2)) | (rng.random(len(row)) < 0.2)
    stored = tiles[row, column][as_mask]
    order = rng.permutation(len(stored))
    mask_index = np.full(len(row), -1, np.int32)
    mask_index[as_mask] = np.argsort(order)
    info = mask_info_from_blocks(
        rows,
        columns,
        *case.block_shape,
        np.concatenate([[0], np.cumsum(listed.sum(axis=1))]),
        column.astype(np.int32),
        mask_index,
        stored[order],
        is_dkv=case.is_dkv,
        **case.options,
    )
    alike = masks.MultiHeadMask([masks.NumpyMask(dense)] * len(case.heads.masks))
    expected, _ = process_mask(alike, case.block_shape, is_dkv=case.is_dkv, **case.options)
    assert_equal_info(info, expected)


def test_equal_masks_are_found_equal() -> None:
    array = block_structured(3, 4, 4, 8, 8)
    heads = masks.MultiHeadMask([masks.NumpyMask(array.copy()) for _ in range(4)])
    assert_equal_info(process_mask(heads, (8, 8))[0], jax_info.process_mask(heads, (8, 8))[0])
    assert process_mask(heads, (8, 8))[0].data_next.shape[0] == 1  # type: ignore[union-attr]


@pytest.mark.parametrize("is_dkv", [False, True])
@pytest.mark.parametrize("columns", [127, 128, 129, 300])
def test_integer_types_at_their_limits(columns: int, is_dkv: bool) -> None:
    rows, columns = (columns, 3) if is_dkv else (3, columns)
    array = np.zeros((rows, columns), bool)
    array[-1, -1] = array[0, 0] = True
    heads = masks.MultiHeadMask([masks.NumpyMask(array)])
    actual, _ = PROCESS[is_dkv](heads, (1, 1))
    assert_equal_info(actual, JAX_PROCESS[is_dkv](heads, (1, 1))[0])


@pytest.mark.parametrize("shrink_grid", [False, True])
def test_query_blocks_are_counted_from_the_start_of_the_shard(shrink_grid: bool) -> None:
    heads = masks.MultiHeadMask([masks.NumpyMask(np.random.default_rng(0).random((256, 6)) < 0.5)])
    for q_seq_shards, dtype in ((1, np.int16), (2, np.int8)):
        options = {"q_seq_shards": q_seq_shards, "shrink_grid": shrink_grid}
        info, _ = process_mask_dkv(heads, (1, 3), **options)  # type: ignore[arg-type]
        assert info.data_next is not None
        assert info.data_next.dtype == dtype
        assert_equal_info(info, jax_info.process_mask_dkv(heads, (1, 3), **options)[0])


def test_two_partial_sides_may_make_an_empty_or_a_full_block() -> None:
    past, future = masks.CausalMask((24, 24)), masks.LocalMask((24, 24), (-1, None), 0)
    kinds = {}
    for name, mask in (("both", past & future), ("either", past | future)):
        info, _ = process_mask(masks.MultiHeadMask([mask]), (8, 8), shrink_grid=False)
        kinds[name] = np.unique(np.asarray(info.block_mask)).tolist()
        assert info.partial_mask_blocks is None
    assert kinds == {"both": [0], "either": [2]}


@pytest.mark.parametrize("is_dkv", [False, True])
@pytest.mark.parametrize("q_seq_shards", [1, 2])
def test_empty_mask_keeps_one_empty_step(is_dkv: bool, q_seq_shards: int) -> None:
    heads = masks.MultiHeadMask([masks.NumpyMask(np.zeros((32, 48), bool))] * 2)
    info, function = process_mask(heads, (8, 8), is_dkv=is_dkv, head_shards=2, q_seq_shards=q_seq_shards)
    zeros = np.zeros((2, q_seq_shards, 6) if is_dkv else (2, 4, 1), np.int8)
    assert_equal_info(info, MaskInfo(zeros, None, zeros, None, None))
    assert function is None


def test_sequence_shards_without_partial_blocks() -> None:
    array = np.zeros((32, 32), bool)
    array[:8, :8] = array[8:16, :24] = array[24:, 16:] = True
    info, _ = process_mask(masks.MultiHeadMask([masks.NumpyMask(array)]), (8, 8), q_seq_shards=2)
    # The second shard is one narrower, and repeats its last column.
    expected = MaskInfo(
        data_next=np.array([[[0, 0, 0], [0, 1, 2], [0, 0, 0], [2, 3, 3]]], np.int8),
        mask_next=None,
        block_mask=np.array([[[2, 0, 0], [2, 2, 2], [0, 0, 0], [2, 2, 0]]], np.int8),
        partial_mask_blocks=None,
        q_sequence=None,
    )
    assert_equal_info(info, expected)


def test_computable_mask_is_left_to_the_kernel() -> None:
    mask = masks.LocalMask((64, 64), (9, 3), offset=1)
    info, function = process_mask_dkv(masks.MultiHeadMask([mask] * 3), (16, 8))
    assert function is not None
    positions = np.arange(64)
    np.testing.assert_array_equal(function(positions[:, None], positions[None, :]), dense_of(mask))
    assert info.q_sequence is mask.q_sequence
    assert info.mask_next is None
    assert info.partial_mask_blocks is None
    assert info.is_dynamic_mask is None

    # jit compiles anew for another function, so an equal mask must not bring another one.
    equal, other = masks.LocalMask((64, 64), (9, 3), offset=1), masks.LocalMask((64, 64), (9, 4), offset=1)
    assert process_mask(masks.MultiHeadMask([equal]), (16, 16))[1] is function
    assert process_mask(masks.MultiHeadMask([other]), (16, 16))[1] is not function


class RecordingMask(masks.Mask):
    """A mask that is only known by asking it, and remembers how often it was asked."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array
        self.reads: list[int] = []

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    def __getitem__(self, index: Any) -> np.ndarray:
        cells = self.array[index].copy()
        self.reads.append(cells.size)
        return cells


def test_masks_that_cannot_be_compared_are_different() -> None:
    class Incomparable(RecordingMask):
        __hash__ = None  # type: ignore[assignment]

    array = block_structured(3, 4, 4, 8, 8)
    first, second = Incomparable(array), Incomparable(array)
    info, _ = process_mask(masks.MultiHeadMask([first, second, first]), (8, 8))
    alike = process_mask(masks.MultiHeadMask([masks.NumpyMask(array)]), (8, 8), shrink_grid=False)[0]
    assert info.block_mask is not None
    assert alike.block_mask is not None
    np.testing.assert_array_equal(info.block_mask, np.repeat(alike.block_mask, 3, axis=0))


def test_unknown_masks_are_read_once_in_strips() -> None:
    block = 64
    array = np.kron(np.random.default_rng(0).random((96, 96)) < 0.3, np.ones((block, block), bool))
    mask = RecordingMask(array)
    process_mask(masks.MultiHeadMask([mask]), (block, block))
    assert sum(mask.reads) == array.size
    assert max(mask.reads) <= 1 << 21
    assert len(mask.reads) < 30  # JAX's own: 2 * 96 * 96


def test_a_causal_mask_of_a_million_positions_is_never_read() -> None:
    mask = masks.CausalMask((1 << 20, 1 << 20))
    info, _ = process_mask(masks.MultiHeadMask([mask]), (2048, 4096))
    assert info.block_mask is not None
    assert info.block_mask.shape == (1, 512, 256)
    assert np.array_equal((info.block_mask[0] > 0).sum(axis=1), np.arange(512) // 2 + 1)
    assert np.array_equal((info.block_mask[0] == 1).sum(axis=1), np.ones(512))


@pytest.mark.parametrize("is_dkv", [False, True])
def test_a_million_positions_from_blocks(is_dkv: bool) -> None:
    num_blocks, per_row, block = 8192, 200, 128
    rng = np.random.default_rng(1)
    step = num_blocks // per_row
    columns = rng.integers(0, step, (num_blocks, per_row)) + np.arange(per_row) * step
    mask_index = np.where(rng.random(columns.size) < 0.3, rng.integers(0, 40, columns.size), -1)
    stored = rng.random((40, block, block)) < 0.5
    tracemalloc.start()
    try:
        info = mask_info_from_blocks(
            num_blocks,
            num_blocks,
            block,
            block,
            np.arange(num_blocks + 1) * per_row,
            columns.ravel().astype(np.int32),
            mask_index.astype(np.int32),
            stored,
            q_seq_shards=4,
            is_dkv=is_dkv,
        )
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert info.block_mask is not None
    assert np.count_nonzero(info.block_mask) == columns.size
    assert peak < 200e6  # one bit per pair of positions would be 137e9


DYNAMIC = {False: process_dynamic_mask, True: process_dynamic_mask_dkv}
JAX_DYNAMIC = {False: jax_info.process_dynamic_mask, True: jax_info.process_dynamic_mask_dkv}


@pytest.mark.parametrize("is_dkv", [False, True])
@pytest.mark.parametrize(
    ("num_heads", "rows", "columns", "options"),
    [
        (1, 4, 3, {}),
        (4, 6, 5, {"head_shards": 2, "q_seq_shards": 3}),
        (3, 2, 2, {"head_shards": 3, "downcast_smem_data": False, "shrink_grid": False}),
        (2, 4, 130, {"q_seq_shards": 2}),
        (1, 128, 1, {}),
    ],
)
def test_dynamic_equal_to_jax(num_heads: int, rows: int, columns: int, options: dict[str, Any], is_dkv: bool) -> None:
    array = np.stack([block_structured(seed, rows, columns, 4, 8) for seed in range(num_heads)])
    expected, _ = jax.jit(lambda mask: JAX_DYNAMIC[is_dkv](mask, (4, 8), **options))(array)
    # is_dynamic_mask has to stay a Python bool, so it cannot be a result of jit.
    info, function = DYNAMIC[is_dkv](jnp.asarray(array), (4, 8), **options)
    assert function is None
    assert info.is_dynamic_mask is True
    traced, _ = jax.jit(lambda mask: DYNAMIC[is_dkv](mask, (4, 8), **options))(array)
    for actual in (info, traced):
        assert_equal_info(actual._replace(is_dynamic_mask=True), expected._replace(is_dynamic_mask=True))


GOOD_HEADS = masks.MultiHeadMask([masks.CausalMask((32, 32))] * 4)


@pytest.mark.parametrize(
    ("block_shape", "options", "message"),
    [
        ((12, 8), {}, "block_q must divide num_q, got 12 and 32"),
        ((8, 12), {}, "block_kv must divide num_kv, got 12 and 32"),
        ((8, 0), {}, r"block_shape\[1\] must be a positive integer, got 0"),
        ((-8, 8), {}, r"block_shape\[0\] must be a positive integer, got -8"),
        ((8, 8, 8), {}, r"block_shape must be \(block_q, block_kv\), got \(8, 8, 8\)"),
        ((8, 8), {"head_shards": 3}, "head_shards must divide the number of heads, got 3 and 4"),
        ((8, 8), {"head_shards": 1.5}, "head_shards must be a positive integer, got 1.5"),
        ((8, 8), {"q_seq_shards": 8}, "q_seq_shards must divide the number of query blocks .* got 8 and 4"),
        ((8, 8), {"q_seq_shards": 0}, "q_seq_shards must be a positive integer, got 0"),
    ],
)
def test_blocks_and_shards_that_do_not_fit(block_shape: Any, options: dict[str, Any], message: str) -> None:
    dense = jnp.ones((4, 32, 32), bool)
    for process in (process_mask, process_mask_dkv):
        with pytest.raises(CanvasError, match=message):
            process(GOOD_HEADS, block_shape, **options)
    for process_dynamic in (process_dynamic_mask, process_dynamic_mask_dkv):
        with pytest.raises(CanvasError, match=message):
            process_dynamic(dense, block_shape, **options)


def test_masks_that_are_none() -> None:
    with pytest.raises(ValueError, match=r"mask must be a MultiHeadMask .*got CausalMask of shape \(8, 8\)"):
        process_mask(masks.CausalMask((8, 8)), (8, 8))
    with pytest.raises(ValueError, match=r"got ndarray of shape .* process_dynamic_mask takes arrays"):
        process_mask(np.ones((1, 8, 8), bool), (8, 8))
    with pytest.raises(ValueError, match=r"mask must be an array of bool, got .* and dtype float32"):
        process_dynamic_mask(jnp.ones((1, 8, 8)), (8, 8))
    with pytest.raises(ValueError, match="mask must be an array of bool, got list"):
        process_dynamic_mask([[[True]]], (1, 1))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"must have three dimensions \(heads, .* got shape \(8, 8\)"):
        process_dynamic_mask(jnp.ones((8, 8), bool), (8, 8))
    half = masks.NumpyMask(np.ones((8, 8), bool))
    half.mask_function = np.less  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=r"both q_sequence and mask_function .*NumpyMask with only mask_fun"):
        process_mask(masks.MultiHeadMask([half]), (8, 8))


def blocks_input(**changes: Any) -> dict[str, Any]:
    """Two rows of three blocks of 4 x 8, and what a test wants wrong about them."""
    good = {
        "num_q_blocks": 2,
        "num_kv_blocks": 3,
        "block_q": 4,
        "block_kv": 8,
        "row_ptr": np.array([0, 2, 3]),
        "kv_index": np.array([0, 2, 1], np.int32),
        "mask_index": np.array([-1, 0, 0], np.int32),
        "partial_mask_blocks": np.eye(4, 8, dtype=bool)[None],
    }
    return {**good, **changes}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_q_blocks": 0}, "num_q_blocks must be a positive integer, got 0"),
        ({"block_kv": -8}, "block_kv must be a positive integer, got -8"),
        ({"q_seq_shards": 4}, "q_seq_shards must divide the number of query blocks .* got 4 and 2"),
        ({"head_shards": 0}, "head_shards must be a positive integer, got 0"),
        ({"row_ptr": np.array([0, 3])}, r"row_ptr must be an integer array of shape \(3,\), got .*\(2,\)"),
        ({"row_ptr": np.array([0.0, 2, 3])}, "row_ptr must be an integer array .* dtype float64"),
        ({"row_ptr": np.array([0, 2, 4])}, "row_ptr must ascend from 0 to the number of entries, 3, got 0 to 4"),
        ({"row_ptr": np.array([1, 2, 3])}, "row_ptr must ascend from 0 .* got 1 to 3"),
        ({"row_ptr": np.array([0, 4, 3])}, "row_ptr must ascend .* smallest step -1"),
        ({"kv_index": np.array([0, 3, 1])}, r"kv_index must lie in 0\.\.2, got values from 0 to 3"),
        ({"kv_index": np.array([-1, 2, 1])}, r"kv_index must lie in 0\.\.2, got values from -1 to 2"),
        ({"kv_index": np.array([2, 0, 1])}, "kv_index must strictly ascend .* got 2 before 0 in row 0"),
        ({"kv_index": np.array([0, 0, 1])}, "kv_index must strictly ascend .* got 0 before 0 in row 0"),
        ({"mask_index": np.array([-2, 0, 0])}, r"mask_index must lie in -1\.\.0, got values from -2 to 0"),
        ({"mask_index": np.array([-1, 0, 1])}, r"mask_index must lie in -1\.\.0, got values from -1 to 1"),
        ({"mask_index": np.array([-1, 0])}, r"mask_index must be an integer array of shape \(3,\)"),
        ({"partial_mask_blocks": None}, r"mask_index must lie in -1\.\.-1, got values from -1 to 0"),
        (
            {"partial_mask_blocks": np.zeros((1, 8, 4), bool)},
            r"partial_mask_blocks must be a bool array of shape \(num_masks, 4, 8\), got .*\(1, 8, 4\)",
        ),
        (
            {"partial_mask_blocks": np.zeros((1, 4, 8))},
            "partial_mask_blocks must be a bool array .* dtype float64",
        ),
    ],
)
def test_block_lists_that_are_damaged(changes: dict[str, Any], message: str) -> None:
    mask_info_from_blocks(**blocks_input())
    with pytest.raises(CanvasError, match=message):
        mask_info_from_blocks(**blocks_input(**changes))


def test_block_lists_need_no_jax() -> None:
    code = (
        "import sys, numpy as np\n"
        "from canvas_engineering.kernels.pallas.mask_info import mask_info_from_blocks\n"
        "one = np.zeros(1, np.int32)\n"
        "info = mask_info_from_blocks(1, 1, 8, 8, np.array([0, 1]), one, one - 1, None)\n"
        "assert info.block_mask.tolist() == [[[2]]]\n"
        "loaded = {'jax', 'torch', 'triton'} & set(sys.modules)\n"
        "assert not loaded, loaded\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
