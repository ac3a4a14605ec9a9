"""Reading dataclasses from JSON objects, field by field, with errors that say where."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from typing import Any

from canvas_engineering.errors import CanvasError, SchemaError

Reader = Callable[[Any, str], Any]
"""Turns a JSON value into a field's value; the second argument says where the value stands."""


def read_object(value: Any, where: str) -> dict[str, Any]:
    """``value`` if it is a JSON object.

    Raises:
        SchemaError: it is not.
    """
    if not isinstance(value, dict):
        raise SchemaError(f"{where}: expected an object, got {value!r:.80}")
    return value


def read_fields(
    value: Any, where: str, readers: Mapping[str, Reader], required: Collection[str] = ()
) -> dict[str, Any]:
    """Read the fields of a JSON object that are there, each with its reader.

    Args:
        value: The object.
        where: Its place in the document, such as ``topology[3]``; empty for the document itself.
        readers: Every field the object may have.
        required: Fields it must have.

    Raises:
        SchemaError: not an object, a field missing or unknown, or refused by its reader.
    """
    data = read_object(value, where or "the document")
    prefix = f"{where}: " if where else ""
    for name in required:
        if name not in data:
            raise SchemaError(f"{prefix}missing field {name!r}")
    for name in data:
        if name not in readers:
            raise SchemaError(f"{prefix}unknown field {name!r}; known: {', '.join(readers)}")
    return {name: read_value(data[name], join(where, name), readers[name]) for name in data}


def read_value(value: Any, where: str, reader: Reader) -> Any:
    """Apply a reader, its refusal as a :class:`SchemaError`."""
    try:
        return reader(value, where)
    except SchemaError:
        raise
    except CanvasError as error:
        raise SchemaError(str(error)) from None


def read_spec(cls: type, value: Any, where: str, readers: Mapping[str, Reader], required: Collection[str] = ()) -> Any:
    """Make a ``cls`` of a JSON object.

    Raises:
        SchemaError: as :func:`read_fields`, or the fields do not go together.
    """
    arguments = read_fields(value, where, readers, required)
    try:
        return cls(**arguments)
    except SchemaError:
        raise
    except CanvasError as error:
        raise SchemaError(f"{where}: {error}") from None


def spec_to_dict(spec: Any, skip: Collection[str] = ()) -> dict[str, Any]:
    """The fields of a dataclass that differ from their defaults, nested dataclasses likewise.

    Tuples become lists and enumeration members their values.

    Args:
        spec: A dataclass of plain values.
        skip: Fields that the caller writes itself.
    """
    return {
        item.name: _plain(getattr(spec, item.name))
        for item in fields(spec)
        if item.name not in skip and getattr(spec, item.name) != item.default
    }


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        return spec_to_dict(value)
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return value


def join(where: str, name: str) -> str:
    """The place of a field inside an object."""
    return f"{where}.{name}" if where else name


def optional(reader: Reader) -> Reader:
    """A reader that also takes null."""
    return lambda value, where: None if value is None else reader(value, where)
