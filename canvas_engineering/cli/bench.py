"""``canvas-engineering bench``: measure, render and compare; works in a checkout, where ``bench/`` is."""

from __future__ import annotations

import argparse
import importlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import canvas_engineering
from canvas_engineering._optional import require
from canvas_engineering.cli.output import print_json, seconds, table
from canvas_engineering.errors import CanvasError

EPILOG = """examples:
  canvas-engineering bench run                      the quick run: minutes; saved under bench/results/
  canvas-engineering bench run --only robot         only the cases whose name holds "robot"; nothing is saved
  canvas-engineering bench run --device cuda        on a GPU: the Triton kernels against flex_attention and others
  canvas-engineering bench report                   tables and pictures: docs/benchmarks.md
  canvas-engineering bench compare                  against the last committed result: what became slower
"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "bench",
        help="measure against peers, render the results, find regressions (in a checkout)",
        description="Measure this package against its peers on this machine.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)

    run = actions.add_parser("run", help="measure", description="Run the benchmarks and save the result.")
    run.add_argument("--full", action="store_true", help="everything, which takes hours on a small machine")
    run.add_argument("--only", metavar="EXPRESSION", help="cases to run, as pytest's -k takes them")
    run.add_argument("--out", type=Path, metavar="FILE", help="where to save; bench/results/ by default")
    run.add_argument("--device", default="cpu", help="torch device (default: cpu)")
    run.add_argument("--threads", type=positive, metavar="N", help="threads of torch; all cores by default")
    run.set_defaults(command=run_benchmarks)

    report = actions.add_parser("report", help="render", description="Write docs/benchmarks.md from bench/results/.")
    report.set_defaults(command=write_report)

    compare = actions.add_parser(
        "compare",
        help="find regressions",
        description="Compare results with those committed before. Exit status 1: something became slower.",
    )
    compare.add_argument("result", nargs="*", type=Path, metavar="FILE", help="results; all of bench/results/ if none")
    compare.add_argument(
        "--against", default="HEAD", metavar="REVISION|FILE", help="a revision of the checkout, or a result file"
    )
    compare.add_argument("--json", action="store_true", help="print JSON")
    compare.set_defaults(command=compare_results)


def positive(text: str) -> int:
    """A positive number."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a positive number, got {text!r}")
    return int(text)


def checkout() -> Path:
    """The folder that holds ``bench/``: where this package was imported from, or the current one.

    Raises:
        CanvasError: Neither holds it.
    """
    package = Path(canvas_engineering.__file__).resolve().parents[1]
    for folder in (package, Path.cwd()):
        if (folder / "bench" / "measure.py").is_file():
            return folder
    raise CanvasError(
        "the benchmarks are part of the repository, not of the installed package: run this in a checkout of it; "
        f"found no bench/measure.py in {package} or {Path.cwd()}"
    )


def load(module: str) -> Any:
    """A module of the checkout's ``bench`` package."""
    root = str(checkout())
    if root not in sys.path:
        sys.path.insert(0, root)
    return importlib.import_module(f"bench.{module}")


def run_benchmarks(args: argparse.Namespace) -> int:
    root = checkout()
    for module, extra in (("torch", "torch"), ("pytest", "dev"), ("pytest_benchmark", "dev"), ("tqdm", "dev")):
        require(module, extra, "bench run")
    command = [sys.executable, "-m", "pytest", str(root / "bench"), "--benchmark-enable"]
    command += ["-p", "no:cacheprovider", "-o", "console_output_style=classic", "--quiet", "--disable-warnings"]
    command += ["--bench-device", args.device]
    command += ["--bench-scale", "full" if args.full else "quick"]
    if args.threads is not None:
        command += ["--bench-threads", str(args.threads)]
    if args.only is not None:
        command += ["-k", args.only]
    if args.out is not None:
        command += ["--bench-out", str(args.out.resolve())]
    elif args.only is None:
        command += ["--bench-save"]
    # 1: a result was wrong. Anything else above 0: the run itself failed, which its output tells.
    # Options that someone keeps for tests, and what an outer pytest-xdist says to its workers, are not for this run.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    status = subprocess.run(command, cwd=root, check=False, env=environment).returncode
    if status > 1:
        raise CanvasError(f"the benchmarks could not be run: pytest ended with status {status}")
    return status


def write_report(args: argparse.Namespace) -> int:
    require("matplotlib", "viz", "bench report")
    for path in load("report").write_report():
        print(f"written: {path}")
    return 0


def compare_results(args: argparse.Namespace) -> int:
    results, comparing = load("results"), load("compare")
    paths = args.result or [
        path
        for path in sorted(results.FOLDER.glob("*.json"))
        if results.is_results(importlib.import_module("canvas_engineering._files").read_json(path))
    ]
    found = {}
    for path in paths:
        after = results.Results.load(path)
        if Path(args.against).is_file():
            before = results.Results.load(Path(args.against))
        else:
            before = comparing.committed(path, args.against)
        found[path.name] = None if before is None else comparing.compare(before, after)
    slower = any(change.verdict == "slower" for changes in found.values() for change in changes or ())
    if args.json:
        print_json(
            {name: None if changes is None else [one.as_dict() for one in changes] for name, changes in found.items()}
        )
        return int(slower)
    for name, changes in found.items():
        print(_told(name, changes, args.against))
    if not found:
        print("no results to compare: run `canvas-engineering bench run` first")
    return int(slower)


def _told(name: str, changes: Any, against: str) -> str:
    if changes is None:
        return f"{name}: nothing to compare with in {against}"
    different = [change for change in changes if change.verdict != "same"]
    summary = f"{name}: {len(changes) - len(different)} of {len(changes)} the same as in {against}"
    if not different:
        return summary
    rows = [
        (
            change.verdict,
            "-" if change.before is None else seconds(change.before),
            "-" if change.after is None else seconds(change.after),
            "-" if change.factor is None else f"{change.factor:.2f} x",
            change.id,
        )
        for change in sorted(different, key=lambda one: (one.verdict != "slower", one.verdict, one.id))
    ]
    return f"{summary}\n{table(('', 'before', 'after', 'factor', 'case'), rows)}"
