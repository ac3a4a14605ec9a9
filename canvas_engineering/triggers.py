"""Trigger conditions over residual summaries, such as ``"vision.err.prediction > 0.25"``.

Grammar: clauses joined by ``&&``, each ``<region>.<kind> <op> <number>`` with ``op`` one of
``< > <= >= == !=``. The kind is what follows the last dot, so region names may hold dots; none of
``< > = ! & |`` may stand in either, nor quotes or parentheses in the kind. Numbers are decimal:
``3``, ``-.5``, ``+1e-3``. Text is parsed, never evaluated as code.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from canvas_engineering.errors import CanvasError

Summaries = Mapping[str, Mapping[str, float]]
"""Region to kind to value, as ``ResidualAccumulator.summaries()`` returns it."""

_COMPARE: dict[str, Callable[[float, float], bool]] = {
    "<": operator.lt,
    ">": operator.gt,
    "<=": operator.le,
    ">=": operator.ge,
    "==": operator.eq,
    "!=": operator.ne,
}

_NAME = r"[^\s<>=!&|]"
_CLAUSE = re.compile(
    rf"\s*(?P<region>{_NAME}(?:[^<>=!&|]*{_NAME})?)\.(?P<kind>[^.\s<>=!&|()'\"]+)\s*(?P<op><=|>=|==|!=|<|>)\s*"
    r"(?P<number>[+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?)\s*"
)


@dataclass(frozen=True)
class Clause:
    """One comparison of a trigger: ``<region>.<kind> <op> <number>``."""

    region: str
    kind: str
    op: str
    number: float

    def holds(self, summaries: Summaries) -> bool:
        """Whether the summary is there, is a number, and compares as asked."""
        kinds = summaries.get(self.region)
        if kinds is None or self.kind not in kinds:
            return False
        value = float(kinds[self.kind])
        return not math.isnan(value) and _COMPARE[self.op](value, self.number)


@dataclass(frozen=True)
class Trigger:
    """A parsed trigger; fires when all of its clauses hold. Made by :func:`parse_trigger`."""

    clauses: tuple[Clause, ...]

    def fires(self, summaries: Summaries | None) -> bool:
        """Whether every clause holds; False without summaries or where one is missing or NaN."""
        return summaries is not None and all(clause.holds(summaries) for clause in self.clauses)


def parse_trigger(text: str) -> Trigger:
    """Parse a trigger.

    Raises:
        CanvasError: the text does not follow the grammar above; the message quotes the clause.
    """
    if not isinstance(text, str):
        raise CanvasError(f"trigger: expected a string, got {text!r}")
    clauses = []
    for part in text.split("&&"):
        match = _CLAUSE.fullmatch(part)
        number = float(match["number"]) if match else math.inf
        if match is None or math.isinf(number):
            raise CanvasError(
                "trigger: expected '<region>.<kind> <op> <number>' with op one of < > <= >= == !=, clauses "
                f"joined by '&&', got {part.strip()!r} in {text!r}"
            )
        clauses.append(Clause(match["region"], match["kind"], match["op"], number))
    return Trigger(tuple(clauses))


def evaluate_trigger(text: str | None, summaries: Summaries | None) -> bool:
    """Whether the trigger ``text`` fires; None, no condition at all, always does, malformed text never.

    Parses ``text`` at each call: for repeated use keep the result of :func:`parse_trigger`.
    """
    if text is None:
        return True
    try:
        trigger = parse_trigger(text)
    except CanvasError:
        return False
    return trigger.fires(summaries)
