"""What ``canvas-engineering run`` writes: a picture of input and output, and the report for people."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from canvas_engineering._files import atomic_write, write_json
from canvas_engineering._optional import require
from canvas_engineering.cli.clip import FloatArray
from canvas_engineering.cli.compare import OUTCOME_HEADER, Outcome
from canvas_engineering.cli.output import seconds, table
from canvas_engineering.cli.place import PixelRegion, Placed

if TYPE_CHECKING:
    from canvas_engineering.plan import BlockSparsePlan

SHOWN_FRAMES = 6


def draw_frames(path: Path, region: PixelRegion, read: FloatArray, title: str) -> None:
    """Frames of the clip above what attention read at the same positions, decoded to pixels.

    Args:
        read: ``(positions of the region, d_model)``, the content that each position reads.

    Raises:
        MissingDependencyError: matplotlib is not installed. OSError: ``path`` cannot be written.
    """
    require("matplotlib", "viz", "drawing the result")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    decoded = region.decode(read)
    count = region.shape[0]
    shown = np.unique(np.linspace(0, count - 1, min(count, SHOWN_FRAMES)).round().astype(int))
    figure = Figure(figsize=(2.2 * len(shown) + 0.6, 5.2), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    axes = figure.subplots(2, len(shown), squeeze=False)
    for column, frame in enumerate(shown):
        axes[0, column].set_title(f"frame {frame}", fontsize=9)
        for row, picture in enumerate((region.clip.frames[frame], decoded[frame])):
            axes[row, column].imshow(picture, interpolation="nearest")
            axes[row, column].set_xticks([])
            axes[row, column].set_yticks([])
    axes[0, 0].set_ylabel(f"placed in {region.name!r}")
    axes[1, 0].set_ylabel("read by attention")
    with atomic_write(path, binary=True) as file:
        figure.savefig(file, format="png", dpi=110)


def markdown(report: dict[str, Any], outcomes: list[Outcome], explanation: str) -> str:
    """The report for people; the same facts as the JSON."""
    stats = report["plan"]["stats"]
    placed = report["placed"].items()
    parts = [
        f"# {report['title']}",
        f"`{report['schema']}`: {stats['num_q']:,} positions, d_model {report['d_model']}, {report['heads']} heads, "
        f"softmax per {'connection' if report['plan']['softmax'] == 'connection' else 'query'}.",
        "## Input",
        table(("region", "holds"), placed, markdown=True),
        "## Plan",
        f"```\n{report['plan']['summary']}\n```",
        f"Compiled in {seconds(report['plan']['compile_seconds'])}.",
        "## Backends",
        table(OUTCOME_HEADER, [outcome.row() for outcome in outcomes], markdown=True),
        f"Compared: {report['compared']}. Allowed: max error {report['tolerance']['max_error']:.2e}, RMS error "
        f"{report['tolerance']['rms_error']:.2e}, which is {report['tolerance']['basis']}. Times are medians of "
        f"{report['repeat']} calls after the first.",
        "## Dispatcher",
        f"```\n{explanation}\n```",
        "## Versions",
        table(("package", "version"), [(n, v or "-") for n, v in report["versions"].items()], markdown=True),
    ]
    return "\n\n".join(parts) + "\n"


def write_results(folder: Path, report: dict[str, Any], text: str) -> list[Path]:
    """Write ``report.json`` and ``report.md``, each whole or not at all."""
    paths = [folder / "report.json", folder / "report.md"]
    write_json(paths[0], report)
    with atomic_write(paths[1]) as file:
        file.write(text)
    return paths


def draw_results(
    folder: Path, plan: BlockSparsePlan, placed: Placed, read: FloatArray | None, title: str
) -> list[Path]:
    """Write ``plan.png``, and ``result.png`` where a region holds pixels.

    Args:
        read: ``(positions of the pixel region, d_model)``, the content that each of its positions reads.
    """
    paths = [folder / "plan.png"]
    plan.plot(paths[0])
    if placed.pixels is not None and read is not None:
        paths.append(folder / "result.png")
        draw_frames(paths[1], placed.pixels, read, title)
    return paths
