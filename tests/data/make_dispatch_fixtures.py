"""Write tests/data/dispatch_0_5_0.npz: what the dispatcher of canvas-engineering 0.5.0 computes.

Run with canvas-engineering 0.5.0 installed (not from this source tree):

    python tests/data/make_dispatch_fixtures.py tests/data/dispatch_0_5_0.npz

Weights and inputs are regenerated from NumPy's frozen legacy generator by `fill` and `inputs`, which
tests/test_dispatch_parity.py imports from here. Stored per case `<function>`,
in float32, which is finer than the comparison:

    <case>/y, <case>/dx     output and gradient of the input, (B, N, d)
    <case>/dp               gradient of every parameter in sorted order, contracted with a fixed random tensor
    <case>/error            largest error of 0.5.0's own float32 run, of y, dx and dp

The topology avoids what 0.5.0 got wrong: no two connections share (src, dst) and function. `random_fixed` is left
out: 0.5.0 drew its pattern anew for every shape, without a seed.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import torch

from canvas_engineering import AttentionDispatcher, CanvasLayout, CanvasTopology, Connection, RegionSpec, TemporalFill

D_MODEL, N_HEADS, BATCH = 16, 4, 2
FUNCTIONS = (
    "cross_attention",
    "self_attention",
    "cogvideox",
    "gated",
    "cosine_attention",
    "sigmoid_attention",
    "local_attention",
    "mixture",
    "sparse_attention",
    "linear_attention",
    "perceiver",
    "pooling",
    "copy",
    "none",
    "mamba",
    "rwkv",
    "hyena",
)


def layout() -> CanvasLayout:
    """Three regions that leave positions uncovered, one of them slow."""
    return CanvasLayout(
        T=4,
        H=5,
        W=4,
        d_model=D_MODEL,
        regions={
            "a": RegionSpec(bounds=(0, 4, 0, 3, 0, 3)),
            "b": RegionSpec(bounds=(0, 4, 3, 5, 0, 1)),
            "c": RegionSpec(bounds=(0, 2, 3, 5, 2, 4), period=2),
        },
    )


def topology(fn: str) -> CanvasTopology:
    """Every kind of offset and fill; the last connection keeps the default function."""
    return CanvasTopology(
        [
            Connection("a", "a", fn=fn, t_src=0, t_dst=0),
            Connection("a", "b", fn=fn, weight=2.0, t_src=0, t_dst=-1),
            Connection("b", "a", fn=fn),
            Connection("c", "c", fn=fn, weight=0.5),
            Connection("b", "c", fn=fn, t_src=0, t_dst=0, temporal_fill=TemporalFill.INTERPOLATE),
            Connection("c", "b", fn=fn, t_dst=0, temporal_fill=TemporalFill.DROP),
            Connection("c", "a", fn=fn, t_src=1),
            Connection("a", "c"),
        ]
    )


def fill(module: torch.nn.Module) -> None:
    """Set every parameter to numbers that depend on its place in sorted order only."""
    stream = np.random.RandomState(7)
    with torch.no_grad():
        for _, parameter in sorted(module.named_parameters()):
            parameter.copy_(torch.as_tensor(0.3 * stream.standard_normal(tuple(parameter.shape))))


def inputs(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """The canvas and the gradient of the output, `(BATCH, N, D_MODEL)`."""
    stream = np.random.RandomState(11)
    x, grad = stream.standard_normal((2, BATCH, layout().num_positions, D_MODEL))
    return torch.from_numpy(x).to(dtype), torch.from_numpy(grad).to(dtype)


def results(dispatcher: torch.nn.Module, dtype: torch.dtype) -> dict[str, np.ndarray]:
    """Output and gradients, as float64 arrays."""
    dispatcher = dispatcher.to(dtype)
    dispatcher.zero_grad()
    x, grad = inputs(dtype)
    x.requires_grad_()
    y = dispatcher(x)
    y.backward(grad)
    probes = []
    for _, parameter in sorted(dispatcher.named_parameters()):
        stream = np.random.RandomState(parameter.numel() % 2**31)
        probe = torch.as_tensor(stream.standard_normal(tuple(parameter.shape)))
        probes.append(0.0 if parameter.grad is None else float((parameter.grad.double() * probe).sum()))
    (dx,) = torch.autograd.grad(dispatcher(x), x, grad)
    return {"y": y.detach().double().numpy(), "dx": dx.double().numpy(), "dp": np.array(probes)}


def main(path: str) -> None:
    stored: dict[str, Any] = {}
    for fn in FUNCTIONS:
        dispatcher = AttentionDispatcher(topology(fn), layout(), D_MODEL, N_HEADS)
        fill(dispatcher)
        exact = results(dispatcher, torch.float64)
        rough = results(dispatcher, torch.float32)
        for name, value in exact.items():
            stored[f"{fn}/{name}"] = value.astype(np.float32)
        stored[f"{fn}/error"] = np.array([np.abs(rough[n] - exact[n]).max(initial=0.0) for n in ("y", "dx", "dp")])
    np.savez_compressed(path, **stored)


if __name__ == "__main__":
    main(sys.argv[1])
