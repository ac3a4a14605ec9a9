"""What is measured: every case of the quick and of the full run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from bench.canvases import CANVASES, DENSITIES, LENGTHS, length_name
from bench.peers.flex import FLEX
from bench.peers.jax_arrays import JAX_MASKED, OURS_JAX, SPLASH
from bench.peers.natten_window import NATTEN
from bench.peers.old_release import OLD
from bench.peers.sdpa import MASKED, PER_GROUP
from bench.roofline import Phase
from canvas_engineering.plan.plan import Softmax

Level = Literal["attention", "dispatcher"]
Scale = Literal["quick", "full"]
D_MODEL = 256
HEADS = 4


@dataclass(frozen=True)
class Case:
    """One row of a table.

    Attributes:
        canvas: Name in ``CANVASES``.
        level: ``block_sparse_attention`` alone, or the whole ``AttentionDispatcher`` with its projections.
        scope: Softmax scope of the plan.
        phase: What is timed.
        peers: Who else runs it.
    """

    canvas: str
    level: Level
    scope: Softmax
    phase: Phase
    peers: tuple[str, ...]
    dtype: str = "float32"
    head_dim: int = D_MODEL // HEADS
    heads: int = HEADS
    batch: int = 1

    @property
    def id(self) -> str:
        parts = [self.level, self.scope, self.phase, self.dtype, f"d{self.head_dim}", f"b{self.batch}", self.canvas]
        return "-".join(parts)


SHIPPED = tuple(name for name, canvas in CANVASES.items() if canvas.shipped)
SPARSE = tuple(f"sparse_{round(100 * density):02d}" for density in DENSITIES)
MASKS = ("tiles", *SPARSE, "scattered_05", "video_small", "dense")
DENSE = ("computer_use_2048_dense", "computer_use_16384_dense")
ONCE = ("computer_use_2048_once", "computer_use_16384_once")
#: Compiling flex_attention takes seconds per canvas: the quick run does it for these.
_FLEX_QUICK = (*SHIPPED, "sparse_10", "video_small")
#: A masked training step of 16,384 positions takes half a minute; so does 0.5.0's.
_LARGE = ("computer_use_16384", "computer_use_16384_dense", "computer_use_16384_once")


def cases(scale: Scale) -> list[Case]:
    """The cases of a run, those of one canvas and scope together."""
    found = list(dict.fromkeys(_all(scale)))
    place = {name: number for number, name in enumerate(CANVASES)}
    # Stable: problems of one canvas are made once and then used by all phases.
    return sorted(found, key=lambda case: (case.level, place[case.canvas], case.scope, case.dtype, case.head_dim))


def _all(scale: Scale) -> Iterator[Case]:
    full = scale == "full"
    for canvas in (*SHIPPED, *DENSE, *MASKS):
        yield Case(canvas, "attention", "joint", "forward", _joint_peers(canvas, "forward", full))
        if full or canvas not in DENSE:
            yield Case(canvas, "attention", "joint", "step", _joint_peers(canvas, "step", full))
    for canvas in (*SHIPPED, *DENSE, *(MASKS if full else ())):
        peers = (PER_GROUP, OURS_JAX) if full else (PER_GROUP,)
        for phase in _phases(full, canvas):
            yield Case(canvas, "attention", "connection", phase, peers)
    for canvas in (*SHIPPED, *DENSE, *(ONCE if full else ONCE[:1])):
        yield Case(canvas, "dispatcher", "connection", "forward", (OLD,))
        if full or canvas not in _LARGE:
            yield Case(canvas, "dispatcher", "connection", "step", (OLD,))
    for frames, side in LENGTHS:
        yield Case(length_name(frames, side), "attention", "joint", "forward", (MASKED,))
    yield from _variations(full)


def _phases(full: bool, canvas: str) -> Sequence[Phase]:
    if full:
        return ("forward", "backward", "step")
    return ("forward", "step") if canvas in SHIPPED else ("forward",)


def _joint_peers(canvas: str, phase: Phase, full: bool) -> tuple[str, ...]:
    peers = [] if canvas in _LARGE and phase == "step" and not full else [MASKED]
    if phase == "forward" and (full or canvas in _FLEX_QUICK):
        peers.append(FLEX)
    if canvas.startswith("video"):
        peers.append(NATTEN)
    if full:
        peers += [OURS_JAX, JAX_MASKED]
        if phase == "step":
            peers.append(FLEX)  # says why it is absent
        if canvas == "computer_use_2048":
            peers.append(SPLASH)
    return tuple(peers)


def _variations(full: bool) -> Iterator[Case]:
    """Other dtypes, head sizes and batches."""
    canvas = "computer_use_2048"
    for dtype in ("bfloat16", "float16"):
        yield Case(canvas, "attention", "joint", "forward", (MASKED,), dtype=dtype)
        if full:
            yield Case(canvas, "attention", "connection", "step", (PER_GROUP,), dtype=dtype)
    for head_dim in (32, 128):
        yield Case(canvas, "attention", "joint", "forward", (MASKED,), head_dim=head_dim)
        if full:
            yield Case(canvas, "attention", "connection", "step", (PER_GROUP,), head_dim=head_dim)
    yield Case("robot", "dispatcher", "connection", "step", (OLD,), batch=16)
    if full:
        yield Case(canvas, "dispatcher", "connection", "step", (OLD,), batch=8)
        yield Case(canvas, "attention", "connection", "step", (PER_GROUP,), batch=8)
        yield Case("video", "attention", "joint", "forward", (NATTEN,))
