"""Draws the pictures of the README: ``python docs/make_figures.py``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from canvas_engineering import BlockSparsePlan, CanvasLayout, CanvasSchema
from canvas_engineering.cli.place import gather_input, orthonormal, place
from canvas_engineering.cli.run import pixels_read, split_heads
from canvas_engineering.plan.plot import tile_image

ROOT = Path(__file__).resolve().parents[1]
CANVAS = ROOT / "examples" / "canvases" / "computer_use.json"
PICTURE = ROOT / "docs" / "images" / "overview.png"
COLOURS = {"screen": "#4c78a8", "mouse": "#e45756", "keyboard": "#f2a13c", "llm": "#54a24b"}
UNUSED = "#e8e8e8"
TILE_COLOURS = {"full tile": (0.13, 0.35, 0.62), "partial tile": (0.98, 0.68, 0.25)}
SHOWN_FRAMES = 5
HEADS = 4


def rgb(colour: str) -> tuple[float, ...]:
    return tuple(int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))


def draw_canvas(axes: Any, layout: CanvasLayout) -> None:
    """The first frames of the grid, stacked, each position in the colour of its region."""
    rows, columns = layout.spatial_shape
    frame = np.empty((rows, columns, 3))
    frame[:] = rgb(UNUSED)
    for name, colour in COLOURS.items():
        _, _, row0, row1, column0, column1 = layout.region_spec(name).bounds
        frame[row0:row1, column0:column1] = rgb(colour)
    step = 7
    for t in reversed(range(SHOWN_FRAMES)):
        left, top = t * step, -t * step * 0.55
        axes.imshow(frame, extent=(left, left + columns, top + rows, top), zorder=-t, interpolation="nearest")
        box = ((left, left + columns, left + columns, left, left), (top, top, top + rows, top + rows, top))
        axes.plot(*box, color="white", linewidth=1.5, zorder=-t)
    axes.set_xlim(-1, columns + step * SHOWN_FRAMES)
    axes.set_ylim(rows + 1, -step * 0.55 * SHOWN_FRAMES)
    axes.axis("off")
    axes.legend(
        handles=[Patch(color=colour, label=name) for name, colour in COLOURS.items()],
        loc="upper center",
        bbox_to_anchor=(0.5, -0.02),
        ncols=4,
        frameon=False,
        handlelength=1,
        columnspacing=1,
    )


def draw_plan(axes: Any, plan: BlockSparsePlan) -> None:
    """The visited tiles of the first frames; what no connection names is cropped."""
    frames = SHOWN_FRAMES * plan.num_q_tiles // 26
    axes.imshow(tile_image(plan)[:frames, :frames], interpolation="nearest")
    axes.set_xlabel("keys, tile by tile")
    axes.set_ylabel("queries, tile by tile")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.legend(
        handles=[Patch(color=colour, label=label) for label, colour in TILE_COLOURS.items()],
        loc="upper right",
        frameon=False,
    )


def main() -> None:
    schema = CanvasSchema.from_json(CANVAS)
    layout = schema.layout
    if schema.topology is None:
        raise SystemExit(f"{CANVAS} declares no topology")
    plan = BlockSparsePlan.from_topology(schema.topology, layout)
    placed = place(layout, gather_input(layout, None))
    rotation = orthonormal(layout.d_model, layout.d_model, np.random.default_rng(1))
    q = split_heads(placed.canvas[0].numpy() @ rotation, HEADS)
    read = pixels_read(plan, layout, placed, q, q)
    if placed.pixels is None or read is None:
        raise SystemExit(f"{CANVAS} has no region for pixels")
    stats = plan.stats()

    figure = Figure(figsize=(12.5, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    panels: Any = figure.subfigures(1, 3, width_ratios=(1.05, 1, 1.2))
    panels[0].suptitle("declare: regions on a (T, H, W) grid,\nand who attends to whom, when", fontsize=11)
    draw_canvas(panels[0].subplots(), layout)
    panels[1].suptitle(
        f"compile: one block-sparse plan, {stats.density:.1%} of dense,\n"
        f"{stats.computed_per_true:.2f} pairs computed per pair needed",
        fontsize=11,
    )
    draw_plan(panels[1].subplots(), plan)
    panels[2].suptitle("run: on GPU, TPU or CPU,\nequal to the NumPy reference", fontsize=11)
    decoded = placed.pixels.decode(read)
    axes = panels[2].subplots(2, 2)
    for column, frame in enumerate((12, 15)):
        for row, picture in enumerate((placed.pixels.clip.frames[frame], decoded[frame])):
            axes[row, column].imshow(picture, interpolation="nearest")
            axes[row, column].set_xticks([])
            axes[row, column].set_yticks([])
    axes[0, 0].set_ylabel("placed")
    axes[1, 0].set_ylabel("read by attention")
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(PICTURE, dpi=100)
    print(PICTURE.relative_to(ROOT))


if __name__ == "__main__":
    main()
