"""``canvas-engineering run SCHEMA.json``: the main job, from a declaration and real input to checked results."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from canvas_engineering._optional import require
from canvas_engineering.cli.clip import FloatArray
from canvas_engineering.cli.compare import (
    MAX_ERROR_FACTOR,
    OUTCOME_HEADER,
    RMS_ERROR_FACTOR,
    Outcome,
    Tolerance,
    Yardstick,
    compare_backends,
    judge,
    max_and_rms,
    timed,
)
from canvas_engineering.cli.doctor import package_versions
from canvas_engineering.cli.output import print_json, seconds, table, writable_folder
from canvas_engineering.cli.place import Placed, gather_input, orthonormal, place
from canvas_engineering.cli.report import draw_results, markdown, write_results
from canvas_engineering.cli.schema_file import add_plan_arguments, add_schema_argument, read_schema
from canvas_engineering.errors import CanvasError

if TYPE_CHECKING:
    from canvas_engineering.canvas import CanvasLayout
    from canvas_engineering.connectivity import CanvasTopology
    from canvas_engineering.plan import BlockSparsePlan

EPILOG = """examples:
  canvas-engineering run examples/canvases/computer_use.json --out result
  canvas-engineering run canvas.json --input clip.npy --heads 8 --json

input:
  without --input, a window panned over the photograph that matplotlib ships; the pan path goes into 'mouse'
  .npy: a clip (frames, height, width, 3), uint8 or 0..1, for the region with the most positions
  .npz: one array per region, by name: a clip, or (positions, features)

exit status:
  0 every backend that ran equals the reference, 1 one differs, 2 refused input
"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "run",
        help="compile a canvas, run it on real input on every backend, compare, time, and report",
        description="Compile a canvas, place real input on it, run its attention on every backend that can run here, "
        "compare each with the reference, time them, and write pictures and a report.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_schema_argument(parser)
    add_plan_arguments(parser)
    parser.add_argument("--input", type=Path, metavar="FILE", help="a .npy clip or .npz arrays (default: a photograph)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write pictures and reports here")
    parser.add_argument("--heads", type=int, default=4, metavar="N", help="attention heads (default 4)")
    parser.add_argument("--repeat", type=int, default=5, metavar="N", help="timed calls per backend (default 5)")
    parser.add_argument(
        "--interpret", action="store_true", help="also run backends that are only simulated here (minutes to hours)"
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.set_defaults(command=main)


def split_heads(tokens: FloatArray, heads: int) -> FloatArray:
    """``(N, d_model)`` to ``(1, H, N, head_dim)``, contiguous."""
    return np.ascontiguousarray(tokens.reshape(tokens.shape[0], heads, -1).transpose(1, 0, 2)[None])


def merge_heads(output: FloatArray) -> FloatArray:
    """``(1, H, N, head_dim)`` to ``(N, d_model)``."""
    return output[0].transpose(1, 0, 2).reshape(output.shape[2], -1)


def pixels_read(
    plan: BlockSparsePlan, layout: CanvasLayout, placed: Placed, q: FloatArray, k: FloatArray
) -> FloatArray | None:
    """``(positions of the pixel region, d_model)``: the mean of the pixel content that each position reads.

    Only the pixel region has content here, and each row is divided by the weight it gave to that region, so that
    what is read elsewhere does not darken the picture. None without a pixel region.
    """
    if placed.pixels is None:
        return None
    import torch

    from canvas_engineering.attention.api import block_sparse_attention

    index = np.asarray(layout.region_indices(placed.pixels.name))
    content, ones = np.zeros_like(placed.content), np.zeros_like(placed.content)
    content[index], ones[index] = placed.content[index], 1
    query, key = torch.from_numpy(q), torch.from_numpy(k)

    def read(values: FloatArray) -> FloatArray:
        out = block_sparse_attention(query, key, torch.from_numpy(split_heads(values, q.shape[1])), plan)
        return merge_heads(out.numpy())[index]

    total, share = read(content), read(ones)
    return np.divide(total, share, out=np.zeros_like(total), where=share > 0)


def run_dispatcher(
    topology: CanvasTopology, layout: CanvasLayout, placed: Placed, args: argparse.Namespace, yardstick: Yardstick
) -> tuple[Outcome, str]:
    """Run the torch ``AttentionDispatcher`` on the canvas and hold it against itself in float64 on the reference.

    Args:
        args: Its ``heads``, ``block_q``, ``block_kv`` and ``repeat`` are used.

    Returns:
        The outcome, and what ``explain()`` says.
    """
    import torch

    from canvas_engineering.dispatch import AttentionDispatcher

    def build(backend: str) -> AttentionDispatcher:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return AttentionDispatcher(
                topology,
                layout,
                layout.d_model,
                n_heads=args.heads,
                backend=backend,
                block_q=args.block_q,
                block_kv=args.block_kv,
            ).eval()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dispatcher = build("auto").to(device)
    x = placed.canvas.to(device)

    def call() -> torch.Tensor:
        out: torch.Tensor = dispatcher(x)
        if device == "cuda":
            torch.cuda.synchronize()
        return out

    with torch.inference_mode():
        result, median, first = timed(call, args.repeat)
        explanation = str(dispatcher.explain())
        if not yardstick.complete:
            reason = "the reference would take too long on this canvas"
            outcome = Outcome("dispatcher", f"torch {device}", "not compared", reason, None, None, first, median)
            return outcome, explanation
        exact = build("reference").double()(placed.canvas.double()).numpy()
        rounded = build("reference")(placed.canvas).numpy()
    # Float32 projections cost something whatever the backend; attention's own rounding comes on top.
    projections = max_and_rms(rounded - exact)
    allowed = Tolerance(
        yardstick.tolerance.max_error + MAX_ERROR_FACTOR * projections[0],
        yardstick.tolerance.rms_error + RMS_ERROR_FACTOR * projections[1],
        "",
    )
    error = max_and_rms(result.cpu().numpy() - exact)
    return judge("dispatcher", f"torch {device}", error, (first, median), allowed), explanation


def main(args: argparse.Namespace) -> int:
    from canvas_engineering.plan import BlockSparsePlan

    schema, topology = read_schema(args.schema)
    layout = schema.layout
    if args.heads < 1 or layout.d_model % args.heads:
        raise CanvasError(f"d_model must be divisible by --heads, got d_model={layout.d_model}, heads={args.heads}")
    if args.repeat < 1:
        raise CanvasError(f"--repeat must be at least 1, got {args.repeat}")
    if args.out is not None:
        require("matplotlib", "viz", "--out")
        writable_folder(args.out)

    start = time.perf_counter()
    plan = BlockSparsePlan.from_topology(
        topology, layout, softmax=args.softmax, block_q=args.block_q, block_kv=args.block_kv
    )
    compile_seconds = time.perf_counter() - start
    placed = place(layout, gather_input(layout, args.input))

    # The same rotation for queries and keys: tokens read what resembles them. Values are the content as it is.
    rotation = orthonormal(layout.d_model, layout.d_model, np.random.default_rng(1))
    q = k = split_heads(placed.canvas[0].numpy() @ rotation, args.heads)
    v = split_heads(placed.content, args.heads)
    yardstick, outcomes = compare_backends(plan, q, k, v, args.repeat, args.interpret)
    outcome, explanation = run_dispatcher(topology, layout, placed, args, yardstick)
    outcomes.append(outcome)

    report: dict[str, Any] = {
        "title": schema.metadata.get("title", args.schema.stem),
        "schema": args.schema.name,
        "d_model": layout.d_model,
        "heads": args.heads,
        "repeat": args.repeat,
        "placed": placed.regions,
        "plan": {
            "softmax": plan.softmax,
            "digest": plan.digest,
            "compile_seconds": compile_seconds,
            "summary": str(plan),
            "stats": plan.stats().as_dict(),
        },
        "compared": yardstick.compared,
        "tolerance": vars(yardstick.tolerance),
        "outcomes": [outcome.as_dict() for outcome in outcomes],
        "versions": package_versions(),
    }
    status = 1 if any(outcome.status == "differs" for outcome in outcomes) else 0
    report["equal"] = status == 0
    written = []
    if args.out is not None:
        written = write_results(args.out, report, markdown(report, outcomes, explanation))
        written += draw_results(args.out, plan, placed, pixels_read(plan, layout, placed, q, k), report["title"])
    if args.json:
        print_json(report | {"written": [str(path) for path in written]})
        return status
    print(f"{report['title']}\n\n{plan}\n  compiled  in {seconds(compile_seconds)}\n")
    print(table(("region", "holds"), placed.regions.items()), end="\n\n")
    print(table(OUTCOME_HEADER, [outcome.row() for outcome in outcomes]), end="\n\n")
    print("every backend that ran equals the reference" if status == 0 else "a result DIFFERS from the reference")
    for path in written:
        print(f"written: {path}")
    return status
