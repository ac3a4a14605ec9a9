"""What the commands share: JSON, tables, progress bars, and files that appear whole or not at all."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from canvas_engineering._optional import installed

Item = TypeVar("Item")


def print_json(data: object) -> None:
    """Write ``data`` to standard output as JSON (non-finite numbers are refused by ``json``, not written)."""
    print(json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False))


def table(header: Sequence[str], rows: Iterable[Sequence[str]], *, markdown: bool = False) -> str:
    """Columns padded to equal width; ``markdown`` draws them as a Markdown table."""
    body = [list(row) for row in rows]
    widths = [max(len(row[column]) for row in [list(header), *body]) for column in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        padded = [cell.ljust(width) for cell, width in zip(cells, widths, strict=True)]
        return f"| {' | '.join(padded)} |" if markdown else "  ".join(padded).rstrip()

    rule = line(["-" * width for width in widths])
    return "\n".join([line(header), rule, *map(line, body)])


def seconds(value: float) -> str:
    """A duration with three significant digits: ``1.23 s``, ``45.6 ms``, ``789 us``."""
    for unit, factor in (("s", 1.0), ("ms", 1e3)):
        if value * factor >= 1:
            return f"{value * factor:.3g} {unit}"
    return f"{value * 1e6:.3g} us"


def progress(items: Sequence[Item], description: str) -> Iterator[Item]:
    """Iterate, with a progress bar when tqdm is installed and standard error is a terminal."""
    if not (installed("tqdm") and sys.stderr.isatty()):
        yield from items
        return
    from tqdm import tqdm

    yield from tqdm(items, desc=description, leave=False)


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path`` that takes its place when the block succeeds.

    A failure leaves an earlier ``path`` as it was and no temporary file behind. The temporary name keeps the
    suffix, by which matplotlib chooses the format.

    Raises:
        OSError: The folder cannot be written; the error names ``path``.
    """
    if path.is_dir():
        raise IsADirectoryError(21, "is a directory, a file was expected", str(path))
    try:
        handle, name = tempfile.mkstemp(prefix=f".{path.stem}-", suffix=path.suffix, dir=path.parent)
    except OSError as error:
        raise type(error)(error.errno, error.strerror, str(path)) from None
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        # mkstemp files are private; a result has the permissions of any other new file.
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a whole text file atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def writable_folder(path: Path) -> Path:
    """Make ``path`` and prove that files can be made in it, before hours of work and not after.

    Raises:
        OSError: It cannot be made or written.
    """
    path.mkdir(parents=True, exist_ok=True)
    with atomic_path(path / ".writable"):
        pass
    (path / ".writable").unlink()
    return path
