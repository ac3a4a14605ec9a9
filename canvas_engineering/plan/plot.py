"""A picture of a plan: which tiles are visited, in plan order, regions along both axes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from canvas_engineering._files import atomic_write
from canvas_engineering._optional import require
from canvas_engineering.errors import PlanError

if TYPE_CHECKING:
    from canvas_engineering.plan.plan import BlockSparsePlan

_EMPTY, _PARTIAL, _FULL = (0.965, 0.965, 0.965), (0.98, 0.68, 0.25), (0.13, 0.35, 0.62)
_MAX_PIXELS = 1024  # tiles of larger plans are averaged down to this many per axis
_LABEL_SHARE = 0.02  # runs shorter than this part of the axis get no label of their own


def tile_image(plan: BlockSparsePlan) -> NDArray[np.float64]:
    """``(height, width, 3)`` colours: the share of full and partial visits of each (q tile, kv tile) cell."""
    height, width = min(plan.num_q_tiles, _MAX_PIXELS), min(plan.num_kv_tiles, _MAX_PIXELS)
    row = plan.set_tile[plan.entry_set].astype(np.int64) * height // max(plan.num_q_tiles, 1)
    col = plan.entry_kv.astype(np.int64) * width // max(plan.num_kv_tiles, 1)
    cell = row * width + col
    full = plan.entry_mask < 0
    counts = [np.bincount(cell[which], minlength=height * width) for which in (~full, full)]
    # A cell of several tiles is coloured by the share of tiles visited; softmax sets that repeat a tile saturate.
    per_cell = max(1.0, plan.num_q_tiles * plan.num_kv_tiles / max(height * width, 1))
    visited = np.minimum((counts[0] + counts[1]) / per_cell, 1.0)
    share_full = np.divide(counts[1], counts[0] + counts[1], out=np.zeros(height * width), where=visited > 0)
    colour = share_full[:, None] * np.array(_FULL) + (1 - share_full)[:, None] * np.array(_PARTIAL)
    image = visited[:, None] * colour + (1 - visited)[:, None] * np.array(_EMPTY)
    return image.reshape(height, width, 3)


def region_runs(plan: BlockSparsePlan, tokens: NDArray[np.int32]) -> list[tuple[str, float, float]]:
    """(regions, start, stop) of the stretches of ``tokens`` (tiles in plan order) that lie in the same regions.

    Positions are in tiles. Overlapping regions are joined by "+"; tokens outside every region are "unused".
    """
    shape = plan.grid or (plan.num_q if tokens is plan.q_tokens else plan.num_kv,)
    member = np.zeros(shape, np.int64)
    labels: list[list[str]] = [[]]
    for name, bounds in plan.regions:  # refine the classes region by region; there are few, however many regions
        inside = np.zeros(shape, np.int64)
        inside[tuple(slice(bounds[2 * d], bounds[2 * d + 1]) for d in range(len(shape)))] = 1
        classes, member = np.unique(2 * member + inside, return_inverse=True)
        labels = [labels[c // 2] + [name] * (c % 2) for c in classes]
    member = member.ravel()
    block = tokens.shape[1]
    slots = np.flatnonzero(tokens.ravel() >= 0)
    kinds = member[tokens.ravel()[slots]]
    starts = np.flatnonzero(np.concatenate([[True], kinds[1:] != kinds[:-1]])) if kinds.size else kinds
    runs = []
    for i, start in enumerate(starts):
        stop = starts[i + 1] if i + 1 < starts.size else kinds.size
        runs.append(("+".join(labels[kinds[start]]) or "unused", slots[start] / block, (slots[stop - 1] + 1) / block))
    return runs


def plot_plan(plan: BlockSparsePlan, path: str | Path | None = None) -> Any:
    """See :meth:`BlockSparsePlan.plot`."""
    require("matplotlib", "viz", "plan.plot")
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    figure = Figure(figsize=(9, 8.6), layout="constrained")
    axes = figure.add_subplot()
    extent = (0, max(plan.num_kv_tiles, 1), max(plan.num_q_tiles, 1), 0)
    if plan.num_q_tiles and plan.num_kv_tiles:
        axes.imshow(tile_image(plan), extent=extent, aspect="auto", interpolation="nearest")
    else:
        axes.set_xlim(extent[:2])
        axes.set_ylim(extent[2:])
    stats = plan.stats()
    axes.set_title(
        f"{plan.num_q:,} x {plan.num_kv:,} tokens, tiles {plan.block_q} x {plan.block_kv}, softmax={plan.softmax}\n"
        f"{stats.full_tiles:,} full + {stats.partial_tiles:,} partial tiles visited, {stats.density:.1%} of dense, "
        f"{stats.computed_per_true:.2f} pairs computed per pair needed",
        fontsize=10,
    )
    _label_axis(axes.xaxis, region_runs(plan, plan.kv_tokens), plan.num_kv_tiles, "keys")
    _label_axis(axes.yaxis, region_runs(plan, plan.q_tokens), plan.num_q_tiles, "queries")
    legend = [Patch(color=_FULL, label="full tile"), Patch(color=_PARTIAL, label="partial tile (masked)")]
    figure.legend(handles=legend, loc="outside lower center", ncols=2, frameon=False)
    if path is not None:
        suffix = Path(path).suffix.lstrip(".").lower() or "png"
        if suffix not in figure.canvas.get_supported_filetypes():
            known = ", ".join(sorted(figure.canvas.get_supported_filetypes()))
            raise PlanError(f"path must end in one of {known}, got {str(path)!r}")
        with atomic_write(path, binary=True) as file:
            figure.savefig(file, format=suffix, dpi=150)
    return figure


def _label_axis(axis: Any, runs: list[tuple[str, float, float]], num_tiles: int, what: str) -> None:
    """Name the regions at the middle of their runs and draw lines between them; tile numbers where there are none."""
    axis.set_label_text(f"{what} in plan order (tiles)" if not runs or runs[0][0] == "unused" else what)
    if len(runs) < 2 and (not runs or runs[0][0] == "unused"):
        return
    wide = [run for run in runs if run[2] - run[1] >= _LABEL_SHARE * num_tiles]
    grouped = _join_repeats(runs) if len(wide) < len(runs) else runs
    shown = [run for run in grouped if run[2] - run[1] >= _LABEL_SHARE * num_tiles] or grouped[:1]
    axis.set_ticks([(start + stop) / 2 for _, start, stop in shown], [name for name, _, _ in shown])
    axis.set_tick_params(length=0)
    for label in axis.get_ticklabels():
        label.set_fontsize(9)
        if axis.axis_name == "y":
            label.set_rotation(90)
            label.set_va("center")
    line = axis.axes.axvline if axis.axis_name == "x" else axis.axes.axhline
    for _, start, _ in grouped[1:]:
        line(start, color="0.35", linewidth=0.6)


def _join_repeats(runs: list[tuple[str, float, float]]) -> list[tuple[str, float, float]]:
    """Unite short neighbouring runs into one labelled with all their regions, so that labels stay readable."""
    joined: list[tuple[list[str], float, float]] = []
    total = runs[-1][2]
    for name, start, stop in runs:
        small = stop - start < _LABEL_SHARE * total
        if joined and small and joined[-1][2] - joined[-1][1] < _LABEL_SHARE * total:
            names, first, _ = joined[-1]
            joined[-1] = (names if name in names else [*names, name], first, stop)
        else:
            joined.append(([name], start, stop))
    return [(" / ".join(names), start, stop) for names, start, stop in joined]
