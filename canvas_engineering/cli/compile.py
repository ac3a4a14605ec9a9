"""``canvas-engineering compile``: compile the kernels ahead of time, for a device that need not be there."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from canvas_engineering._optional import require
from canvas_engineering.cli.output import print_json, table
from canvas_engineering.cli.schema_file import add_plan_arguments, read_plan
from canvas_engineering.errors import CanvasError
from canvas_engineering.plan import BlockSparsePlan
from canvas_engineering.plan.auto import TileTable

EPILOG = """examples:
  canvas-engineering compile --backend triton --target sm_90 --head-dim 128 --dtype bfloat16
  canvas-engineering compile --backend triton --target gfx942 --plan canvas.plan --json
  canvas-engineering compile --backend pallas --target v5e --plan examples/canvases/robot.json

targets:
  triton: sm_80, sm_90, sm_100 (NVIDIA), gfx942 (AMD)
  pallas: v5e, v5p, v6e, tpu7x (TPU)

A canvas whose tile sizes are auto is compiled with those that are fastest on the target.

exit status: 0 when all kernels compile and fit the target, 1 when not, 2 when there is no answer (a target, dtype or
package that is missing, a file that cannot be read)
"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "compile",
        help="compile the kernels for a GPU or TPU that need not be there",
        description="Compile every kernel ahead of time and report what it takes of the target.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--backend", choices=("triton", "pallas"), required=True, help="which kernels")
    parser.add_argument("--target", required=True, help="for which device, see below")
    parser.add_argument("--head-dim", type=int, default=128, metavar="N", help="default: 128")
    parser.add_argument("--dtype", default="bfloat16", help="bfloat16 (default), float16 or float32")
    parser.add_argument(
        "--plan",
        type=Path,
        metavar="FILE",
        help="a plan file, or a canvas (.json) to compile into one; else an example",
    )
    add_plan_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(command=main)


def main(args: argparse.Namespace) -> int:
    report = triton_report(args) if args.backend == "triton" else pallas_report(args)
    if args.json:
        print_json(report)
    else:
        print(triton_text(report) if args.backend == "triton" else text(report))
    return 0 if report["fits"] else 1


def given_plan(args: argparse.Namespace, tiles: TileTable) -> BlockSparsePlan | None:
    """The plan or canvas of ``--plan``, or None without it.

    Raises:
        CanvasError: Options that say how a canvas is compiled, and no canvas.
    """
    if args.plan is not None:
        return read_plan(args.plan, args, tiles)
    if (args.softmax, args.block_q, args.block_kv) != ("connection", "auto", "auto"):
        raise CanvasError("--softmax, --block-q and --block-kv say how the canvas of --plan is compiled, got no --plan")
    return None


def triton_report(args: argparse.Namespace) -> dict[str, Any]:
    """What the Triton kernels take of a GPU: ``kernels``, a list of one object per kernel; ``fits``; ``sentence``."""
    require("triton", "triton", "compiling for a GPU")
    from canvas_engineering.kernels.triton import aot
    from canvas_engineering.kernels.triton.config import recommended_tiles

    aot.check_arguments(args.target, args.head_dim, args.dtype)
    tiles = recommended_tiles(args.target, args.head_dim, args.dtype)
    plan = given_plan(args, tiles)
    return aot.compile_report(args.target, args.head_dim, args.dtype, plan)


def pallas_report(args: argparse.Namespace) -> dict[str, Any]:
    """What the Pallas kernels take of a TPU, in the same form."""
    require("jax", "tpu", "compiling for a TPU")
    from canvas_engineering.kernels.pallas import aot
    from canvas_engineering.kernels.pallas.tiles import TPU_TILES

    plan = given_plan(args, TPU_TILES)
    return aot.compile_report(args.target, args.head_dim, args.dtype, plan)


def triton_text(report: dict[str, Any]) -> str:
    """The report for people: one row per kernel, then the answer."""
    count = {report["kernels"][0]["instruction"]: "wgmma"}
    if any(one["mma"] for one in report["kernels"]):
        count["mma"] = "mma"  # the older instruction, for small blocks
    header = ("kernel", "registers", "stack", "shared memory", *count, "tile", "block", "warps", "stages")
    rows = [
        (
            one["name"],
            str(one["registers"]),
            f"{one['stack_bytes']:,} B",
            f"{one['shared_bytes']:,} of {one['shared_limit']:,} B",
            *(str(one[name]) for name in count.values()),
            f"{one['block_q']} x {one['block_kv']}",
            f"{one['block_m']} x {one['block_n']}" if one["block_n"] else str(one["block_m"]),
            str(one["num_warps"]),
            str(one["num_stages"]),
        )
        for one in report["kernels"]
    ]
    return f"{table(header, rows)}\n\n{report['sentence']}"


def text(report: dict[str, Any]) -> str:
    """The report for people: one row per kernel, one column per number, then the answer."""
    kernels = report["kernels"]
    header = list(dict.fromkeys(name for kernel in kernels for name in kernel))
    rows = [[" ".join(str(kernel.get(name, "")).split()) for name in header] for kernel in kernels]
    lines = [table([name.replace("_", " ") for name in header], rows)] if kernels else []
    return "\n\n".join([*lines, report["sentence"]])
