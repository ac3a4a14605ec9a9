"""Interleaved timing: in every round each variant runs once, so that drift and other load hit all alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from bench.variant import FAILURES, Absent, Variant, told


@dataclass(frozen=True)
class Spread:
    """Median and quartiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)

    def as_list(self) -> list[float]:
        return [self.median, self.low, self.high]


def rounds_within(budget: float, once: float, least: int = 3, most: int = 30) -> int:
    """How many rounds fit a time budget, one round taking ``once`` seconds."""
    return max(least, min(most, int(budget / max(once, 1e-9))))


@dataclass
class Interleaved:
    """Runs the first variant under someone else's clock, and all others right before it, once per round.

    ``pedantic`` is pytest-benchmark's: it calls ``setup``, then the target under its clock, ``rounds`` times.

    Attributes:
        ours: The variant that pytest-benchmark times.
        others: Those that run in the setup of each round, in turn first.
        warm: Each timed call comes right after untimed ones of the same variant; else it meets the caches as another
            variant left them, and threads that sleep after waiting for another process.
        samples: Seconds of each of the others, one per round.
        by_device: Seconds of ours per round where the device has a clock of its own; else empty.
        failed: Who raised an error, and which; they are left out from there on.
    """

    ours: Variant
    others: Sequence[Variant]
    warm: bool = False
    samples: dict[str, list[float]] = field(default_factory=dict)
    by_device: list[float] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    rounds_done: int = 0

    def run(self, pedantic: Callable[..., Any], rounds: int) -> None:
        self.samples = {variant.name: [] for variant in self.others}
        pedantic(self._mine, setup=self._setup, rounds=rounds, warmup_rounds=0)

    def _mine(self, prepared: Any) -> None:
        seconds = self.ours.timed(prepared)
        if seconds is not None:
            self.by_device.append(seconds)

    def _setup(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        count = len(self.others)
        for place in range(count):
            variant = self.others[(place + self.rounds_done) % count]
            if variant.name in self.failed:
                continue
            try:
                self.samples[variant.name].append(variant.warm_sample() if self.warm else variant.sample())
            except (Absent, *FAILURES) as error:
                self.failed[variant.name] = told(error)
        self.rounds_done += 1
        if self.warm:
            self.ours.warm_up()
        return (self.ours.prepare(),), {}


class Clock:
    """Stands in for pytest-benchmark's ``pedantic`` where there is no pytest; keeps the seconds of each round."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def pedantic(
        self,
        target: Callable[..., Any],
        *,
        setup: Callable[[], Any],
        teardown: Callable[..., Any] | None = None,
        rounds: int = 1,
        warmup_rounds: int = 0,
    ) -> None:
        for number in range(rounds + warmup_rounds):
            args, keywords = setup() or ((), {})
            start = time.perf_counter()
            target(*args, **keywords)
            took = time.perf_counter() - start
            if teardown is not None:
                teardown(*args, **keywords)
            if number >= warmup_rounds:
                self.seconds.append(took)
