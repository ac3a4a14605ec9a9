"""What is measured: every case of the quick and of the full run, on a CPU or on a GPU."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from bench.canvases import CANVASES, DENSITIES, LENGTHS, length_name
from bench.peers.flex import FLEX
from bench.peers.jax_arrays import JAX_MASKED, OURS_JAX, SPLASH
from bench.peers.natten_window import NATTEN
from bench.peers.old_release import OLD
from bench.peers.ours import OURS_PORTABLE
from bench.peers.sdpa import MASKED, PER_GROUP
from bench.roofline import Phase
from canvas_engineering.plan.plan import Softmax

Level = Literal["attention", "dispatcher"]
Scale = Literal["quick", "full"]
Kind = Literal["cpu", "gpu"]
D_MODEL = 256
HEADS = 4
HEAD_DIM = D_MODEL // HEADS
#: What people use on such a device, and what the tables show first.
DTYPE: dict[Kind, str] = {"cpu": "float32", "gpu": "bfloat16"}


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
    head_dim: int = HEAD_DIM
    heads: int = HEADS
    batch: int = 1

    @property
    def id(self) -> str:
        sizes = [f"d{self.head_dim}", f"h{self.heads}", f"b{self.batch}"]
        return "-".join([self.level, self.scope, self.phase, self.dtype, *sizes, self.canvas])


SHIPPED = tuple(name for name, canvas in CANVASES.items() if canvas.shipped)
SPARSE = tuple(f"sparse_{round(100 * density):02d}" for density in DENSITIES)
MASKS = ("tiles", *SPARSE, "scattered_05", "video_small", "dense")
DENSE = ("computer_use_2048_dense", "computer_use_16384_dense")
ONCE = ("computer_use_2048_once", "computer_use_16384_once")
#: Compiling flex_attention takes seconds per canvas: the quick run does it for these.
_FLEX_QUICK = (*SHIPPED, "sparse_10", "video_small", "video")
#: A dense mask of 16,384 positions takes half a minute per training step on a small CPU.
_LARGE = ("computer_use_16384", "computer_use_16384_dense", "computer_use_16384_once")


def is_usual(row: dict[str, Any], kind: Kind) -> bool:
    """Whether the row of a case has the dtype and sizes that tables and pictures compare canvases in."""
    sizes = (row["dtype"], row["head_dim"], row["batch"]) == (DTYPE[kind], HEAD_DIM, 1)
    return sizes and (row["heads"] == HEADS or row["canvas"] == "video")


def cases(scale: Scale, kind: Kind = "cpu") -> list[Case]:
    """The cases of a run, those of one canvas and scope together."""
    found = list(dict.fromkeys(_gpu(scale) if kind == "gpu" else _cpu(scale)))
    place = {name: number for number, name in enumerate(CANVASES)}
    # Stable: problems of one canvas are made once and then used by all phases.
    return sorted(found, key=lambda case: (case.level, place[case.canvas], case.scope, case.dtype, case.head_dim))


# -- CPU ----------------------------------------------------------------------------------------------------


def _cpu(scale: Scale) -> Iterator[Case]:
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
        if full or canvas != "computer_use_16384":
            yield Case(canvas, "dispatcher", "connection", "step", (OLD,))
    for frames, side in LENGTHS:
        yield Case(length_name(frames, side), "attention", "joint", "forward", (MASKED,))
    # One head: four would take a small CPU half a minute per call.
    yield Case("video", "attention", "joint", "forward", (MASKED, FLEX, NATTEN), heads=1)
    yield from _cpu_variations(full)


def _phases(full: bool, canvas: str) -> Sequence[Phase]:
    if full:
        return ("forward", "backward", "step")
    return ("forward", "step") if canvas in SHIPPED else ("forward",)


def _joint_peers(canvas: str, phase: Phase, full: bool) -> tuple[str, ...]:
    peers = [] if canvas in _LARGE and phase == "step" and not full else [MASKED]
    if full or (phase == "forward" and canvas in _FLEX_QUICK) or (phase == "step" and canvas in SHIPPED):
        peers.append(FLEX)  # or says why it is absent
    if canvas.startswith("video"):
        peers.append(NATTEN)
    if full:
        peers += [OURS_JAX, JAX_MASKED]
    if canvas == "computer_use_2048":
        peers.append(SPLASH)
    return tuple(peers)


def _cpu_variations(full: bool) -> Iterator[Case]:
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


# -- GPU ----------------------------------------------------------------------------------------------------


def _gpu(scale: Scale) -> Iterator[Case]:
    """The same canvases in bfloat16, and those that fill a GPU: many heads, large head sizes, batches."""
    full = scale == "full"
    dtype = DTYPE["gpu"]
    phases: tuple[Phase, ...] = ("forward", "backward", "step") if full else ("forward", "step")
    joint, connection = (OURS_PORTABLE, MASKED, FLEX), (OURS_PORTABLE, PER_GROUP)
    for canvas in (*SHIPPED, *DENSE, *MASKS):
        for phase in phases:
            peers = (*joint, NATTEN) if canvas.startswith("video") else joint
            yield Case(canvas, "attention", "joint", phase, peers, dtype=dtype)
            if full or canvas not in MASKS:
                yield Case(canvas, "attention", "connection", phase, connection, dtype=dtype)
    for canvas in (*SHIPPED, *DENSE, *ONCE):
        for phase in ("forward", "step"):
            yield Case(canvas, "dispatcher", "connection", phase, (OLD,), dtype=dtype)
    for frames, side in LENGTHS:
        yield Case(length_name(frames, side), "attention", "joint", "forward", (MASKED, FLEX), dtype=dtype)
    # What fills the device: the FLOP/s that the kernels reach.
    for canvas in ("computer_use_16384", "computer_use_16384_dense"):
        for phase in phases:
            for head_dim in (64, 128):
                sizes = {"dtype": dtype, "head_dim": head_dim, "heads": 16}
                yield Case(canvas, "attention", "joint", phase, (FLEX,), **sizes)  # type: ignore[arg-type]
                yield Case(canvas, "attention", "connection", phase, (), **sizes)  # type: ignore[arg-type]
    for phase in ("forward", "step"):
        yield Case("video", "attention", "joint", phase, (FLEX, NATTEN), dtype=dtype, head_dim=128)
        yield Case("robot", "dispatcher", "connection", phase, (OLD,), dtype=dtype, batch=64)
    for other in ("float16", "float32"):
        yield Case("computer_use_2048", "attention", "joint", "step", joint, dtype=other)
        yield Case("computer_use_16384", "attention", "joint", "forward", (FLEX,), dtype=other)
