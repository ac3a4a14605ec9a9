"""Single numbers that are promised: import time, plans, masks."""

from __future__ import annotations

import subprocess
import sys
import time
from typing import Any

import numpy as np

from bench.canvases import declared
from bench.cases import SHIPPED
from bench.pairs import Pairs
from bench.timing import Spread
from canvas_engineering.plan import BlockSparsePlan

_IMPORT = """
import sys, time
start = time.perf_counter()
import canvas_engineering
took = time.perf_counter() - start
loaded = [name for name in ("torch", "jax", "triton", "matplotlib") if name in sys.modules]
print(took, *loaded)
"""


def import_time() -> dict[str, Any]:
    """``import canvas_engineering`` in a fresh interpreter, NumPy included."""
    taken, loaded = [], set()
    for _ in range(7):
        done = subprocess.run([sys.executable, "-c", _IMPORT], capture_output=True, text=True, check=True)
        seconds, *names = done.stdout.split()
        taken.append(float(seconds))
        loaded |= set(names)
    reason = f"it loads {', '.join(sorted(loaded))}" if loaded else ""
    return figure("import_seconds", Spread.of(taken).as_list(), "s", reason)


def attention_mask() -> dict[str, Any]:
    """``to_attention_mask`` of the computer-use canvas at 16,384 positions, compared with the mask of its groups."""
    given = declared("computer_use_16384")
    start = time.perf_counter()
    mask = given.topology.to_attention_mask(given.layout)
    taken = time.perf_counter() - start
    same = np.array_equal(np.asarray(mask) > 0, Pairs(given).dense())
    return figure("attention_mask_seconds", [taken] * 3, "s", "" if same else "differs from the mask of its groups")


def computed_per_true() -> list[dict[str, Any]]:
    """Computed over true pairs of every shipped canvas with ``auto`` tiles, both softmax scopes."""
    rows = []
    for name in SHIPPED:
        given = declared(name)
        for softmax in ("connection", "joint"):
            plan = BlockSparsePlan.from_topology(given.topology, given.layout, softmax=softmax)
            value = plan.stats().computed_per_true
            rows.append(figure(f"computed_per_true-{softmax}-{name}", [value] * 3, "x", ""))
    return rows


def figure(name: str, value: list[float], unit: str, reason: str) -> dict[str, Any]:
    """A row of ``Results.figures``: median and quartiles, and what is wrong with them, if anything."""
    return {"id": name, "value": value, "unit": unit, "status": "wrong" if reason else "measured", "reason": reason}
