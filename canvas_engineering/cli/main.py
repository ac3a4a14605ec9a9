"""Entry point of ``canvas-engineering``: parses, runs one command, turns refusals into one line and a status.

Exit status: 0 done; 1 done, and the answer is "no" (a backend differs from the reference, nothing can run);
2 the input was refused (usage, a bad file, a missing extra, a path that cannot be written).
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Sequence
from typing import TextIO

from canvas_engineering import __version__
from canvas_engineering.cli import bench, compile as compile_command, doctor, plan, run, tune
from canvas_engineering.errors import CanvasError, MissingDependencyError

COMMANDS = (doctor, plan, run, compile_command, tune, bench)

EPILOG = """examples:
  canvas-engineering doctor
  canvas-engineering plan examples/canvases/robot.json --png plan.png
  canvas-engineering run examples/canvases/computer_use.json --out result
  canvas-engineering compile --backend triton --target sm_90 --plan examples/canvases/robot.json
  canvas-engineering tune --dry-run

exit status:
  0 done, 1 done and the answer is "no" (a result differs, nothing can run here), 2 refused input
"""


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line."""
    parser = argparse.ArgumentParser(
        prog="canvas-engineering",
        description="Compile declared canvases into block-sparse attention plans, look at them, run them.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"canvas-engineering {__version__}")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in COMMANDS:
        command.add_parser(subparsers)
    return parser


def one_line(error: Exception) -> str:
    """The message of ``error`` for a person: no class name, no errno, no line breaks."""
    if isinstance(error, OSError) and error.strerror:
        message = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    else:
        message = str(error)
    return " ".join(message.split())


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    print(f"warning: {' '.join(str(message).split())}", file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit status; usage errors leave through ``SystemExit(2)``."""
    args = build_parser().parse_args(argv)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("default", UserWarning)
            warnings.showwarning = _show_warning
            status: int = args.command(args)
            sys.stdout.flush()
            return status
    except BrokenPipeError:
        # The reader of our output is gone (`| head`); keep the interpreter from complaining about it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (CanvasError, MissingDependencyError, OSError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def entry_point() -> None:
    """What the console script calls."""
    sys.exit(main())


if __name__ == "__main__":
    entry_point()
