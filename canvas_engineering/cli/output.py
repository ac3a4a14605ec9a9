"""What the commands share: JSON, tables, progress bars."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
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


def writable_folder(path: Path) -> Path:
    """Make ``path`` and prove that files can be made in it, before hours of work and not after.

    Raises:
        OSError: It cannot be made or written.
    """
    path.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=path):
        return path
