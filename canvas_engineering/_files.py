"""Reading JSON and writing files so that a failure loses nothing that was there before."""

from __future__ import annotations

import json
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from canvas_engineering.errors import CanvasError, SchemaError


class OutputPathError(OSError, CanvasError):
    """A file that cannot be written; the message names its path and the reason."""


@contextmanager
def atomic_write(path: str | os.PathLike[str], *, binary: bool = False) -> Iterator[IO[Any]]:
    """Open a file for writing that appears under ``path`` only once the block has succeeded.

    The content goes to a temporary file in the same folder, which then replaces ``path``. When the block
    raises, the temporary file is removed and an existing ``path`` is as it was. Symbolic links are followed
    and the permissions of an existing file are kept.

    Args:
        path: Where the file shall be.
        binary: Open for bytes; otherwise for UTF-8 text with ``\\n`` line ends.

    Raises:
        OutputPathError: the folder does not exist or cannot be written, or ``path`` is a folder.
    """
    target = Path(os.path.realpath(path))
    temporary = target.with_name(f".{target.name[:200]}.{secrets.token_hex(4)}.tmp")
    try:
        if target.is_dir():
            raise IsADirectoryError(0, "it is a folder")
        mode = stat.S_IMODE(target.stat().st_mode) if target.exists() else None
        # os.open applies the umask to 0o666 like any new file; tempfile would make it private.
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
    except OSError as error:
        raise OutputPathError(f"cannot write {os.fspath(path)!r}: {error.strerror}") from None
    done = False
    try:
        with open(handle, "wb") if binary else open(handle, "w", encoding="utf-8", newline="\n") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if mode is not None:
            temporary.chmod(mode)
        try:
            temporary.replace(target)
        except OSError as error:
            raise OutputPathError(f"cannot write {os.fspath(path)!r}: {error.strerror}") from None
        done = True
    finally:
        if not done:
            temporary.unlink(missing_ok=True)


def write_json(path: str | os.PathLike[str], value: dict[str, Any]) -> None:
    """Write ``value`` as indented JSON, atomically.

    Raises:
        SchemaError: a value that JSON cannot hold (NaN, infinity, an object that is not plain data).
        OutputPathError: ``path`` cannot be written.
    """
    try:
        text = json.dumps(value, indent=2, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise SchemaError(f"cannot write {os.fspath(path)!r} as JSON: {error}") from None
    with atomic_write(path) as file:
        file.write(text + "\n")


def read_json(path: str | os.PathLike[str]) -> Any:
    """Read a JSON file.

    Raises:
        OSError: the file cannot be read.
        SchemaError: it is not UTF-8 or not JSON, or an object names a field twice; the message has the path.
    """
    where = repr(os.fspath(path))
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file, object_pairs_hook=_unique_fields)
    except UnicodeDecodeError as error:
        raise SchemaError(f"{where} is not a UTF-8 text file: {error}") from None
    except json.JSONDecodeError as error:
        raise SchemaError(f"{where} is not valid JSON: {error}") from None
    except RecursionError:
        raise SchemaError(f"{where} is nested too deeply") from None
    except SchemaError as error:
        raise SchemaError(f"{where}: {error}") from None


def _unique_fields(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    # JSON readers keep the last of two equal names, which would silently lose a region or a connection.
    fields = dict(pairs)
    if len(fields) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for index, name in enumerate(names) if name in names[:index])
        raise SchemaError(f"field {twice!r} stands twice in one object")
    return fields
