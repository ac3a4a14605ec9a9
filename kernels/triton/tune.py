"""The search behind ``canvas-engineering tune``: which candidates are measured, what is kept, where it goes on.

Plain Python: how a candidate is measured is a parameter. The table is written after every entry, so an interrupted
search goes on where it stopped; nothing here runs unless it is asked for.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Protocol, TypeVar

from canvas_engineering.kernels.triton.candidates import candidates, table_keys
from canvas_engineering.kernels.triton.config import (
    OWN_BLOCKS,
    KernelConfig,
    Key,
    Table,
    Tile,
    forget_tables,
    nearest_architecture,
    read_table,
    shipped_table,
    tuned_table_path,
    write_table,
)


class CandidateError(Exception):
    """A candidate that cannot be used: it does not compile, takes too much of the GPU, or computes something else."""


class Measure(Protocol):
    """How candidates are measured.

    Both raise :class:`CandidateError` for a candidate that cannot be used.
    """

    def kernel(self, key: Key, config: KernelConfig) -> float:
        """Median seconds of one launch."""

    def tile(self, tile: Tile) -> float:
        """Median seconds of forward and backward pass of one fixed problem, in a plan of this tile size."""


@dataclass(frozen=True)
class KernelJob:
    """One entry of the table, and the configurations that compete for it; the shipped one is the first."""

    key: Key
    configs: tuple[KernelConfig, ...]

    @property
    def size(self) -> int:
        return len(self.configs)

    def __str__(self) -> str:
        return f"{self.key.kernel} {self.key.head_dim} {self.key.dtype} {self.key.sets} {self.key.own_block}"


@dataclass(frozen=True)
class TileJob:
    """The tile sizes of plans for one head_dim and dtype; measured after their kernels, with what those got."""

    head_dim: int
    dtype: str

    @property
    def tiles(self) -> list[Tile]:
        return [Tile(self.head_dim, self.dtype, q, kv) for q in OWN_BLOCKS for kv in OWN_BLOCKS]

    @property
    def size(self) -> int:
        return len(OWN_BLOCKS) ** 2

    def __str__(self) -> str:
        return f"tiles {self.head_dim} {self.dtype}"


Job = KernelJob | TileJob


@dataclass(frozen=True)
class Entry:
    """What was found for one entry: the fastest configuration, and how it compares with the first candidate."""

    key: Key
    config: KernelConfig
    seconds: float
    shipped_seconds: float | None  # None: the shipped configuration could not be used


@dataclass
class Outcome:
    """What a search did.

    Attributes:
        entries: The measured entries.
        tiles: Relative speeds of the measured tile sizes.
        kept: Entries and groups of tile sizes that an earlier search had measured.
        left: Entries and groups of tile sizes that the budget left out.
        measured: Candidates measured.
        failures: Why candidates were skipped, and how many for each reason.
        hopeless: Entries and groups of tile sizes of which no candidate could be used.
    """

    entries: list[Entry] = field(default_factory=list)
    tiles: dict[Tile, float] = field(default_factory=dict)
    kept: int = 0
    left: int = 0
    measured: int = 0
    failures: dict[str, int] = field(default_factory=dict)
    hopeless: list[str] = field(default_factory=list)

    @property
    def skipped(self) -> int:
        """Candidates that could not be used."""
        return sum(self.failures.values())


def make_jobs(architecture: str, head_dims: Sequence[int], dtypes: Sequence[str]) -> list[Job]:
    """What is to be measured, in this order: for each dtype and head_dim its kernels, then its tile sizes."""
    shipped = shipped_table(architecture).kernels
    jobs: list[Job] = []
    for dtype in dtypes:
        for head_dim in head_dims:
            for key in table_keys((head_dim,), (dtype,)):
                first = (shipped[key],) if key in shipped else ()
                others = candidates(key, nearest_architecture(architecture))
                if configs := tuple(dict.fromkeys([*first, *others])):
                    jobs.append(KernelJob(key, configs))
            jobs.append(TileJob(head_dim, dtype))
    return jobs


def is_done(job: Job, table: Table) -> bool:
    """Whether the table holds the results of a job."""
    if isinstance(job, KernelJob):
        return job.key in table.kernels
    return any(tile in table.tiles for tile in job.tiles)  # they are written together, without those that failed


def resume(path: Path, architecture: str, source: str, *, again: bool) -> Table:
    """What was measured before by the same ``source``; an empty table where nothing was, or with ``again``.

    Raises:
        BackendError: The file is no table.
    """
    if not again and path.exists():
        table = read_table(path)
        if (table.architecture, table.source) == (architecture, source):
            return table
    return Table(architecture, source, {})


def tune(
    jobs: Iterable[Job],
    measure: Measure,
    device_name: str,
    table: Table,
    *,
    budget: float | None = None,
    clock: Callable[[], float] = time.monotonic,
    progress: Callable[[int, str], object] = lambda candidates, job: None,
) -> Outcome:
    """Measure the candidates of every job that ``table`` lacks, and keep the fastest in the user's cache.

    Args:
        jobs: See :func:`make_jobs`.
        measure: See :class:`Measure`.
        device_name: The kind of device that is measured; names the file (``tuned_table_path``).
        table: What is there already (:func:`resume`); results are added to it and written after every job.
        budget: No job is started when this many seconds have passed; the last one is finished.
        clock: Seconds, for the budget.
        progress: Called with the number of candidates just dealt with, and the job.

    Raises:
        OSError: The cache cannot be written.
    """
    outcome = Outcome()
    path = tuned_table_path(device_name)
    start = clock()
    for job in jobs:
        if is_done(job, table):
            outcome.kept += 1
            progress(job.size, str(job))
            continue
        if budget is not None and clock() - start >= budget:
            outcome.left += 1
            continue
        if isinstance(job, KernelJob):
            found = _measure_kernel(job, measure, outcome, progress)
            if found is not None:
                outcome.entries.append(found)
                table.kernels[job.key] = found.config
        else:
            speeds = _measure_tiles(job, measure, outcome, progress)
            outcome.tiles |= speeds
            table.tiles.update(speeds)
        write_table(path, table)
        forget_tables()
    return outcome


Candidate = TypeVar("Candidate", KernelConfig, Tile)


def _measured(
    job: KernelJob | TileJob,
    tried: Iterable[Candidate],
    measure: Callable[[Candidate], float],
    outcome: Outcome,
    progress: Callable[[int, str], object],
) -> dict[Candidate, float]:
    """Seconds of each candidate that can be used; the others are counted by their reason."""
    seconds: dict[Candidate, float] = {}
    for candidate in tried:
        try:
            seconds[candidate] = measure(candidate)
            outcome.measured += 1
        except CandidateError as error:
            outcome.failures[str(error)] = outcome.failures.get(str(error), 0) + 1
        progress(1, str(job))
    if not seconds:
        outcome.hopeless.append(str(job))
    return seconds


def _measure_kernel(
    job: KernelJob, measure: Measure, outcome: Outcome, progress: Callable[[int, str], object]
) -> Entry | None:
    seconds = _measured(job, job.configs, partial(measure.kernel, job.key), outcome, progress)
    if not seconds:
        return None
    best = min(seconds, key=lambda config: seconds[config])
    return Entry(job.key, best, seconds[best], seconds.get(job.configs[0]))


def _measure_tiles(
    job: TileJob, measure: Measure, outcome: Outcome, progress: Callable[[int, str], object]
) -> dict[Tile, float]:
    """Speeds relative to the fastest tile size; a size that cannot be used is left out, and never chosen."""
    seconds = _measured(job, job.tiles, measure.tile, outcome, progress)
    best = min(seconds.values(), default=0.0)
    return {tile: best / value for tile, value in seconds.items()}


def export(path: Path, architecture: str, table: Table) -> Table:
    """Write a table in the form that the package ships: its own, with what ``table`` measured in place of it.

    Raises:
        OSError: The path cannot be written.
    """
    name = nearest_architecture(architecture)
    shipped = shipped_table(name)
    merged = Table(name, table.source, {**shipped.kernels, **table.kernels}, {**shipped.tiles, **table.tiles})
    write_table(path, merged)
    return merged
