"""Results as data: one JSON file per device and scale under ``bench/results/``."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from typing import Any, Literal

from bench.timing import Spread
from canvas_engineering._files import read_json, write_json
from canvas_engineering.errors import SchemaError

FORMAT = 1
KIND = "canvas-engineering benchmarks"
FOLDER = Path(__file__).with_name("results")


@dataclass
class Measured:
    """One variant of one case.

    Attributes:
        status: ``measured``, ``wrong`` (the gate is red, so there is no time), ``failed`` (it raised an error) or
            ``absent``.
        reason: Why there is no time.
        seconds: Median and quartiles.
        ratio: Its time over ours, per round: median and quartiles; above 1 where ours is faster.
        rounds: How many samples these are of.
        setup: Seconds before the first call, by kind.
        peak_bytes: Memory on top of the inputs.
        error, allowed: Largest error of the output, and the largest that is allowed.
    """

    name: str
    status: str
    reason: str = ""
    seconds: list[float] | None = None
    ratio: list[float] | None = None
    rounds: int = 0
    setup: dict[str, float] = field(default_factory=dict)
    peak_bytes: int | None = None
    error: float | None = None
    allowed: float | None = None

    def fill(self, samples: list[float], ours: list[float] | None = None) -> None:
        """Seconds, and ratios to ``ours`` where this is someone else; one of each per round."""
        self.seconds, self.rounds = Spread.of(samples).as_list(), len(samples)
        if ours is not None:
            self.ratio = Spread.of([a / b for a, b in zip(samples, ours, strict=True)]).as_list()


@dataclass
class Results:
    """Everything of one run.

    Attributes:
        scale: ``quick`` or ``full``.
        machine: As ``bench.machine.describe`` gives it.
        commit: Revision of the checkout, with a ``+`` where it had changes; None outside of git.
        day: When.
        ceilings: By dtype.
        cases, builds, figures: Rows, ready for JSON.
        failures: What could not be measured at all, by ``id`` and ``reason``.
        took: Seconds that each test of the run took, for the next run's estimate.
    """

    scale: str
    machine: dict[str, Any]
    commit: str | None = None
    day: str = ""
    ceilings: dict[str, dict[str, Any]] = field(default_factory=dict)
    cases: list[dict[str, Any]] = field(default_factory=list)
    builds: list[dict[str, Any]] = field(default_factory=list)
    figures: list[dict[str, Any]] = field(default_factory=list)
    failures: list[dict[str, str]] = field(default_factory=list)
    took: dict[str, float] = field(default_factory=dict)

    @property
    def kind(self) -> Literal["cpu", "gpu"]:
        """Of the device."""
        return "gpu" if self.machine["kind"] == "gpu" else "cpu"

    def add_case(self, row: dict[str, Any], variants: list[Measured]) -> None:
        self.cases.append({**row, "variants": [_without_nan(asdict(one)) for one in variants]})

    def save(self, path: Path) -> None:
        """Write, atomically.

        Raises:
            OSError: The path cannot be written.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"kind": KIND, "format": FORMAT, **asdict(self)})

    @classmethod
    def load(cls, path: Path) -> Results:
        """Read what :meth:`save` wrote.

        Raises:
            SchemaError: It is not such a file. OSError: it cannot be read.
        """
        return cls.from_json(read_json(path), str(path))

    @classmethod
    def from_json(cls, data: Any, where: str) -> Results:
        """From parsed JSON; ``where`` is for messages."""
        if not is_results(data):
            raise SchemaError(f"{where} must hold results of `canvas-engineering bench run`, got something else")
        if data["format"] != FORMAT:
            raise SchemaError(f"{where}: format must be {FORMAT}, got {data['format']!r}")
        names = set(cls.__dataclass_fields__)
        missing = sorted(names - data.keys())
        if missing:
            raise SchemaError(f"{where} lacks {', '.join(missing)}")
        return cls(**{name: data[name] for name in names})

    def case(self, case_id: str) -> dict[str, Any] | None:
        """The row of a case."""
        return next((row for row in self.cases if row["id"] == case_id), None)


def is_results(data: Any) -> bool:
    """Whether parsed JSON is what :meth:`Results.save` writes."""
    return isinstance(data, dict) and data.get("kind") == KIND and "format" in data


def measured(row: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The variants of a case that have a time."""
    return (one for one in row["variants"] if one["status"] == "measured")


def variant(row: dict[str, Any], name: str) -> dict[str, Any] | None:
    """The variant of that name, whether measured or not."""
    return next((one for one in row["variants"] if one["name"] == name), None)


def today() -> str:
    return date.today().isoformat()


def git(*arguments: str, folder: Path = FOLDER.parent) -> str | None:
    """What git prints; None where there is no git or no repository."""
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=False, timeout=60
        )
    except OSError:
        return None
    return done.stdout if done.returncode == 0 else None


def commit() -> str | None:
    """Short revision of the checkout, ``+`` where tracked files are changed."""
    revision = git("rev-parse", "--short=10", "HEAD")
    if revision is None:
        return None
    changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!bench/results", ":!docs")
    return revision.strip() + ("+" if changed else "")


def _without_nan(row: dict[str, Any]) -> dict[str, Any]:
    """JSON has no NaN; ``reason`` says in words what was not a number."""
    return {key: None if isinstance(value, float) and value != value else value for key, value in row.items()}
