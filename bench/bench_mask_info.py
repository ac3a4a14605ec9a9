"""``process_mask`` side by side with JAX's own, and MaskInfos of a million positions.

Every comparison first asserts that both give the same arrays, then times JAX's once (without its cache of
results) and ours several times; the ratios stand among the figures of the result.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from pytest_benchmark.fixture import BenchmarkFixture

pytest.importorskip("jax")
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_mask as masks,
    splash_attention_mask_info as jax_info,
)

from bench.conftest import Recorder
from bench.figures import figure
from bench.timing import Spread
from canvas_engineering.kernels.pallas.mask_info import (
    mask_info_from_blocks,
    process_mask,
    process_mask_dkv,
)

NUM_POSITIONS = 16_384
SHAPE = (NUM_POSITIONS, NUM_POSITIONS)


def canvas_like_mask() -> masks.NumpyMask:
    """Regions of 512 positions that attend each other or not, and a band of 201 keys around each query."""
    regions = NUM_POSITIONS // 512
    array = np.kron(np.random.default_rng(0).random((regions, regions)) < 0.3, np.ones((512, 512), bool))
    for query in range(NUM_POSITIONS):
        array[query, max(0, query - 100) : query + 101] = True
    return masks.NumpyMask(array)


MASKS: dict[str, Callable[[], Any]] = {
    "blocks_and_band": canvas_like_mask,
    "causal": lambda: masks.CausalMask(SHAPE),
    "local": lambda: masks.LocalMask(SHAPE, (1024, 1024), 0),
    "causal_and_local": lambda: masks.CausalMask(SHAPE) & masks.LocalMask(SHAPE, (1024, None), 0),
}


@pytest.mark.parametrize("is_dkv", [False, True], ids=["fwd", "dkv"])
@pytest.mark.parametrize("block", [128, 512])
@pytest.mark.parametrize("name", MASKS)
def test_process_mask(benchmark: BenchmarkFixture, recorder: Recorder, name: str, block: int, is_dkv: bool) -> None:
    benchmark.group = f"process_mask {NUM_POSITIONS} x {NUM_POSITIONS}"
    heads = masks.MultiHeadMask([MASKS[name]()])
    theirs = jax_info.process_mask_dkv if is_dkv else jax_info.process_mask
    ours = process_mask_dkv if is_dkv else process_mask

    start = time.perf_counter()
    expected, _ = theirs(heads, (block, block))  # a new mask, so not one of its cached results
    jax_seconds = time.perf_counter() - start
    info, _ = benchmark.pedantic(ours, (heads, (block, block)), rounds=5, warmup_rounds=1)
    for field, actual, wanted in zip(expected._fields, info, expected, strict=True):
        assert np.array_equal(np.asarray(actual), np.asarray(wanted)), field
    if benchmark.stats is not None:
        ratios = Spread.of([jax_seconds / seconds for seconds in benchmark.stats.stats.data])
        side = "dkv" if is_dkv else "forward"
        recorder.results.figures.append(figure(f"process_mask-{name}-{block}-{side}", ratios.as_list(), "x", ""))


@pytest.mark.parametrize("is_dkv", [False, True], ids=["fwd", "dkv"])
def test_a_million_positions(benchmark: BenchmarkFixture, is_dkv: bool) -> None:
    """8,192 x 8,192 blocks of 128 x 128 with 200 entries per row, one in three of them partial."""
    num_blocks, per_row, block = 8192, 200, 128
    rng = np.random.default_rng(0)
    step = num_blocks // per_row
    columns = rng.integers(0, step, (num_blocks, per_row)) + np.arange(per_row) * step
    mask_index = np.where(rng.random(columns.size) < 1 / 3, rng.integers(0, 40, columns.size), -1)
    benchmark.group = "mask_info_from_blocks 1048576 x 1048576"
    info = benchmark(
        mask_info_from_blocks,
        num_blocks,
        num_blocks,
        block,
        block,
        np.arange(num_blocks + 1) * per_row,
        columns.ravel().astype(np.int32),
        mask_index.astype(np.int32),
        rng.random((40, block, block)) < 0.5,
        is_dkv=is_dkv,
    )
    assert np.count_nonzero(info.block_mask) == columns.size
