"""Write tests/data/attention_0_5_0.npz: what the attention functions of canvas-engineering 0.5.0 compute.

Run with canvas-engineering 0.5.0 installed (not from this source tree):

    python tests/data/make_attention_fixtures.py tests/data/attention_0_5_0.npz

Weights and inputs are not stored: `fill` and `inputs` below regenerate them from NumPy's frozen legacy generator, and
tests/test_attention_parity.py imports them from here. Stored per case `<function>/<N>x<M>`, a flat float64 array:

    <case>          the numbers of `results` one after the other: output, gradients of queries, keys and values, and of
                    every parameter in sorted order (each contracted with PROBES fixed random tensors), in float64
    <case>/error    for each of these pieces, the largest error of 0.5.0's own float32 run

`random_fixed` is left out: 0.5.0 drew its pattern anew for every shape, without a seed.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import torch

D_MODEL, N_HEADS, BATCH = 16, 4, 2
#: (number of queries, number of keys)
SHAPES = ((5, 7), (6, 6), (7, 4))
#: Random tensors that each parameter's gradient is contracted with.
PROBES = 2
#: Function name to constructor arguments, chosen so that windows and top-k leave something out.
FUNCTIONS: dict[str, dict[str, int]] = {
    "cross_attention": {},
    "linear_attention": {},
    "cosine_attention": {},
    "sigmoid_attention": {},
    "gated": {},
    "perceiver": {},
    "pooling": {},
    "copy": {},
    "sparse_attention": {"top_k": 3},
    "local_attention": {"window_size": 3},
    "mixture": {},
    "mamba": {},
    "rwkv": {},
    "hyena": {},
    "none": {},
}


def fill(module: torch.nn.Module, seed: int) -> None:
    """Set every parameter to numbers that depend on its name's place in sorted order and on `seed` only."""
    stream = np.random.RandomState(seed)
    with torch.no_grad():
        for _, parameter in sorted(module.named_parameters()):
            parameter.copy_(torch.as_tensor(0.3 * stream.standard_normal(tuple(parameter.shape))))


def inputs(n_queries: int, n_keys: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """queries, keys, values and the gradient of the output, `(BATCH, ..., D_MODEL)`."""
    stream = np.random.RandomState(1000 * n_queries + n_keys)
    arrays = [stream.standard_normal((BATCH, n, D_MODEL)) for n in (n_queries, n_keys, n_keys, n_queries)]
    return [torch.from_numpy(a).to(dtype) for a in arrays]


def probe(gradient: torch.Tensor) -> torch.Tensor:
    """The gradient of a parameter contracted with fixed random tensors, `(PROBES,)`: wrong in any place, wrong here."""
    stream = np.random.RandomState(gradient.numel() % 2**31)
    tensors = [torch.as_tensor(stream.standard_normal(tuple(gradient.shape))).to(gradient) for _ in range(PROBES)]
    return torch.stack([(gradient * tensor).sum() for tensor in tensors])


def results(module: torch.nn.Module, n_queries: int, n_keys: int, dtype: torch.dtype) -> dict[str, Any]:
    """Output and gradients of one module, as float64 arrays."""
    module = module.to(dtype)
    module.zero_grad()
    queries, keys, values, d_out = inputs(n_queries, n_keys, dtype)
    leaves = [x.requires_grad_() for x in (queries, keys, values)]
    out = module(*leaves)
    if out.requires_grad:
        out.backward(d_out)
    found = {"out": out}
    for name, leaf in zip(("d_queries", "d_keys", "d_values"), leaves, strict=True):
        found[name] = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
    for name, parameter in sorted(module.named_parameters()):
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        found["d_" + name] = probe(gradient)
    return {name: tensor.detach().double().numpy() for name, tensor in found.items()}


def main(path: str) -> None:
    """Compute every case and write the file."""
    from canvas_engineering.attention import create_attention

    stored: dict[str, Any] = {}
    for seed, (name, arguments) in enumerate(FUNCTIONS.items()):
        for n_queries, n_keys in SHAPES:
            module = create_attention(name, D_MODEL, N_HEADS, **arguments).double()
            fill(module, seed)
            exact = results(module, n_queries, n_keys, torch.float64)
            single = results(module, n_queries, n_keys, torch.float32)
            case = f"{name}/{n_queries}x{n_keys}"
            stored[case] = np.concatenate([piece.ravel() for piece in exact.values()])
            stored[case + "/error"] = np.array([np.abs(single[k] - exact[k]).max() for k in exact])
    np.savez_compressed(path, **stored)


if __name__ == "__main__":
    main(sys.argv[1])
