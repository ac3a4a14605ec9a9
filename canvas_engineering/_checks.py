"""Checks of single values shared by the declarations: each says what it needed and what it got."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable

import numpy as np

from canvas_engineering.errors import CanvasError


def check_int(value: object, what: str, *, minimum: int | None = None) -> int:
    """Return ``value`` as a Python int; NumPy integers pass, booleans and floats do not.

    Raises:
        CanvasError: not an integer, or below ``minimum``; the message starts with ``what``.
    """
    if minimum is None:
        need = "an integer"
    else:
        need = "a positive integer" if minimum == 1 else f"an integer >= {minimum}"
    if isinstance(value, (bool, np.bool_)):
        raise CanvasError(f"{what}: expected {need}, got {value!r}")
    try:
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise CanvasError(f"{what}: expected {need}, got {value!r}") from None
    if minimum is not None and number < minimum:
        raise CanvasError(f"{what}: expected {need}, got {number}")
    return number


def check_number(value: object, what: str, *, minimum: float | None = None) -> float:
    """Return ``value`` if it is a finite real number (int or float, Python or NumPy, not a boolean).

    Raises:
        CanvasError: not a number, not finite, or below ``minimum``; the message starts with ``what``.
    """
    need = "a finite number" if minimum is None else f"a finite number >= {minimum:g}"
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise CanvasError(f"{what}: expected {need}, got {value!r}")
    if not math.isfinite(value) or (minimum is not None and value < minimum):
        raise CanvasError(f"{what}: expected {need}, got {value!r}")
    return value


def check_str(value: object, what: str) -> str:
    """Return ``value`` if it is a string.

    Raises:
        CanvasError: it is not; the message starts with ``what``.
    """
    if not isinstance(value, str):
        raise CanvasError(f"{what}: expected a string, got {value!r}")
    return value


def check_shape(value: object, what: str) -> tuple[int, ...]:
    """Return ``value`` as a non-empty tuple of positive ints.

    Raises:
        CanvasError: not a sequence of positive integers; the message starts with ``what``.
    """
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise CanvasError(f"{what}: expected a sequence of positive integers, got {value!r}")
    shape = tuple(check_int(size, f"{what}[{axis}]", minimum=1) for axis, size in enumerate(value))
    if not shape:
        raise CanvasError(f"{what}: expected at least one size, got ()")
    return shape


def check_bool(value: object, what: str) -> bool:
    """Return ``value`` if it is a boolean.

    Raises:
        CanvasError: it is not; the message starts with ``what``.
    """
    if not isinstance(value, (bool, np.bool_)):
        raise CanvasError(f"{what}: expected true or false, got {value!r}")
    return bool(value)


def check_choice(value: object, what: str, choices: Iterable[str]) -> str:
    """Return ``value`` if it is one of ``choices``.

    Raises:
        CanvasError: it is not; the message starts with ``what`` and lists the choices.
    """
    known = list(choices)
    if not isinstance(value, str) or value not in known:
        raise CanvasError(f"{what}: expected one of {', '.join(known)}, got {value!r}")
    return value


def check_strings(value: object, what: str) -> tuple[str, ...]:
    """Return ``value`` as a tuple of strings.

    Raises:
        CanvasError: not a list or tuple of strings; the message starts with ``what``.
    """
    if not isinstance(value, (list, tuple)):
        raise CanvasError(f"{what}: expected a list of strings, got {value!r}")
    return tuple(check_str(item, f"{what}[{index}]") for index, item in enumerate(value))
