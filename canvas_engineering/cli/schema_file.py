"""Reading the canvas or the plan that a command is given."""

from __future__ import annotations

import argparse
from pathlib import Path

from canvas_engineering.connectivity import CanvasTopology
from canvas_engineering.errors import CanvasError, SchemaError
from canvas_engineering.plan import BlockSparsePlan
from canvas_engineering.plan.auto import AUTO_TILES, TileTable
from canvas_engineering.plan.compile import compile_topology
from canvas_engineering.schema import CanvasSchema


def add_schema_argument(parser: argparse.ArgumentParser) -> None:
    """The positional argument ``SCHEMA.json``."""
    parser.add_argument("schema", metavar="SCHEMA.json", type=Path, help="a canvas written by CanvasSchema.to_json")


def add_plan_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that choose how a topology is compiled."""
    parser.add_argument(
        "--softmax",
        choices=("connection", "joint"),
        default="connection",
        help="one softmax per connection group, summed with their weights (default), or one per query",
    )
    parser.add_argument(
        "--block-q", type=block_size, default="auto", metavar="N", help="rows of a tile, or auto (default)"
    )
    parser.add_argument(
        "--block-kv", type=block_size, default="auto", metavar="N", help="keys of a tile, or auto (default)"
    )


def block_size(text: str) -> int | str:
    """Parse ``auto`` or a positive number."""
    if text == "auto":
        return "auto"
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be 'auto' or a positive number, got {text!r}")
    return int(text)


def read_schema(path: Path) -> tuple[CanvasSchema, CanvasTopology]:
    """The schema in ``path`` and its topology.

    Raises:
        SchemaError: The file is not a schema, or declares no connections.
        OSError: The file cannot be read.
    """
    schema = CanvasSchema.from_json(path)
    if schema.topology is None or not schema.topology.connections:
        raise SchemaError(f"{path}: 'topology' must hold at least one connection for a plan, got none")
    return schema, schema.topology


def read_plan(path: Path, args: argparse.Namespace, tiles: TileTable = AUTO_TILES) -> BlockSparsePlan:
    """The plan in ``path``, or that of the canvas in it, compiled as the options of ``add_plan_arguments`` say.

    Args:
        path: A canvas if it ends in ``.json``, else a plan file.
        args: Parsed options.
        tiles: The tile sizes that ``auto`` chooses from.

    Raises:
        SchemaError: A canvas that cannot be read. PlanError: a plan file that cannot. CanvasError: options for a plan.
    """
    if path.suffix != ".json":
        if (args.softmax, args.block_q, args.block_kv) != ("connection", "auto", "auto"):
            raise CanvasError(
                f"--softmax, --block-q and --block-kv say how a canvas (.json) is compiled, and {str(path)!r} is taken "
                f"for a plan, which is compiled already: leave them out"
            )
        return BlockSparsePlan.load(path)
    schema, topology = read_schema(path)
    return compile_topology(
        topology, schema.layout, softmax=args.softmax, block_q=args.block_q, block_kv=args.block_kv, tiles=tiles
    )
