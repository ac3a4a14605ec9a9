"""What the attention functions share: their static description, projections, head layout, dense softmax.

A function is an immutable description without arrays; ``init(key)`` makes its parameters and
``apply(params, queries, keys, values)`` is pure, shapes ``(B, N, d)``, ``(B, M, d)``, ``(B, M, d)`` to
``(B, N, d)``. Each batch element is computed on its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import Array, lax

from canvas_engineering.errors import CanvasError
from canvas_engineering.jax.params import Params, dropout, full_precision, init_linear, linear

#: Logits (or gathered key elements) that one step of a chunked function may hold at once.
CHUNK_ELEMENTS = 1 << 22


def check_positive(name: str, value: int) -> None:
    """Raise ``CanvasError`` unless ``value`` is at least 1."""
    if value < 1:
        raise CanvasError(f"{name} must be at least 1, got {name}={value}")


def split_heads(x: Array, n_heads: int) -> Array:
    """``(B, N, H * hd)`` to ``(B, H, N, hd)``."""
    return x.reshape(*x.shape[:-1], n_heads, x.shape[-1] // n_heads).swapaxes(1, 2)


def merge_heads(x: Array) -> Array:
    """``(B, H, N, hd)`` to ``(B, N, H * hd)``."""
    return x.swapaxes(1, 2).reshape(x.shape[0], x.shape[2], x.shape[1] * x.shape[3])


def attention_logits(q: Array, k: Array, scale: float) -> Array:
    """``q kᵀ scale``, ``(B, H, N, M)``, at least in float32."""
    return full_precision(q) @ full_precision(k).swapaxes(-1, -2) * scale


def masked_softmax(logits: Array, allowed: Array | None) -> Array:
    """Softmax over the last axis; rows without an allowed entry are 0, with gradient 0."""
    if allowed is None:
        return jax.nn.softmax(logits, axis=-1)
    logits = jnp.where(allowed, logits, -jnp.inf)
    largest = lax.stop_gradient(logits.max(-1, keepdims=True))
    exponential = jnp.exp(logits - jnp.where(jnp.isneginf(largest), 0, largest))
    total = exponential.sum(-1, keepdims=True)
    return exponential / jnp.where(total == 0, 1, total)


def softmax_attention(
    q: Array, k: Array, v: Array, *, scale: float, rate: float = 0.0, rng: Array | None = None
) -> Array:
    """``softmax(q kᵀ scale) v``: ``q (B, H, N, hd)``, ``k, v (B, H, M, hd)``; zeros without keys."""
    if k.shape[-2] == 0:
        return jnp.zeros_like(q)

    def rows(q: Array, rng: Array | None) -> Array:
        weights = dropout(rng, rate, masked_softmax(attention_logits(q, k, scale), None))
        return (weights @ full_precision(v)).astype(v.dtype)

    return map_query_chunks(rows, (q,), q.shape[0] * q.shape[1] * k.shape[-2], rng)


def map_query_chunks(
    fn: Callable[..., Array], by_row: tuple[Array, ...], row_elements: int, rng: Array | None = None
) -> Array:
    """``fn(*by_row, rng)``, computed over slices of the query axis where it would hold too much at once.

    Args:
        fn: gives ``(..., rows, hd)`` for ``by_row`` arrays cut to those rows, and a key for random numbers.
        by_row: arrays whose axis -2 is the query axis.
        row_elements: elements of the largest intermediate result per query row.
        rng: key for random numbers; every slice gets its own.

    Each slice is recomputed in the backward pass, so that memory stays bounded there too.
    """
    n_rows = by_row[0].shape[-2]
    rows = max(1, CHUNK_ELEMENTS // max(1, row_elements))
    if rows >= n_rows:
        return fn(*by_row, rng)
    count = -(-n_rows // rows)

    def pieces(x: Array) -> Array:
        fill = [(0, 0)] * x.ndim
        fill[-2] = (0, count * rows - n_rows)
        parts = jnp.pad(x, fill, mode="edge").reshape(*x.shape[:-2], count, rows, x.shape[-1])
        return jnp.moveaxis(parts, -3, 0)

    def step(piece: tuple[Array, ...]) -> Array:
        number, *operands = piece
        return fn(*operands, None if rng is None else jax.random.fold_in(rng, number))

    out = lax.map(jax.checkpoint(step), (jnp.arange(count), *map(pieces, by_row)))  # (count, ..., rows, hd)
    out = jnp.moveaxis(out, 0, -3)
    return out.reshape(*out.shape[:-3], count * rows, out.shape[-1])[..., :n_rows, :]


@dataclass(frozen=True)
class AttentionFunction:
    """Static description of an attention function.

    Args:
        d_model: width of queries, keys and values.
        n_heads: number of heads; functions without heads take it for a uniform signature only.
        dropout: probability with which an attention probability is dropped in training; functions without
            attention probabilities take it for a uniform signature only.

    Raises:
        CanvasError: ``d_model`` or ``n_heads`` below 1, ``dropout`` outside ``[0, 1)``.
    """

    d_model: int
    n_heads: int = 4
    dropout: float = 0.0

    #: Whether ``apply`` equals ``finish(kernel(heads_q, *heads_kv))``, so that it may run through a plan.
    planned: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_positive("d_model", self.d_model)
        check_positive("n_heads", self.n_heads)
        if not 0.0 <= self.dropout < 1.0:
            raise CanvasError(f"dropout must be in [0, 1), got dropout={self.dropout}")

    def init(self, key: Array, dtype: Any = jnp.float32) -> Params:
        """New parameters from a ``jax.random`` key."""
        return {}

    def apply(self, params: Params, queries: Array, keys: Array, values: Array, *, rng: Array | None = None) -> Array:
        """``queries (B, N, d)``, ``keys (B, M, d)``, ``values (B, M, d)`` to ``(B, N, d)``.

        Args:
            params: As ``init`` makes them.
            queries, keys, values: Floating-point arrays of one dtype.
            rng: A ``jax.random`` key turns dropout on.

        Raises:
            CanvasError: Shapes are not as above.
        """
        for name, x in (("queries", queries), ("keys", keys), ("values", values)):
            if x.ndim != 3 or x.shape[-1] != self.d_model:
                raise CanvasError(f"{name} must have shape (B, N, {self.d_model}), got {tuple(x.shape)}")
        if keys.shape != values.shape or keys.shape[0] != queries.shape[0]:
            raise CanvasError(
                "queries, keys and values must agree in batch, keys and values in length, got "
                f"queries {tuple(queries.shape)}, keys {tuple(keys.shape)}, values {tuple(values.shape)}"
            )
        return self._attend(params, queries, keys, values, rng)

    def _attend(self, params: Params, queries: Array, keys: Array, values: Array, rng: Array | None) -> Array:
        raise NotImplementedError(f"{type(self).__name__} must define _attend")


@dataclass(frozen=True)
class ProjectedAttention(AttentionFunction):
    """Attention with the projections ``q_proj``, ``k_proj``, ``v_proj``, ``out_proj`` over heads.

    The computation is split so that a caller may project a whole canvas once and run any kernel between.

    Raises:
        CanvasError: as ``AttentionFunction``, and when ``n_heads`` does not divide ``d_model``.
    """

    activation: ClassVar[str] = "softmax"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.d_model % self.n_heads:
            raise CanvasError(
                f"d_model must be divisible by n_heads, got d_model={self.d_model}, n_heads={self.n_heads}"
            )

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return self.d_model // self.n_heads

    @property
    def kernel_scale(self) -> float:
        """The factor on the logits inside the kernel."""
        return float(self.head_dim**-0.5)

    def init(self, key: Array, dtype: Any = jnp.float32) -> Params:
        """The four projections."""
        names = ("q_proj", "k_proj", "v_proj", "out_proj")
        keys = jax.random.split(key, 4)
        return {name: init_linear(k, self.d_model, self.d_model, dtype) for name, k in zip(names, keys, strict=True)}

    def projections(self, params: Params) -> Params:
        """Where in the parameters the four projections stand."""
        return params

    def heads_q(self, params: Params, x: Array) -> Array:
        """``x (B, N, d)`` to the kernel's queries ``(B, H, N, hd)``."""
        return split_heads(linear(self.projections(params)["q_proj"], x), self.n_heads)

    def heads_kv(self, params: Params, x: Array, values: Array | None = None) -> tuple[Array, Array]:
        """``x (B, M, d)`` to the kernel's keys and values, each ``(B, H, M, hd)``; ``values`` if from elsewhere."""
        mine = self.projections(params)
        k, v = linear(mine["k_proj"], x), linear(mine["v_proj"], x if values is None else values)
        return split_heads(k, self.n_heads), split_heads(v, self.n_heads)

    def out_projection(self, params: Params) -> Params:
        """Weight and bias of the output projection."""
        out: Params = self.projections(params)["out_proj"]
        return out

    def output_factor(self, params: Params) -> Array | None:
        """What the projected output is multiplied by; None for nothing."""
        return None

    def finish(self, params: Params, out: Array) -> Array:
        """The kernel's result ``(B, H, N, hd)`` to the function's output ``(B, N, d)``."""
        projected = linear(self.out_projection(params), merge_heads(out))
        factor = self.output_factor(params)
        return projected if factor is None else factor * projected

    def kernel(self, q: Array, k: Array, v: Array, rng: Array | None) -> Array:
        """``q (B, H, N, hd)``, ``k``, ``v (B, H, M, hd)`` to ``(B, H, N, hd)``."""
        return softmax_attention(q, k, v, scale=self.kernel_scale, rate=self.dropout, rng=rng)

    def _attend(self, params: Params, queries: Array, keys: Array, values: Array, rng: Array | None) -> Array:
        k, v = self.heads_kv(params, keys, values)
        return self.finish(params, self.kernel(self.heads_q(params, queries), k, v, rng))
