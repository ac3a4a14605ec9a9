"""Parameter trees: nested dictionaries whose paths are the torch ``state_dict`` keys, split at the dots.

A linear layer is ``{"weight": (out, in), "bias": (out,)}``, in torch's layout, so that a checkpoint of either
framework is a checkpoint of the other. Initial values follow torch's defaults.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from canvas_engineering.errors import CanvasError

#: A nested dictionary of arrays.
Params = dict[str, Any]


def init_linear(key: Array, d_in: int, d_out: int, dtype: Any) -> Params:
    """Weight and bias, uniform in ``±1 / sqrt(d_in)`` as ``torch.nn.Linear`` starts (He et al., arXiv:1502.01852)."""
    bound = 1 / math.sqrt(d_in) if d_in else 0.0
    key_weight, key_bias = jax.random.split(key)
    return {
        "weight": jax.random.uniform(key_weight, (d_out, d_in), dtype, -bound, bound),
        "bias": jax.random.uniform(key_bias, (d_out,), dtype, -bound, bound),
    }


def init_norm(width: int, dtype: Any) -> Params:
    """Weight 1 and bias 0 of a layer normalisation."""
    return {"weight": jnp.ones(width, dtype), "bias": jnp.zeros(width, dtype)}


def linear(params: Params, x: Array) -> Array:
    """``x (..., in)`` to ``(..., out)``."""
    return x @ params["weight"].T + params["bias"]


def layer_norm(params: Params, x: Array) -> Array:
    """Normalise the last axis (variance + 1e-5); half precision is normalised in float32."""
    wide = full_precision(x)
    centred = wide - wide.mean(-1, keepdims=True)
    variance = jnp.square(centred).mean(-1, keepdims=True)
    return (centred * jax.lax.rsqrt(variance + 1e-5)).astype(x.dtype) * params["weight"] + params["bias"]


def full_precision(x: Array) -> Array:
    """``x`` in float32 when it is of half precision, else ``x`` itself: long sums need the mantissa."""
    return x.astype(jnp.float32) if x.dtype in (jnp.float16, jnp.bfloat16) else x


def dropout(rng: Array | None, rate: float, probabilities: Array) -> Array:
    """Drop entries with probability ``rate`` and scale up the rest; without ``rng`` nothing is dropped."""
    if rng is None or rate == 0:
        return probabilities
    keep = jax.random.bernoulli(rng, 1 - rate, probabilities.shape)
    return jnp.where(keep, probabilities / (1 - rate), 0)


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted path, leaf) of a nested mapping, in its order."""
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def check_tree(params: Any, expected: Mapping[str, Any]) -> None:
    """Raise unless ``params`` has the paths and shapes of ``expected``, and one floating-point dtype.

    Raises:
        CanvasError: The message names the first path that differs.
    """
    if not isinstance(params, Mapping):
        raise CanvasError(f"params must be the nested dictionary that init returns, got {type(params).__name__}")
    found, wanted = dict(flatten(params)), dict(flatten(expected))
    missing, unknown = [p for p in wanted if p not in found], [p for p in found if p not in wanted]
    if missing or unknown:
        kind, path = ("lack", missing[0]) if missing else ("have the unknown", unknown[0])
        raise CanvasError(f"params must have the {len(wanted)} entries of this dispatcher, but {kind} {path!r}")
    dtypes: dict[str, str] = {}
    for path, leaf in found.items():
        if tuple(leaf.shape) != tuple(wanted[path].shape):
            raise CanvasError(
                f"params entry {path!r} must have shape {tuple(wanted[path].shape)}, got {tuple(leaf.shape)}"
            )
        dtypes.setdefault(str(leaf.dtype), path)
    if len(dtypes) > 1:
        raise CanvasError(
            "params must have one dtype, got " + ", ".join(f"{dtype} ({path!r})" for dtype, path in dtypes.items())
        )
