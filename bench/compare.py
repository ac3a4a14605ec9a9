"""Is it slower than it was? A result against an earlier one, beyond the noise of both."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from bench.cases import DTYPE
from bench.results import FOLDER, Results, git
from canvas_engineering.errors import CanvasError

#: A change below this is never called one.
LEAST_CHANGE = 0.1

Verdict = Literal["slower", "faster", "same", "gone", "new"]


@dataclass(frozen=True)
class Change:
    """One case, then and now.

    Attributes:
        id: Of the case, or builder and canvas.
        before, after: Median seconds.
        factor: ``after / before``, corrected for the speed of the machine in the two runs.
        verdict: What that means.
    """

    id: str
    before: float | None
    after: float | None
    factor: float | None
    verdict: Verdict

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def compare(before: Results, after: Results) -> list[Change]:
    """Every case of two runs of one device and scale, our own times only.

    A case is slower (or faster) when the quartiles of the two runs do not overlap and the medians differ by more
    than ``LEAST_CHANGE``. Times are corrected by the matrix product's speed in the two runs, so that a machine
    that is busy with something else is not taken for a regression.

    Raises:
        CanvasError: The runs are of different devices or scales.
    """
    for what, old, new in (
        ("scale", before.scale, after.scale),
        ("device", before.machine["device"], after.machine["device"]),
        ("threads", before.machine["threads"], after.machine["threads"]),
    ):
        if old != new:
            raise CanvasError(f"results must be of one {what} to be compared, got {old!r} and {new!r}")
    speed = _speed(before, after)
    then, now = _times(before), _times(after)
    return [_change(name, then.get(name), now.get(name), speed) for name in dict.fromkeys([*then, *now])]


def committed(path: Path, revision: str = "HEAD") -> Results | None:
    """The result of that file name in a revision of the checkout; None where there is none."""
    relative = f"bench/{FOLDER.name}/{path.name}"
    text = git("show", f"{revision}:{relative}")
    return None if text is None else Results.from_json(json.loads(text), f"{revision}:{relative}")


def _times(results: Results) -> dict[str, list[float]]:
    found = {row["id"]: row["variants"][0]["seconds"] for row in results.cases}
    found |= {
        f"build-{row['builder']}-{row['canvas']}": row["seconds"]
        for row in results.builds
        if row["builder"].startswith("plan")
    }
    found |= {row["id"]: row["value"] for row in results.figures if row["unit"] == "s"}
    return {name: seconds for name, seconds in found.items() if seconds is not None}


def _speed(before: Results, after: Results) -> float:
    """How much faster the machine's matrix product was in the second run."""
    dtype = DTYPE[before.kind]
    if dtype not in before.ceilings or dtype not in after.ceilings:
        return 1.0
    return float(after.ceilings[dtype]["matmul"] / before.ceilings[dtype]["matmul"])


def _change(name: str, before: list[float] | None, after: list[float] | None, speed: float) -> Change:
    if before is None or after is None:
        return Change(
            name,
            None if before is None else before[0],
            None if after is None else after[0],
            None,
            "new" if before is None else "gone",
        )
    median, low, high = (value * speed for value in after)
    factor = median / before[0]
    verdict: Verdict = "same"
    if factor > 1 + LEAST_CHANGE and low > before[2]:
        verdict = "slower"
    elif factor < 1 / (1 + LEAST_CHANGE) and high < before[1]:
        verdict = "faster"
    return Change(name, before[0], after[0], factor, verdict)
