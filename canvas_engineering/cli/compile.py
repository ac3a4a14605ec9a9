"""``canvas-engineering compile``: compile the kernels ahead of time, for a device that need not be there."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from canvas_engineering._optional import require
from canvas_engineering.cli.output import print_json, table
from canvas_engineering.cli.schema_file import add_plan_arguments, read_schema
from canvas_engineering.kernels.pallas.tiles import TPU_TILES
from canvas_engineering.plan import BlockSparsePlan
from canvas_engineering.plan.auto import AUTO_TILES, TileTable
from canvas_engineering.plan.compile import compile_topology

EPILOG = """examples:
  canvas-engineering compile --backend triton --target sm_90 --head-dim 128 --dtype bfloat16
  canvas-engineering compile --backend triton --target gfx942 --plan canvas.plan --json
  canvas-engineering compile --backend pallas --target v5e --plan examples/canvases/robot.json

targets:
  triton: sm_80, sm_90, sm_100 (NVIDIA), gfx942 (AMD)
  pallas: v5e, v5p, v6e, tpu7x (TPU)

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
    plan = None if args.plan is None else read_plan(args)
    report = compile_report(args.backend, args.target, args.head_dim, args.dtype, plan)
    if args.json:
        print_json(report)
    else:
        print(text(report))
    return 0 if report["fits"] else 1


def read_plan(args: argparse.Namespace) -> BlockSparsePlan:
    """The plan in ``args.plan``, or that of the canvas in it."""
    if args.plan.suffix != ".json":
        return BlockSparsePlan.load(args.plan)
    schema, topology = read_schema(args.plan)
    return compile_topology(
        topology,
        schema.layout,
        softmax=args.softmax,
        block_q=args.block_q,
        block_kv=args.block_kv,
        tiles=tile_table(args.backend),
    )


def tile_table(backend: str) -> TileTable:
    """The tile sizes that ``auto`` chooses from: those that the backend takes."""
    return TPU_TILES if backend == "pallas" else AUTO_TILES


def compile_report(
    backend: str, target: str, head_dim: int, dtype: str, plan: BlockSparsePlan | None
) -> dict[str, Any]:
    """The report of a backend: ``kernels``, a list of one object per kernel; ``fits``; ``sentence``."""
    if backend == "triton":
        require("triton", "triton", "compiling for a GPU")
        from canvas_engineering.kernels.triton import aot

        return aot.compile_report(target, head_dim, dtype, plan)
    require("jax", "tpu", "compiling for a TPU")
    from canvas_engineering.kernels.pallas import aot as pallas_aot

    return pallas_aot.compile_report(target, head_dim, dtype, plan)


def text(report: dict[str, Any]) -> str:
    """The report for people: one row per kernel, one column per number, then the answer."""
    kernels = report["kernels"]
    header = list(dict.fromkeys(name for kernel in kernels for name in kernel))
    rows = [[" ".join(str(kernel.get(name, "")).split()) for name in header] for kernel in kernels]
    lines = [table([name.replace("_", " ") for name in header], rows)] if kernels else []
    return "\n\n".join([*lines, report["sentence"]])
