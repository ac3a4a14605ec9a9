"""The same attention on JAX arrays: this package under ``jit``, and JAX's own attention with a dense mask."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from bench.pairs import Pairs
from bench.roofline import Phase
from bench.variant import Absent, Arrays, Variant
from canvas_engineering.attention.api import block_sparse_attention
from canvas_engineering.plan import BlockSparsePlan

OURS_JAX = "canvas-engineering, JAX"
JAX_MASKED = "masked jax.nn attention"
SPLASH = "JAX Splash"


class JaxVariant(Variant):
    """A differentiable function of q, k and v ``(B, H, N, D)`` under ``jit``."""

    def __init__(
        self, name: str, call: Callable[..., Any], leaves: dict[str, Tensor], grad_out: Tensor, phase: Phase
    ) -> None:
        import jax
        import jax.numpy as jnp

        if phase == "backward":
            raise Absent("under jit the backward pass has no time of its own; see the training step")
        if leaves["q"].device.type != "cpu":
            raise Absent("compared on the CPU only")
        dtype = str(leaves["q"].dtype).removeprefix("torch.")
        self.name = name
        self._phase = phase
        self._leaves = [jnp.asarray(leaf.detach().float().numpy(), dtype) for leaf in leaves.values()]
        self._grad_out = jnp.asarray(grad_out.float().numpy(), dtype)
        self._forward = jax.jit(call)

        def step(q: Any, k: Any, v: Any, grad: Any) -> Any:
            out, pull = jax.vjp(call, q, k, v)
            return out, pull(grad)

        self._step = jax.jit(step)
        start = time.perf_counter()
        self.sample()
        self.setup = {"compile": time.perf_counter() - start}

    def timed(self, prepared: Any) -> None:
        import jax

        if self._phase == "forward":
            jax.block_until_ready(self._forward(*self._leaves))
        else:
            jax.block_until_ready(self._step(*self._leaves, self._grad_out))

    def outputs(self, cotangent: NDArray[Any] | None) -> Arrays:
        if self._phase == "forward" or cotangent is None:
            return {"out": np.asarray(self._forward(*self._leaves), np.float64)}
        out, grads = self._step(*self._leaves, cotangent.astype(self._grad_out.dtype))
        named = zip(("dq", "dk", "dv"), grads, strict=True)
        return {"out": np.asarray(out, np.float64)} | {name: np.asarray(grad, np.float64) for name, grad in named}


def _require() -> None:
    if importlib.util.find_spec("jax") is None:
        raise Absent("jax is not installed")


def ours(plan: BlockSparsePlan, leaves: dict[str, Tensor], grad_out: Tensor, phase: Phase) -> JaxVariant:
    """``block_sparse_attention`` on JAX arrays."""
    _require()
    return JaxVariant(OURS_JAX, lambda q, k, v: block_sparse_attention(q, k, v, plan), leaves, grad_out, phase)


def masked(pairs: Pairs, leaves: dict[str, Tensor], grad_out: Tensor, phase: Phase) -> JaxVariant:
    """``jax.nn.dot_product_attention`` with a boolean mask ``(N, N)``; joint softmax."""
    _require()
    import jax
    import jax.numpy as jnp

    if pairs.num_tokens > 8192:
        raise Absent("it makes all scores at once")
    mask = jnp.asarray(pairs.dense())
    # A row without keys is NaN there, so it reads itself and is set to 0.
    has_key = mask.any(axis=1)
    mask = mask | (jnp.eye(mask.shape[0], dtype=bool) & ~has_key[:, None])

    def call(q: Any, k: Any, v: Any) -> Any:
        # Heads stand last but one there: (B, N, H, D).
        q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
        out = jax.nn.dot_product_attention(q, k, v, mask=mask[None, None]).swapaxes(1, 2)
        return jnp.where(has_key[:, None], out, 0)

    return JaxVariant(JAX_MASKED, call, leaves, grad_out, phase)


def splash() -> JaxVariant:
    """Never runs here."""
    raise Absent("needs a TPU; its static cost stands beside ours in the table of bench/pallas_static.py")
