"""Reading what the TPU compiler writes about a kernel: its final VLIW schedule and its memory.

libtpu, told to dump its low-level code, writes for every kernel a numbered file per compiler pass. The last one
holds the schedule: one line per bundle (the instructions issued in one cycle), with the nesting of loops and the
targets of branches. An earlier one declares the kernel's allocations.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from canvas_engineering.errors import BackendError

_BUNDLE = re.compile(r"^\s*(?:0x[0-9a-f]+|0)\s*(?:(?:LB|LH|LE|PB|PF|CT)\s*)*:\s*((?:>\s*)*)\{")
_BRANCH = re.compile(r"sbr\.rel \(.*?\) target = \$region(\d+)")
_REGION_START = re.compile(r"Start(?:/End empty)? region (\d+)")
_MATRIX_UNIT = re.compile(r"= vmat")
_ALLOCATION = re.compile(r"#allocation\w* \[shape = '[^']*', space=(vmem|smem), size = 0x([0-9a-f]+)")


@dataclass(frozen=True)
class Schedule:
    """Static costs of one kernel.

    Attributes:
        bundles: Bundles that one grid step with a computed tile executes, between the first and the last tile of
            its row (the longer way, where full and partial tiles differ).
        total_bundles: Bundles of the whole kernel.
        vmem_bytes, smem_bytes: Its allocations in vector and scalar memory, spills included.
    """

    bundles: int
    total_bundles: int
    vmem_bytes: int
    smem_bytes: int


def read_schedule(folder: Path, kernel: str) -> Schedule:
    """The schedule of the one kernel whose name starts with ``kernel`` among the files in ``folder``.

    Raises:
        BackendError: There is no such file, or it is not of the expected form (a newer libtpu may have another).
    """
    passes = sorted(
        (path for path in folder.iterdir() if f"-{kernel}" in path.name),
        key=lambda path: (_pass_number(path), path.name),
    )
    final = [path for path in passes if path.name.endswith("-final_bundles.txt") and "analysis" not in path.name]
    if not final:
        raise BackendError(f"libtpu must have written a schedule of the kernel {kernel!r}, got none in {folder}")
    sizes = {"vmem": 0, "smem": 0}
    for path in reversed(passes):
        found = _ALLOCATION.findall(path.read_text(errors="replace"))
        if found:
            for space, size in found:
                sizes[space] += int(size, 16)
            break
    lines = _bundles(final[-1].read_text(errors="replace"))
    return Schedule(active_bundles(lines), len(lines), sizes["vmem"], sizes["smem"])


def _pass_number(path: Path) -> int:
    number = re.search(r"-(\d+)-[^/]*$", path.name)
    return int(number.group(1)) if number else -1


@dataclass(frozen=True)
class Bundle:
    depth: int  # loops around it
    text: str


def _bundles(text: str) -> list[Bundle]:
    """One entry per bundle; a bundle's comments may run over several lines."""
    bundles: list[Bundle] = []
    for line in text.splitlines():
        match = _BUNDLE.match(line)
        if match:
            bundles.append(Bundle(match.group(1).count(">"), line))
        elif bundles:
            bundles[-1] = Bundle(bundles[-1].depth, f"{bundles[-1].text}\n{line}")
    return bundles


def active_bundles(bundles: list[Bundle]) -> int:
    """Bundles of one pass through the grid loop that computes a tile.

    Code under a condition is a forward branch over it. A branch over code without matrix products is the start or
    the end of a row of tiles and is left out; of several branches over products only the longest is counted,
    because a tile is either full or partial.
    """
    loop = [index for index, bundle in enumerate(bundles) if bundle.depth > 0]
    if not loop:
        return len(bundles)
    start_of: dict[str, int] = {}
    for index, bundle in enumerate(bundles):
        for region in _REGION_START.findall(bundle.text):
            start_of.setdefault(region, index)
    spans = []
    for index in loop:
        for region in _BRANCH.findall(bundles[index].text):
            target = start_of.get(region, -1)
            if target > index:
                spans.append((index + 1, target))
    leaves = [s for s in spans if not any(s != t and s[0] <= t[0] and t[1] <= s[1] for t in spans)]
    computing: list[int] = []
    other: list[int] = []
    for start, stop in leaves:
        has_product = any(_MATRIX_UNIT.search(bundle.text) for bundle in bundles[start:stop])
        (computing if has_product else other).append(stop - start)
    return len(loop) - sum(other) - sum(computing) + max(computing, default=0)
