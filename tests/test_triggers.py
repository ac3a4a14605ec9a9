"""Trigger expressions: what parses, what fires, what is refused."""

from __future__ import annotations

import math
import operator

import pytest
from hypothesis import given, strategies as st

from canvas_engineering.errors import CanvasError
from canvas_engineering.program import evaluate_trigger
from canvas_engineering.triggers import Clause, Trigger, parse_trigger

SUMMARIES = {"vision.err": {"prediction": 0.5, "novelty": -2.0, "broken": math.nan}, "arm": {"l2": 3.0}}


@pytest.mark.parametrize(
    ("text", "clauses"),
    [
        ("arm.l2 > 3", [("arm", "l2", ">", 3.0)]),
        ("vision.err.prediction>=0.25", [("vision.err", "prediction", ">=", 0.25)]),
        ("  arm.l2\t!=\n-.5e+1 ", [("arm", "l2", "!=", -5.0)]),
        ("arm.l2 == +1.", [("arm", "l2", "==", 1.0)]),
        ("a.b < 1E-3 && left arm.l2 <= 0", [("a", "b", "<", 0.001), ("left arm", "l2", "<=", 0.0)]),
        ("größe.höhe > 1", [("größe", "höhe", ">", 1.0)]),
    ],
)
def test_parsing(text: str, clauses: list[tuple[str, str, str, float]]) -> None:
    assert parse_trigger(text) == Trigger(tuple(Clause(*clause) for clause in clauses))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "arm.l2",
        "arm.l2 >",
        "arm > 1",
        ".l2 > 1",
        "arm. > 1",
        "arm.l2 => 1",
        "arm.l2 = 1",
        "arm.l2 > x",
        "arm.l2 > nan",
        "arm.l2 > inf",
        "arm.l2 > 1e999",
        "arm.l2 > 1_0",
        "arm.l2 > 0x1",
        "arm.l2 > ١",
        "arm.l2 > 1 &&",
        "&& arm.l2 > 1",
        "arm.l2 > 1 & arm.l2 > 1",
        "arm.l2 > 1 || arm.l2 > 1",
        "arm.l2 > 1 arm.l2 > 1",
        "1 < arm.l2 < 4",
        "__import__('os').system('true') > 1",
    ],
)
def test_malformed_triggers(text: str) -> None:
    with pytest.raises(CanvasError, match=r"trigger: expected '<region>.<kind> <op> <number>' .* in ") as caught:
        parse_trigger(text)
    assert repr(text) in str(caught.value)
    assert evaluate_trigger(text, {"arm": {"l2": 2.0}, "1 < arm": {"l2": 2.0}}) is False


def test_trigger_of_another_type() -> None:
    with pytest.raises(CanvasError, match=r"trigger: expected a string, got 3"):
        parse_trigger(3)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "fires"),
    [
        ("vision.err.prediction > 0.25", True),
        ("vision.err.prediction > 0.5", False),
        ("vision.err.prediction >= 0.5", True),
        ("vision.err.novelty < -1 && arm.l2 == 3", True),
        ("vision.err.novelty < -1 && arm.l2 != 3", False),
        ("arm.l2 <= 3", True),
        ("arm.missing < 9", False),
        ("missing.l2 != 0", False),
        ("vision.err.broken != 0", False),
    ],
)
def test_firing(text: str, fires: bool) -> None:
    assert parse_trigger(text).fires(SUMMARIES) is fires
    assert evaluate_trigger(text, SUMMARIES) is fires
    assert evaluate_trigger(text, None) is False
    assert parse_trigger(text).fires({}) is False


def test_no_trigger_always_fires() -> None:
    assert evaluate_trigger(None, None) is True


@given(
    st.floats(allow_nan=False, allow_infinity=False),
    st.floats(allow_nan=False, allow_infinity=False),
    st.sampled_from(["<", ">", "<=", ">=", "==", "!="]),
)
def test_numbers_are_read_exactly(value: float, number: float, op: str) -> None:
    functions = {"<": operator.lt, ">": operator.gt, "<=": operator.le, ">=": operator.ge}
    expected = {"==": value == number, "!=": value != number}
    if op in functions:
        expected[op] = functions[op](value, number)
    assert evaluate_trigger(f"r.k {op} {number!r}", {"r": {"k": value}}) is expected[op]
