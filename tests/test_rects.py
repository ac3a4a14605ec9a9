"""Covers of masks by boxes: exact, disjoint, and with small boxes only where no larger one fits."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
import time

import numpy as np
import pytest
from hypothesis import given, strategies as st

from canvas_engineering.errors import CanvasError
from canvas_engineering.masks import Rect, rect_cover


def assert_covers(mask: np.ndarray, rects: list[Rect]) -> None:
    count = np.zeros(mask.shape, dtype=int)
    for rect in rects:
        assert rect.volume > 0
        count[tuple(slice(lo, hi) for lo, hi in rect.ranges)] += 1
    np.testing.assert_array_equal(count, mask)  # disjoint and exact in one


def boxes(shape: tuple[int, ...]) -> itertools.product[tuple[tuple[int, int], ...]]:
    return itertools.product(*(list(itertools.combinations(range(size + 1), 2)) for size in shape))


@given(
    st.lists(st.integers(1, 6), min_size=1, max_size=3).map(tuple),
    st.sampled_from([0.3, 0.5, 0.7, 0.9, 1.0]),
    st.integers(0, 2**32 - 1),
    st.integers(0, 9),
)
def test_small_boxes_stand_only_where_no_large_one_fits(
    shape: tuple[int, ...], density: float, seed: int, min_area: int
) -> None:
    mask = np.random.default_rng(seed).random(shape) < density
    rects = rect_cover(mask, min_area)
    assert_covers(mask, rects)
    assert [tuple(lo for lo, _ in rect.ranges) for rect in rects] == sorted(
        tuple(lo for lo, _ in rect.ranges) for rect in rects
    )
    small = np.zeros(mask.shape, dtype=bool)
    for rect in rects:
        if rect.volume < min_area:
            small[tuple(slice(lo, hi) for lo, hi in rect.ranges)] = True
    for ranges in boxes(mask.shape):
        if math.prod(hi - lo for lo, hi in ranges) >= min_area and min_area > 0:
            assert not small[tuple(slice(lo, hi) for lo, hi in ranges)].all()


def test_blocks_are_found_whole() -> None:
    mask = np.zeros((8, 9), dtype=bool)
    mask[1:4, 2:5] = mask[5:8, 0:9] = True
    assert rect_cover(mask) == [Rect(1, 4, 2, 5), Rect(5, 8, 0, 9)]
    assert rect_cover(np.ones((3, 4, 5), bool)) == [Rect(0, 3, 0, 4, 0, 5)]
    assert rect_cover(mask.T) == [Rect(0, 9, 5, 8), Rect(2, 5, 1, 4)]
    assert rect_cover(np.array([[False, True]])) == [Rect(0, 1, 1, 2)]
    assert rect_cover(np.zeros((3, 3), bool)) == []
    assert rect_cover(np.zeros((0, 3), bool)) == []
    assert rect_cover(np.asfortranarray(mask)) == rect_cover(mask)


def test_boxes_that_no_run_shows() -> None:
    # A pinwheel: runs of neither rows nor columns agree, but a box of 2 x 2 fits in the middle.
    mask = np.array([[0, 1, 0, 0], [0, 1, 1, 1], [1, 1, 1, 0], [0, 0, 1, 0]], dtype=bool)
    assert [rect.volume for rect in rect_cover(mask, min_area=4)] == [1, 4, 1, 1, 1]
    assert Rect(1, 3, 1, 3) in rect_cover(mask, min_area=4)


def test_torch_masks() -> None:
    torch = pytest.importorskip("torch")
    assert rect_cover(torch.eye(2, dtype=torch.bool)) == [Rect(0, 1, 0, 1), Rect(1, 2, 1, 2)]


def _masks(n: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    i = np.arange(n)
    return {
        "random": rng.random((n, n)) < 0.5,
        "blocks": np.kron(rng.random((n // 64, n // 64)) < 0.5, np.ones((64, 64), bool)),
        "diagonal": np.eye(n, dtype=bool),
        "causal": i[:, None] >= i,
    }


@pytest.mark.parametrize("name", ["random", "blocks", "diagonal", "causal"])
def test_large_masks(name: str) -> None:
    mask = _masks(1024)[name]
    start = time.process_time()
    rects = rect_cover(mask)
    assert time.process_time() - start < 10.0  # CPU seconds; about half a second in practice
    lo = np.array([[a for a, _ in rect.ranges] for rect in rects])
    hi = np.array([[b for _, b in rect.ranges] for rect in rects])
    # Coverage by the two-dimensional difference array: exact and disjoint if the running sums equal the mask.
    steps = np.zeros((1025, 1025), dtype=int)
    for (rows, cols), sign in (
        ((lo[:, 0], lo[:, 1]), 1),
        ((hi[:, 0], hi[:, 1]), 1),
        ((lo[:, 0], hi[:, 1]), -1),
        ((hi[:, 0], lo[:, 1]), -1),
    ):
        np.add.at(steps, (rows, cols), sign)
    np.testing.assert_array_equal(steps.cumsum(0).cumsum(1)[:1024, :1024], mask)


def test_rect_constructors_and_limits() -> None:
    rect = Rect(0, 1, 2, 4, 5, 8)
    assert rect == Rect(((0, 1), (2, 4), (5, 8))) == Rect(ranges=((0, 1), (2, 4), (5, 8)))
    assert hash(rect) == hash(Rect(ranges=((0, 1), (2, 4), (5, 8))))
    assert (rect.t0, rect.t1, rect.h0, rect.h1, rect.w0, rect.w1) == (0, 1, 2, 4, 5, 8)
    assert rect.volume == 6
    assert rect != Rect(0, 1)
    assert rect != 3
    line = Rect(3, 7)
    assert (line.t0, line.t1, line.h0, line.h1, line.w0, line.w1) == (3, 7, 0, 0, 0, 0)
    assert repr(line) == "Rect(ranges=((3, 7),))"
    assert copy.deepcopy(rect) == pickle.loads(pickle.dumps(rect)) == rect
    for wrong in ((), (1,), (1, 2, 3)):
        with pytest.raises(TypeError, match="even number of limits"):
            Rect(*wrong)
    with pytest.raises(TypeError, match="not both"):
        Rect(0, 1, ranges=((0, 1),))


def test_wrong_arguments() -> None:
    with pytest.raises(CanvasError, match="rect_cover: min_area: expected an integer >= 0, got -1"):
        rect_cover(np.ones((2, 2), bool), min_area=-1)
    with pytest.raises(CanvasError, match="rect_cover: mask: expected booleans"):
        rect_cover(np.full((2, 2), 7))
