"""A declaration that uses everything, with its torch dispatcher, for the tests of the JAX front end."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import numpy as np
import torch

from canvas_engineering import dispatch
from canvas_engineering.canvas import CanvasLayout, RegionSpec
from canvas_engineering.connectivity import CanvasTopology, Connection, TemporalFill
from canvas_engineering.cortex import CortexRegistry, CortexSpec
from canvas_engineering.identity import IdentitySpec
from canvas_engineering.jax import AttentionDispatcher
from canvas_engineering.masks import MaskSpec
from canvas_engineering.nn.residuals import ResidualAccumulator as TorchAccumulator
from canvas_engineering.program import CanvasProgram, ConnectionProgram, RegionProgram
from canvas_engineering.residuals import ResidualSpec
from canvas_engineering.schema import CanvasSchema

WIDTH = 8
#: The same program with less of XLA's optimisation: these tests spend their time in the compiler.
fast_jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

REGIONS: dict[str, tuple[int, ...] | RegionSpec] = {
    "a": RegionSpec((0, 3, 0, 3)),
    "b": RegionSpec((0, 3, 2, 5)),  # overlaps a
    "err": RegionSpec((0, 3, 5, 7), carrier="residual"),
    "slow": RegionSpec((0, 2, 7, 9), period=2),
    "mem.bank": RegionSpec((0, 3, 9, 11)),
}
LAYOUT = CanvasLayout(T=3, spatial_shape=(12,), d_model=WIDTH, regions=REGIONS)  # column 11 is uncovered
SPEC = ResidualSpec(kinds=("prediction", "surprise"), decay=0.5)


def everything() -> dict[str, Any]:
    """A declaration with all write modes, a trigger, a mask, slots, residuals, offsets and a cortex."""
    topology = CanvasTopology(
        [
            Connection("a", "a"),
            Connection("a", "b", weight=0.5, fn="gated"),
            Connection("b", "a", write_mode="gate"),
            Connection("b", "b", fn="local_attention"),
            Connection("b", "a", fn="random_fixed", weight=2.0),
            Connection("a", "err", fn="cosine_attention"),  # feeds the residuals of err
            Connection("b", "err"),  # likewise
            Connection("b", "slow", t_src=0, t_dst=-1, temporal_fill=TemporalFill.HOLD),
            Connection("slow", "a", fn="pooling"),
            Connection("slow", "b", fn="mixture"),
            Connection("err", "a", operator="write"),  # copy, replaces
            Connection("err", "b", fn="sigmoid_attention"),
            Connection("slow", "slow", fn="linear_attention", write_mode="gate"),
            Connection("mem.bank", "mem.bank", fn="cross_attention"),  # reads its own slots
            Connection("mem.bank", "a", fn="none"),
            Connection("slow", "mem.bank", fn="sparse_attention"),
        ]
    )
    program = CanvasProgram(
        schema=CanvasSchema(layout=LAYOUT),
        regions={
            "mem.bank": RegionProgram(
                identity=IdentitySpec(mode="tracklet", slot_capacity=3, birth_death=True),
            )
        },
        connections={
            ("a", "b"): ConnectionProgram(trigger="err.prediction > 0.25"),
            ("b", "b"): ConnectionProgram(mask_spec=MaskSpec(kind="tile", tile_shape=(2,))),
        },
    )
    registry = CortexRegistry()
    registry.register(CortexSpec("late", local_backend="mamba"))
    registry.assign("slow", "late")
    return {"topology": topology, "layout": LAYOUT, "d_model": WIDTH, "program": program, "cortex_registry": registry}


def randomized(module: dispatch.AttentionDispatcher, seed: int = 0) -> dispatch.AttentionDispatcher:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator))
    return module


def torch_everything(**changes: Any) -> dispatch.AttentionDispatcher:
    accumulator = TorchAccumulator(["err"], SPEC)
    return randomized(dispatch.AttentionDispatcher(**{**everything(), "residual_accumulator": accumulator, **changes}))


def canvas(seed: int = 0, batch: int = 2, layout: CanvasLayout = LAYOUT) -> np.ndarray[Any, Any]:
    shape = (batch, layout.num_positions, layout.d_model)
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


FIRES = {"err": {"prediction": 0.5, "surprise": 0.0}}


def small(**changes: Any) -> tuple[AttentionDispatcher, dict[str, Any]]:
    topology = CanvasTopology(
        [Connection("a", "b"), Connection("b", "a", weight=0.5), Connection("b", "b", write_mode="gate")]
    )
    d = AttentionDispatcher(**{"topology": topology, "layout": LAYOUT, "d_model": WIDTH, "n_heads": 2, **changes})
    return d, d.init(jax.random.key(0))
