"""Key patterns against their definitions, and the statistics and stability of random ones."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, strategies as st

from canvas_engineering.attention import LocalAttention, RandomFixedAttention
from canvas_engineering.attention.key_pattern import local_key_ranges, random_key_indices


@given(n_queries=st.integers(0, 60), n_keys=st.integers(0, 60), radius=st.integers(0, 12))
def test_local_ranges_equal_the_definition(n_queries: int, n_keys: int, radius: int) -> None:
    ranges = local_key_ranges(n_queries, n_keys, radius)
    assert ranges.lo.shape == ranges.hi.shape == (n_queries,)
    for i in range(n_queries):
        keys = [j for j in range(n_keys) if abs(i - (j * n_queries // n_keys)) <= radius]
        assert list(range(ranges.lo[i], ranges.hi[i])) == keys
    assert (np.diff(ranges.lo) >= 0).all()
    assert (np.diff(ranges.hi) >= 0).all()


def test_local_ranges_do_not_lose_digits_on_large_canvases() -> None:
    # In float32, as 0.5.0 computed places, j * N is rounded from 2**24 on.
    n_queries, n_keys, radius = 120_011, 119_989, 2
    place = np.arange(n_keys) * n_queries // n_keys
    row = np.arange(n_queries)
    ranges = local_key_ranges(n_queries, n_keys, radius)
    np.testing.assert_array_equal(ranges.lo, np.searchsorted(place, row - radius, side="left"))
    np.testing.assert_array_equal(ranges.hi, np.searchsorted(place, row + radius, side="right"))


@pytest.mark.parametrize("window_size", [0, 1, 2, 7, 8])
def test_window_size_counts_half_to_each_side(window_size: int) -> None:
    ranges = LocalAttention(4, 1, window_size=window_size).key_pattern(100, 100)
    assert ranges.hi[50] - ranges.lo[50] == 2 * (window_size // 2) + 1


@given(n_queries=st.integers(0, 30), n_keys=st.integers(0, 40), k=st.integers(1, 45), seed=st.integers(0, 2**63 - 1))
def test_random_rows_are_subsets(n_queries: int, n_keys: int, k: int, seed: int) -> None:
    index = random_key_indices(seed, n_queries, n_keys, k).index
    assert index.shape == (n_queries, min(k, n_keys))
    assert index.dtype == np.int64
    assert (np.diff(index, axis=1) > 0).all()
    if index.size:
        assert index.min() >= 0
        assert index.max() < n_keys


@pytest.mark.parametrize(("n_keys", "k"), [(10, 3), (10, 5), (10, 6), (10, 9), (200, 7)])
def test_random_rows_are_uniform(n_keys: int, k: int) -> None:
    rows = 20_000
    index = random_key_indices(5, rows, n_keys, k).index
    # Every key is in k / n_keys of the rows, every pair of keys in k (k-1) / (n_keys (n_keys-1)) of them.
    counts = np.bincount(index.ravel(), minlength=n_keys)
    p = k / n_keys
    assert np.abs(counts - rows * p).max() < 5 * np.sqrt(rows * p * (1 - p))
    both = np.isin(index, (0, n_keys - 1)).sum(axis=1) == 2
    p = k * (k - 1) / (n_keys * (n_keys - 1))
    assert abs(both.sum() - rows * p) < 5 * np.sqrt(rows * p * (1 - p)) + 1
    # Rows are independent: neighbouring rows share k * k / n_keys keys on average.
    shared = np.mean([np.intersect1d(index[i], index[i + 1]).size for i in range(2000)])
    assert abs(shared - k * k / n_keys) < 5 * np.sqrt(k / 2000)


def test_random_pattern_is_a_function_of_seed_shape_and_group() -> None:
    def draw(seed: int = 1, n_queries: int = 6, n_keys: int = 90, group_id: int = 0) -> bytes:
        return random_key_indices(seed, n_queries, n_keys, 4, group_id).index.tobytes()

    assert draw() == draw()
    assert len({draw(), draw(seed=2), draw(n_keys=91), draw(group_id=1), draw(group_id=2)}) == 5
    assert draw(n_queries=7)[: len(draw())] != draw()


def test_random_pattern_stays_the_same_between_releases() -> None:
    # A saved seed must mean the same pattern for ever; these numbers may not change.
    np.testing.assert_array_equal(
        random_key_indices(2024, 3, 1000, 4, 7).index, [[372, 669, 724, 855], [234, 262, 459, 718], [28, 199, 663, 991]]
    )
    np.testing.assert_array_equal(
        random_key_indices(2024, 3, 8, 5, 7).index, [[2, 3, 4, 6, 7], [0, 3, 4, 5, 7], [0, 1, 3, 5, 6]]
    )


def test_large_patterns_take_seconds_at_most() -> None:
    index = RandomFixedAttention(4, 1).key_pattern(115_200, 115_200).index
    assert index.shape == (115_200, 8)


def test_few_keys_are_all_read() -> None:
    index = RandomFixedAttention(4, 1, n_random=8).key_pattern(3, 5).index
    np.testing.assert_array_equal(index, np.tile(np.arange(5), (3, 1)))
