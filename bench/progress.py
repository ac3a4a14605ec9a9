"""How far a run is, and how long it will still take."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence

from tqdm import tqdm


class Progress:
    """A bar where standard error is a terminal, else ``[12/99 0:40, about 5:10 left]`` before every line.

    Args:
        names: What will be done, in this order.
        known: Seconds that some of these took in an earlier run. Where all but a few are known the estimate
            follows them; else every item counts the same.
    """

    def __init__(self, names: Sequence[str], known: Mapping[str, float]) -> None:
        found = [known[name] for name in names if name in known]
        usual = sum(found) / len(found) if len(found) > 0.8 * len(names) else None
        self._weights = {name: 1.0 if usual is None else known.get(name, usual) for name in names}
        self._total = sum(self._weights.values())
        self._done = 0.0
        self._count = 0
        self._began = time.monotonic()
        # smoothing=0: the rate since the beginning, because what follows one another takes alike.
        self._bar = tqdm(
            total=self._total,
            bar_format="{percentage:3.0f}%|{bar}| {desc}[{elapsed}, about {remaining} left]",
            smoothing=0,
            dynamic_ncols=True,
            disable=None,
        )

    def step(self, name: str) -> None:
        """One more is done."""
        weight = self._weights.get(name, 0.0)
        self._done += weight
        self._count += 1
        self._bar.set_description_str(f"{self._count}/{len(self._weights)} ", refresh=False)
        self._bar.update(weight)

    def write(self, line: str) -> None:
        """A line above the bar, or with the state in front where there is none."""
        if not self._bar.disable:
            self._bar.write(line, file=sys.stdout)
            return
        took = time.monotonic() - self._began
        left = took * (self._total / self._done - 1) if self._done else 0.0
        state = f"{self._count}/{len(self._weights)} {_clock(took)}, about {_clock(left)} left"
        print(f"[{state}] {line}", flush=True)

    def close(self) -> None:
        self._bar.close()


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}"
