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
_LABEL_SHARE = 0.011  # part of the axis that one letter of a label takes


def shown_tiles(plan: BlockSparsePlan) -> tuple[int, int]:
    """(q tiles, kv tiles) that the picture shows: up to the last visited one, since unused tokens stand last."""
    if not plan.num_entries:
        return plan.num_q_tiles, plan.num_kv_tiles
    return int(plan.set_tile.max()) + 1, int(plan.entry_kv.max()) + 1


def tile_image(plan: BlockSparsePlan) -> NDArray[np.float64]:
    """``(height, width, 3)`` colours: the share of full and partial visits of each cell of the shown tiles."""
    q_tiles, kv_tiles = shown_tiles(plan)
    height, width = min(q_tiles, _MAX_PIXELS), min(kv_tiles, _MAX_PIXELS)
    row = plan.set_tile[plan.entry_set].astype(np.int64) * height // max(q_tiles, 1)
    col = plan.entry_kv.astype(np.int64) * width // max(kv_tiles, 1)
    cell = row * width + col
    full = plan.entry_mask < 0
    partial, filled = (np.bincount(cell[which], minlength=height * width) for which in (~full, full))
    # A cell of several tiles is coloured by the share of tiles visited; softmax sets that repeat a tile saturate.
    per_cell = max(1.0, q_tiles * kv_tiles / max(height * width, 1))
    visited = np.minimum((partial + filled) / per_cell, 1.0)
    share_full = np.divide(filled, partial + filled, out=np.zeros(height * width), where=visited > 0)
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

    q_tiles, kv_tiles = shown_tiles(plan)
    figure = Figure(figsize=(9, 9.6), layout="constrained")
    grid = figure.add_gridspec(2, 2, width_ratios=(1, 40), height_ratios=(40, 1), wspace=0.01, hspace=0.01)
    tiles = figure.add_subplot(grid[0, 1])
    if q_tiles and kv_tiles:
        extent = (0, kv_tiles, q_tiles, 0)
        tiles.imshow(tile_image(plan), extent=extent, aspect="auto", interpolation="nearest")
    tiles.set_xticks([])
    tiles.set_yticks([])
    stats = plan.stats()
    hidden = [
        f"{count:,} unused {what} not shown"
        for count, what in (
            (int(plan.q_count[q_tiles:].sum()), "queries"),
            (int(plan.kv_count[kv_tiles:].sum()), "keys"),
        )
        if count
    ]
    tiles.set_title(
        f"{plan.num_q:,} x {plan.num_kv:,} tokens, tiles {plan.block_q} x {plan.block_kv}, softmax={plan.softmax}\n"
        f"{stats.full_tiles:,} full + {stats.partial_tiles:,} partial tiles visited, {stats.density:.1%} of dense, "
        f"{stats.computed_per_true:.2f} pairs computed per pair needed" + "".join(f"\n{text}" for text in hidden[:1]),
        fontsize=10,
    )
    rows, cols = region_runs(plan, plan.q_tokens[:q_tiles]), region_runs(plan, plan.kv_tokens[:kv_tiles])
    colours = _region_colours([name for name, _, _ in [*rows, *cols]])
    _region_strip(figure.add_subplot(grid[0, 0], sharey=tiles), rows, q_tiles, colours, vertical=True)
    _region_strip(figure.add_subplot(grid[1, 1], sharex=tiles), cols, kv_tiles, colours, vertical=False)
    handles = [Patch(color=_FULL, label="full tile"), Patch(color=_PARTIAL, label="partial tile (masked)")]
    handles += [Patch(color=colour, label=name) for name, colour in colours.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 6), frameon=False, fontsize=9)
    if path is not None:
        suffix = Path(path).suffix.lstrip(".").lower() or "png"
        if suffix not in figure.canvas.get_supported_filetypes():
            known = ", ".join(sorted(figure.canvas.get_supported_filetypes()))
            raise PlanError(f"path must end in one of {known}, got {str(path)!r}")
        with atomic_write(path, binary=True) as file:
            figure.savefig(file, format=suffix, dpi=150)
    return figure


def _region_colours(names: list[str]) -> dict[str, Any]:
    """A colour for each combination of regions, in order of appearance; grey for unused tokens."""
    from matplotlib import colormaps

    palette = [colormaps[name](i) for name, count in (("Set2", 8), ("tab20", 20)) for i in range(count)]
    distinct = [name for name in dict.fromkeys(names) if name != "unused"]
    colours = {name: palette[i % len(palette)] for i, name in enumerate(distinct)}
    return {**colours, **({"unused": (0.8, 0.8, 0.8)} if "unused" in names else {})}


def _region_strip(
    axes: Any, runs: list[tuple[str, float, float]], num_tiles: int, colours: dict[str, Any], *, vertical: bool
) -> None:
    """A strip along an axis, coloured by region; runs wide enough carry their name as well."""
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_frame_on(False)
    axes.set_ylabel("queries, in plan order") if vertical else axes.set_xlabel("keys, in plan order")
    for name, start, stop in runs:
        draw = axes.axhspan if vertical else axes.axvspan
        draw(start, stop, color=colours[name], linewidth=0)
        if stop - start >= _LABEL_SHARE * num_tiles * (1 + len(name)):
            x, y = (0.5, (start + stop) / 2) if vertical else ((start + stop) / 2, 0.5)
            axes.text(
                x,
                y,
                name,
                transform=axes.get_yaxis_transform() if vertical else axes.get_xaxis_transform(),
                rotation=90 if vertical else 0,
                ha="center",
                va="center",
                fontsize=8,
            )
