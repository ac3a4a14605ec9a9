"""Functions that run a recurrence over the keys, by associative scan: Mamba's selective scan, RWKV's decayed sums."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from canvas_engineering.errors import CanvasError
from canvas_engineering.jax.base import AttentionFunction, check_positive, softmax_attention
from canvas_engineering.jax.params import Params, full_precision, init_linear, init_norm, layer_norm, linear

#: State elements (batch * steps * channels * state) that one segment of a selective scan may hold.
SEGMENT_ELEMENTS = 1 << 20


def linear_scan(a: Array, b: Array) -> Array:
    """``h[:, t] = a[:, t] h[:, t-1] + b[:, t]`` from ``h[:, -1] = 0``, in a logarithmic number of steps.

    Args:
        a, b: factors and inputs, both (B, M, ...).

    Returns:
        All states, like ``b``. No division and no exponential of a sum, so long sequences lose no range (Blelloch,
        CMU-CS-90-190). The backward pass is a scan in the other direction; forward mode is not supported.
    """
    return _scan(a, b)


@jax.custom_vjp
def _scan(a: Array, b: Array) -> Array:
    return _scan_without_gradient(a, b, reverse=False)


def _scan_without_gradient(a: Array, b: Array, reverse: bool) -> Array:
    def combine(before: tuple[Array, Array], after: tuple[Array, Array]) -> tuple[Array, Array]:
        return before[0] * after[0], after[0] * before[1] + after[1]

    _, h = lax.associative_scan(combine, (a, b), reverse=reverse, axis=1)
    return h


def _scan_forward(a: Array, b: Array) -> tuple[Array, tuple[Array, Array]]:
    h = _scan_without_gradient(a, b, reverse=False)
    return h, (a, h)


def _scan_backward(saved: tuple[Array, Array], grad: Array) -> tuple[Array, Array]:
    a, h = saved
    # grad_b[t] = grad[t] + a[t+1] grad_b[t+1]; nothing comes after the last step.
    a_next = jnp.concatenate([a[:, 1:], jnp.zeros_like(a[:, :1])], axis=1)
    grad_b = _scan_without_gradient(a_next, grad, reverse=True)
    h_before = jnp.concatenate([jnp.zeros_like(h[:, :1]), h[:, :-1]], axis=1)
    return grad_b * h_before, grad_b


_scan.defvjp(_scan_forward, _scan_backward)


def selective_scan(x: Array, dt: Array, a: Array, b: Array, c: Array) -> Array:
    """``h[t] = exp(a dt[t]) h[t-1] + dt[t] b[t] x[t]``, ``y[t] = c[t] · h[t]`` (Mamba, arXiv:2312.00752, section 3).

    Args:
        x, dt: inputs and step sizes, (B, M, d).
        a: decay rates, (d, s), negative.
        b, c: input and output maps, (B, M, s).

    Returns:
        y, (B, M, d). Time is cut into segments that are recomputed in the backward pass, so memory is
        O(B M d) plus a few times one segment's states.
    """
    batch, n_steps, d = x.shape
    length = max(1, SEGMENT_ELEMENTS // max(1, batch * d * a.shape[1]))

    def segment(state: Array, piece: tuple[Array, Array, Array, Array]) -> tuple[Array, Array]:
        """From ``state (B, d, s)``: the last state, and y ``(B, m, d)``."""
        x, dt, b, c = piece
        inputs = (dt * x)[..., None] * b[:, :, None]  # (B, m, d, s)
        decay = jnp.exp(dt[..., None] * a)
        inputs = inputs.at[:, 0].add(decay[:, 0] * state)
        h = linear_scan(decay, inputs)
        return h[:, -1], jnp.einsum("bmds,bms->bmd", h, c)

    state = jnp.zeros((batch, d, a.shape[1]), x.dtype)
    if n_steps <= length:
        return segment(state, (x, dt, b, c))[1] if n_steps else jnp.zeros_like(x)
    count = -(-n_steps // length)

    def pieces(t: Array) -> Array:
        """Steps that fill the last segment are 0: they keep the state, and their y is cut off."""
        filled = jnp.pad(t, ((0, 0), (0, count * length - n_steps), (0, 0)))
        return filled.reshape(batch, count, length, t.shape[2]).swapaxes(0, 1)

    _, y = lax.scan(jax.checkpoint(segment), state, (pieces(x), pieces(dt), pieces(b), pieces(c)))
    return y.swapaxes(0, 1).reshape(batch, count * length, d)[:, :n_steps]


@dataclass(frozen=True)
class MambaAttention(AttentionFunction):
    """A selective state-space model runs over the values; the queries read its outputs by softmax attention.

    ``y = (scan(x) + D x) silu(z)``, then ``out_proj(softmax(norm(queries) yᵀ / sqrt(d)) y)``, one head
    (Gu and Dao, arXiv:2312.00752). ``keys`` are not used. Scans in float32 when the input is half precision.

    Parameters: ``in_proj`` Linear(d, 2d), ``x_proj`` Linear(d, r + 2 s), ``dt_proj`` Linear(r, d), ``D`` (d),
    ``norm`` LayerNorm(d), ``out_proj``, and ``A_log`` (d, s) = log(1..s), which is a constant: its gradient
    is 0. ``s = state_size``, ``r = dt_rank``, ``max(1, d // 16)`` when 0.

    Raises:
        CanvasError: ``state_size`` below 1 or ``dt_rank`` below 0.
    """

    state_size: int = 16
    dt_rank: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("state_size", self.state_size)
        if self.dt_rank < 0:
            raise CanvasError(f"dt_rank must be at least 0, got dt_rank={self.dt_rank}")

    @property
    def rank(self) -> int:
        """``dt_rank``, or what stands for 0."""
        return self.dt_rank or max(1, self.d_model // 16)

    def init(self, key: Array, dtype: Any = jnp.float32) -> Params:
        """All of the above."""
        d, s = self.d_model, self.state_size
        key_in, key_dt, key_x, key_out = jax.random.split(key, 4)
        rates = jnp.log(jnp.arange(1, s + 1, dtype=jnp.float32)).astype(dtype)
        return {
            "in_proj": init_linear(key_in, d, 2 * d, dtype),
            "dt_proj": init_linear(key_dt, self.rank, d, dtype),
            "x_proj": init_linear(key_x, d, self.rank + 2 * s, dtype),
            "A_log": jnp.tile(rates, (d, 1)),
            "D": jnp.ones(d, dtype),
            "out_proj": init_linear(key_out, d, d, dtype),
            "norm": init_norm(d, dtype),
        }

    def _attend(self, params: Params, queries: Array, keys: Array, values: Array, rng: Array | None) -> Array:
        x, z = jnp.split(linear(params["in_proj"], values), 2, axis=-1)  # (B, M, d) each
        step, b, c = jnp.split(linear(params["x_proj"], x), [self.rank, self.rank + self.state_size], axis=-1)
        dt = jax.nn.softplus(full_precision(linear(params["dt_proj"], step)))
        x, z, b, c = (full_precision(t) for t in (x, z, b, c))
        rates = -jnp.exp(full_precision(lax.stop_gradient(params["A_log"])))
        y = (selective_scan(x, dt, rates, b, c) + full_precision(params["D"]) * x) * jax.nn.silu(z)
        read = layer_norm(params["norm"], queries)
        y = y.astype(read.dtype)[:, None]  # one head: (B, 1, M, d)
        scale = float(self.d_model**-0.5)
        out = softmax_attention(read[:, None], y, y, scale=scale, rate=self.dropout, rng=rng)
        return linear(params["out_proj"], out[:, 0].astype(values.dtype))


@dataclass(frozen=True)
class RWKVAttention(AttentionFunction):
    """Exponentially decayed sums over the past keys and values, gated by the queries (RWKV, arXiv:2305.13048).

    With ``w = exp(-exp(decay))`` and ``e = exp(clamp(k, -10, 10))``, step ``t`` reads
    ``(Σ_{s<t} w^(t-1-s) e_s v_s + exp(bonus) e_t v_t) / (Σ_{s<t} w^(t-1-s) e_s + exp(bonus) e_t + 1e-6)``.
    Row ``i`` of the queries reads step ``min(i, M-1)``, times ``sigmoid(r)``; so only the first ``N`` keys
    count. Scans in float32 when the input is half precision; ``dropout`` is unused.

    Parameters: ``r_proj``, ``k_proj``, ``v_proj``, ``out_proj``; ``decay`` and ``bonus`` (H, hd).

    Raises:
        CanvasError: ``n_heads`` does not divide ``d_model``.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.d_model % self.n_heads:
            raise CanvasError(
                f"d_model must be divisible by n_heads, got d_model={self.d_model}, n_heads={self.n_heads}"
            )

    def init(self, key: Array, dtype: Any = jnp.float32) -> Params:
        """All of the above."""
        d, heads = self.d_model, (self.n_heads, self.d_model // self.n_heads)
        key_decay, *keys = jax.random.split(key, 5)
        names = ("r_proj", "k_proj", "v_proj", "out_proj")
        return {
            **{name: init_linear(k, d, d, dtype) for name, k in zip(names, keys, strict=True)},
            "decay": jax.random.normal(key_decay, heads, dtype) * 0.01 - 5.0,
            "bonus": jnp.zeros(heads, dtype),
        }

    def _attend(self, params: Params, queries: Array, keys: Array, values: Array, rng: Array | None) -> Array:
        n_queries = queries.shape[1]
        r = jax.nn.sigmoid(linear(params["r_proj"], queries))
        k = full_precision(linear(params["k_proj"], keys[:, :n_queries]))
        v = full_precision(linear(params["v_proj"], values[:, :n_queries]))
        n_steps = k.shape[1]
        if n_steps == 0:
            return linear(params["out_proj"], jnp.zeros_like(r))
        # Heads lie side by side in the width, so (H, hd) parameters flatten to (d,).
        strength = jnp.exp(jnp.clip(k, -10.0, 10.0))
        factor = jnp.exp(-jnp.exp(full_precision(params["decay"]))).ravel()
        inputs = jnp.concatenate([strength * v, strength], axis=-1)  # (B, M, 2 d)
        sums = linear_scan(jnp.broadcast_to(jnp.tile(factor, 2), inputs.shape), inputs)
        past = jnp.pad(sums[:, :-1], ((0, 0), (1, 0), (0, 0)))  # what lies before each step
        past_values, past_strength = jnp.split(past, 2, axis=-1)
        now = jnp.exp(full_precision(params["bonus"])).ravel() * strength
        wkv = (past_values + now * v) / (past_strength + now + 1e-6)
        wkv = jnp.pad(wkv, ((0, 0), (0, n_queries - n_steps), (0, 0)), mode="edge")
        return linear(params["out_proj"], r * wkv.astype(r.dtype))
