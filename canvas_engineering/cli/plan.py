"""``canvas-engineering plan FILE``: compile a canvas, or load a plan; show what the plan costs, save or draw it."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from canvas_engineering.cli.output import print_json, seconds
from canvas_engineering.cli.schema_file import add_plan_arguments, read_plan

EPILOG = """examples:
  canvas-engineering plan examples/canvases/robot.json
  canvas-engineering plan canvas.json --softmax joint --block-q 128 --block-kv 128 --json
  canvas-engineering plan canvas.json --png plan.png --save canvas.plan
  canvas-engineering plan canvas.plan
"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "plan",
        help="compile a canvas and show what its plan costs",
        description="Compile a canvas into a block-sparse plan, or load a plan, and show what it costs.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "file",
        metavar="FILE",
        type=Path,
        help="a canvas (.json) written by CanvasSchema.to_json, or a plan written by --save",
    )
    add_plan_arguments(parser)
    parser.add_argument("--png", type=Path, metavar="FILE", help="draw the plan (needs the extra 'viz')")
    parser.add_argument("--save", type=Path, metavar="FILE", help="write the plan, to be read by BlockSparsePlan.load")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(command=main)


def main(args: argparse.Namespace) -> int:
    start = time.perf_counter()
    plan = read_plan(args.file, args)
    took = time.perf_counter() - start
    compiled = args.file.suffix == ".json"

    if args.save is not None:
        plan.save(args.save)
    if args.png is not None:
        plan.plot(args.png)

    if args.json:
        print_json(
            {
                "file": str(args.file),
                "softmax": plan.softmax,
                "digest": plan.digest,
                "compile_seconds": took if compiled else None,
                "stats": plan.stats().as_dict(),
                "save": None if args.save is None else str(args.save),
                "png": None if args.png is None else str(args.png),
            }
        )
        return 0
    print(plan)
    print(f"  {'compiled' if compiled else 'loaded'}  in {seconds(took)}")
    for path in (args.save, args.png):
        if path is not None:
            print(f"  written   {path}")
    return 0
