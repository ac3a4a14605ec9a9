"""Pictures of a result: bars by canvas, cost over length, over sparsity and over size of the plan, roofline."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from bench import build_cost
from bench.cases import DTYPE, SHIPPED, SPARSE, is_usual
from bench.peers.ours import OURS
from bench.results import Results, measured, variant
from bench.roofline import floor_seconds
from canvas_engineering._files import atomic_write

#: One colour per variant, in every picture (Okabe and Ito, safe for colour-blind readers).
COLOURS = {
    OURS: "#0072B2",
    "masked SDPA": "#E69F00",
    "SDPA per group": "#CC79A7",
    "flex_attention": "#009E73",
    "canvas-engineering 0.5.0": "#D55E00",
    "NATTEN": "#56B4E9",
    "canvas-engineering, portable": "#56B4E9",
    "canvas-engineering, JAX": "#F0E442",
    "masked jax.nn attention": "#8B4513",
    "floor": "#666666",
    "visited tiles": "#AAAAAA",
    build_cost.OURS_CONNECTION: "#0072B2",
    build_cost.OURS_JOINT: "#56B4E9",
    build_cost.OURS_MASK_INFO: "#CC79A7",
    build_cost.BLOCK_MASK: "#009E73",
    build_cost.PROCESS_MASK: "#D55E00",
}


def draw(results: Results, folder: Path, slug: str) -> list[Path]:
    """Draw everything that the result has numbers for.

    Raises:
        OSError: A file cannot be written.
    """
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    written = []
    pictures: dict[str, Callable[[Results, Figure], bool]] = {
        "canvases": _canvases,
        "length": _length,
        "sparsity": _sparsity,
        "roofline": _roofline,
        "build": _build,
    }
    for name, picture in pictures.items():
        figure = Figure(figsize=(9, 4.5), layout="constrained")
        if not picture(results, figure):
            continue
        path = folder / f"bench_{slug}_{name}.png"
        with atomic_write(path, binary=True) as file:
            # Without the version of matplotlib: equal numbers make equal files.
            figure.savefig(file, format="png", dpi=110, metadata={"Software": None})
        written.append(path)
    return written


def rows_of(results: Results, level: str, scope: str, phase: str) -> Iterator[dict[str, Any]]:
    """Cases in the default dtype, head size and batch."""
    for row in results.cases:
        if (row["level"], row["scope"], row["phase"]) == (level, scope, phase) and is_usual(row, results.kind):
            yield row


def _plain(value: float, _: int) -> str:
    """Numbers on a logarithmic axis, written out."""
    return f"{value:,.0f}" if value >= 1 else f"{value:g}"


def _colour(name: str) -> str:
    return COLOURS.get(name, "#999999")


def _canvases(results: Results, figure: Any) -> bool:
    """Times of everyone, over our own."""
    from matplotlib.ticker import LogLocator, NullLocator

    panels = [
        (title, found)
        for title, level, scope in (
            ("attention, joint softmax", "attention", "joint"),
            ("attention, a softmax per connection", "attention", "connection"),
            ("dispatcher", "dispatcher", "connection"),
        )
        if (found := [row for row in rows_of(results, level, scope, "forward") if _has_peer(row)])
    ]
    if not panels:
        return False
    figure.set_size_inches(9, 1.2 + sum(0.35 * len(found) + 0.9 for _, found in panels))
    axes = figure.subplots(len(panels), 1, squeeze=False, height_ratios=[len(found) + 1 for _, found in panels])
    for axis, (title, found) in zip(axes[:, 0], panels, strict=True):
        names = list(dict.fromkeys(one["name"] for row in found for one in measured(row) if one["ratio"]))
        height = 0.8 / len(names)
        for place, name in enumerate(names):
            ratios = [(variant(row, name) or {}).get("ratio") for row in found]
            at = [number + place * height - 0.4 + height / 2 for number, ratio in enumerate(ratios) if ratio]
            values = [ratio[0] for ratio in ratios if ratio]
            # From 1 outwards: bars to the left are peers that were faster.
            axis.barh(at, [value - 1 for value in values], height, 1, label=name, color=_colour(name))
            for y, value in zip(at, values, strict=True):
                axis.annotate(
                    f"{value:.2f}", (max(value, 1), y), (2, 0), textcoords="offset points", va="center", fontsize=7
                )
        axis.axvline(1, color=_colour(OURS), linewidth=1.5, label=f"{OURS} = 1")
        axis.set_yticks(range(len(found)), [row["title"] for row in found], fontsize=8)
        axis.invert_yaxis()
        axis.set_xscale("log")
        least, most = axis.get_xlim()
        axis.set_xlim(min(least, 0.8), most * 1.4)  # room for the numbers
        axis.set_title(f"{title}, forward", fontsize=9, loc="left")
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter(_plain)
        axis.xaxis.set_minor_locator(NullLocator())
        axis.tick_params(axis="x", labelsize=7)
        axis.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    axes[-1, 0].set_xlabel("time over ours (to the right of the line: slower than ours)", fontsize=8)
    return True


def _has_peer(row: dict[str, Any]) -> bool:
    return not row["canvas"].startswith("length_") and any(one["ratio"] for one in measured(row))


def _lines(axis: Any, series: dict[str, list[tuple[float, float]]], x: str, y: str) -> None:
    from matplotlib.ticker import LogLocator, NullLocator

    for name, points in series.items():
        style = "--" if name in ("floor", "visited tiles") else "-"
        axis.plot(*zip(*sorted(points), strict=True), style, marker="o", ms=4, label=name, color=_colour(name))
    axis.set_xscale("log", base=2 if x == "positions" else 10)
    axis.set_yscale("log")
    axis.set_xlabel(x)
    axis.set_ylabel(y)
    if x != "positions":
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(_plain)
    axis.tick_params(labelsize=8)
    axis.grid(True, which="major", alpha=0.3)
    axis.legend(fontsize=8)


def _series(results: Results, wanted: re.Pattern[str], x: str) -> dict[str, list[tuple[float, float]]]:
    """Seconds of every variant, floor and visited tiles over a property of the case."""
    series: dict[str, list[tuple[float, float]]] = {}
    for row in rows_of(results, "attention", "joint", "forward"):
        if not wanted.fullmatch(row["canvas"]):
            continue
        at = row["plan"]["density"] * 100 if x == "density" else row[x]
        for one in measured(row):
            if one["seconds"] is not None:
                series.setdefault(one["name"], []).append((at, one["seconds"][0]))
        ceilings = results.ceilings[row["dtype"]]
        for name, flops in (("floor", row["true_flops"]), ("visited tiles", row["visited_flops"])):
            series.setdefault(name, []).append((at, floor_seconds(ceilings, flops, row["moved_bytes"])))
    return series


def _length(results: Results, figure: Any) -> bool:
    series = _series(results, re.compile(r"length_.*"), "num_tokens")
    if not series:
        return False
    axis = figure.subplots()
    _lines(axis, series, "positions", "seconds")
    axis.set_title("computer use, more and more frames, joint softmax, forward", fontsize=9, loc="left")
    return True


def _sparsity(results: Results, figure: Any) -> bool:
    series = _series(results, re.compile("|".join(SPARSE)), "density")
    if not series:
        return False
    axis = figure.subplots()
    _lines(axis, series, "pairs that are allowed, %", "seconds")
    axis.set_title("2,048 positions, random blocks of 32 x 32, joint softmax, forward", fontsize=9, loc="left")
    return True


def _roofline(results: Results, figure: Any) -> bool:
    ceilings = results.ceilings.get(DTYPE[results.kind])
    found = [
        row
        for scope in ("joint", "connection")
        for row in rows_of(results, "attention", scope, "forward")
        if row["canvas"] in SHIPPED
    ]
    if ceilings is None or not found:
        return False
    axis = figure.subplots()
    intensities = [row["true_flops"] / row["moved_bytes"] for row in found]
    ridge = ceilings["matmul"] / ceilings["copy"]
    reach = [min(*intensities, ridge) / 3, max(*intensities, ridge) * 3]
    edge = sorted({reach[0], min(max(ridge, reach[0]), reach[1]), reach[1]})
    axis.plot(
        edge,
        [min(ceilings["matmul"], x * ceilings["copy"]) / 1e9 for x in edge],
        color="black",
        label="measured ceilings: copy, matrix product",
    )
    for scope, marker in (("joint", "o"), ("connection", "^")):
        mine = [row for row in found if row["scope"] == scope and row["variants"][0]["seconds"]]
        points = [
            (row["true_flops"] / row["moved_bytes"], row["true_flops"] / row["variants"][0]["seconds"][0] / 1e9)
            for row in mine
        ]
        if points:
            axis.scatter(*zip(*points, strict=True), marker=marker, color=_colour(OURS), label=f"{scope} softmax")
        for point, row in zip(points, mine, strict=True):
            axis.annotate(row["canvas"], point, (4, 3), textcoords="offset points", fontsize=7)
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlabel("FLOP of true pairs per byte of operands")
    axis.set_ylabel("GFLOP/s of true pairs")
    axis.grid(True, which="both", alpha=0.2)
    axis.legend(fontsize=8, loc="lower right")
    axis.set_title(f"shipped canvases, {DTYPE[results.kind]}, forward", fontsize=9, loc="left")
    return True


def _build(results: Results, figure: Any) -> bool:
    built = [row for row in results.builds if row["seconds"]]
    if not built:
        return False
    axes = figure.subplots(1, 2)
    for axis, unit in zip(axes, ("seconds", "peak MiB"), strict=True):
        series: dict[str, list[tuple[float, float]]] = {}
        for row in built:
            value = row["seconds"][0] if unit == "seconds" else (row["peak_bytes"] or 0) / 2**20
            # Below a MiB the counter sees pages, not what was asked for.
            if unit == "seconds" or value >= 1:
                series.setdefault(row["builder"], []).append((row["num_tokens"], value))
        if series:
            _lines(axis, series, "positions", unit)
    axes[0].set_title("building, computer use", fontsize=9, loc="left")
    return True
