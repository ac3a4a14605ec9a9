"""The canvases that are measured, each with where it comes from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import numpy as np

from canvas_engineering.canvas import CanvasLayout
from canvas_engineering.connectivity import CanvasTopology, Connection
from canvas_engineering.masks import MaskSpec
from canvas_engineering.schema import CanvasSchema

EXAMPLES = Path(__file__).resolve().parents[1] / "examples" / "canvases"
COMPUTER_USE = ("screen", "mouse", "keyboard", "llm")


@dataclass(frozen=True)
class Declared:
    """A canvas as its user writes it."""

    layout: CanvasLayout
    topology: CanvasTopology


@dataclass(frozen=True)
class Canvas:
    """A named canvas.

    Attributes:
        name: As in case ids.
        title: As in tables.
        provenance: Where its numbers come from.
        shipped: It is one of the repository's examples.
        declare: Makes it.
    """

    name: str
    title: str
    provenance: str
    declare: Callable[[], Declared]
    shipped: bool = False


def _example(name: str) -> Declared:
    schema = CanvasSchema.from_json(EXAMPLES / f"{name}.json")
    if schema.topology is None:
        raise ValueError(f"examples/canvases/{name}.json must hold a topology")
    return Declared(schema.layout, schema.topology)


def _retopologized(name: str, topology: Callable[[], CanvasTopology]) -> Declared:
    return Declared(_example(name).layout, topology())


def each_pair_once(regions: tuple[str, ...]) -> CanvasTopology:
    """Regions read themselves in the same frame and each other in the previous one: no (src, dst) stands twice."""
    return CanvasTopology([Connection(a, b, t_src=0, t_dst=0 if a == b else -1) for a in regions for b in regions])


def computer_use(frames: int, side: int, topology: CanvasTopology | None = None) -> Declared:
    """The computer-use canvas at another size: regions keep their share of the grid."""
    share = side / 32

    def region(*bounds: int) -> tuple[int, ...]:
        return (0, frames, *(max(int(bound * share), int(bound > 0)) for bound in bounds))

    layout = CanvasLayout(
        T=frames,
        H=side,
        W=side,
        d_model=256,
        regions={
            "screen": region(0, 24, 0, 24),
            "mouse": region(24, 26, 0, 4),
            "keyboard": region(26, 28, 0, 4),
            "llm": region(28, 32, 0, 8),
        },
    )
    return Declared(layout, topology or CanvasTopology.causal_temporal(COMPUTER_USE))


def one_region(grid: tuple[int, ...], mask: MaskSpec | None = None) -> Declared:
    """One region that fills its grid and attends to itself under a mask."""
    bounds = tuple(bound for size in grid for bound in (0, size))
    layout = CanvasLayout(T=grid[0], spatial_shape=grid[1:], d_model=256, regions={"all": bounds})
    return Declared(layout, CanvasTopology([Connection("all", "all", mask=mask)]))


def block_sparse(num_tokens: int, block: int, density: float) -> Declared:
    """A random mask of square blocks at a density; every row keeps its diagonal block."""
    count = num_tokens // block
    blocks = np.random.default_rng(0).random((count, count)) < density
    np.fill_diagonal(blocks, True)
    mask = np.kron(blocks, np.ones((block, block), np.bool_))
    return one_region((1, num_tokens), MaskSpec("sparse", mask=mask))


def scattered(num_tokens: int, density: float) -> Declared:
    """A random mask without any structure; every row keeps its own position."""
    mask = np.random.default_rng(0).random((num_tokens, num_tokens)) < density
    np.fill_diagonal(mask, True)
    return one_region((1, num_tokens), MaskSpec("sparse", mask=mask))


def length_name(frames: int, side: int) -> str:
    """Name of the computer-use canvas at a size."""
    return f"length_{frames}x{side}x{side}"


_MADE = "Made for these benchmarks"
_NATTEN = "(30, 48, 80) canvas with (18, 24, 24) windows, 91 % sparse, as in NATTEN's published table"
DENSITIES = (0.05, 0.1, 0.25, 0.5)
#: (frames, rows and columns) of the computer-use canvas for cost over length: more frames, 1,024 to 16,384 positions.
LENGTHS = ((1, 32), (2, 32), (4, 32), (8, 32), (16, 32))
#: The same for building plans, 2,048 to 1,048,576 positions.
BUILD_LENGTHS = ((8, 16), (8, 32), (16, 32), (32, 32), (16, 64), (32, 64), (64, 64), (64, 128))

_CANVASES = [
    Canvas("robot", "robot, 320", "examples/canvases/robot.json", partial(_example, "robot"), True),
    Canvas(
        "computer_use_2048",
        "computer use, 2,048, causal",
        "examples/canvases/computer_use_small.json",
        partial(_example, "computer_use_small"),
        True,
    ),
    Canvas(
        "computer_use_2048_dense",
        "computer use, 2,048, dense",
        "Regions of computer_use_small.json, CanvasTopology.dense",
        partial(_retopologized, "computer_use_small", partial(CanvasTopology.dense, COMPUTER_USE)),
    ),
    Canvas(
        "computer_use_2048_once",
        "computer use, 2,048, each pair once",
        "computer_use_small.json without the second edge of a region to itself, which 0.5.0 gets wrong",
        partial(_retopologized, "computer_use_small", partial(each_pair_once, COMPUTER_USE)),
    ),
    Canvas(
        "computer_use_16384",
        "computer use, 16,384, causal",
        "examples/canvases/computer_use.json",
        partial(_example, "computer_use"),
        True,
    ),
    Canvas(
        "computer_use_16384_dense",
        "computer use, 16,384, dense",
        "Regions of computer_use.json, CanvasTopology.dense",
        partial(_retopologized, "computer_use", partial(CanvasTopology.dense, COMPUTER_USE)),
    ),
    Canvas(
        "computer_use_16384_once",
        "computer use, 16,384, each pair once",
        "computer_use.json without the second edge of a region to itself, which 0.5.0 gets wrong",
        partial(_retopologized, "computer_use", partial(each_pair_once, COMPUTER_USE)),
    ),
    Canvas(
        "multi_robot",
        "multi-robot, hub and spoke, 2,048",
        "examples/canvases/multi_robot.json",
        partial(_example, "multi_robot"),
        True,
    ),
    Canvas(
        "multi_frequency",
        "multi-frequency, hold and interpolate, 4,096",
        "examples/canvases/multi_frequency.json",
        partial(_example, "multi_frequency"),
        True,
    ),
    Canvas(
        "tiles",
        "8 x 8 tiles, 2,304",
        f"{_MADE}: MaskSpec(kind='tile') on (4, 24, 24)",
        partial(one_region, (4, 24, 24), MaskSpec("tile", tile_shape=(8, 8))),
    ),
    *(
        Canvas(
            f"sparse_{round(100 * density):02d}",
            f"32 x 32 blocks, {density:.0%}, 2,048",
            f"{_MADE}: MaskSpec(kind='sparse'), random 32 x 32 blocks, diagonal kept",
            partial(block_sparse, 2048, 32, density),
        )
        for density in DENSITIES
    ),
    Canvas(
        "scattered_05",
        "unstructured mask, 5 %, 2,048",
        f"{_MADE}: MaskSpec(kind='sparse'), random pairs",
        partial(scattered, 2048, 0.05),
    ),
    Canvas(
        "video_small",
        "video windows, 3,200",
        f"The {_NATTEN}, scaled to (10, 16, 20) and (6, 8, 6)",
        partial(one_region, (10, 16, 20), MaskSpec("window", window_shape=(6, 8, 6))),
    ),
    Canvas(
        "video",
        "video windows, 115,200",
        _NATTEN,
        partial(one_region, (30, 48, 80), MaskSpec("window", window_shape=(18, 24, 24))),
    ),
    Canvas("dense", "dense, 1,024", f"{_MADE}: every position reads every position", partial(one_region, (1, 32, 32))),
    *(
        Canvas(
            length_name(frames, side),
            f"computer use, {frames * side * side:,}",
            f"Regions of computer_use.json scaled to ({frames}, {side}, {side}), CanvasTopology.causal_temporal",
            partial(computer_use, frames, side),
        )
        for frames, side in sorted(set(LENGTHS + BUILD_LENGTHS), key=lambda size: size[0] * size[1] ** 2)
    ),
]
CANVASES: dict[str, Canvas] = {canvas.name: canvas for canvas in _CANVASES}


@cache
def declared(name: str) -> Declared:
    """The declaration of a canvas, made once."""
    return CANVASES[name].declare()
