"""Long convolutions with gates that depend on the data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from canvas_engineering.errors import CanvasError
from canvas_engineering.jax.base import AttentionFunction, check_positive
from canvas_engineering.jax.params import Params, full_precision, init_linear, linear


@dataclass(frozen=True)
class HyenaAttention(AttentionFunction):
    """Gated circular convolutions of the values, filters given by frequency (see Hyena, arXiv:2302.10866).

    The values are brought to N rows by adaptive average pooling where ``M != N``, projected to ``order + 1``
    streams, and the first stream is gated by the others in turn, each time followed by a convolution of
    the next power of two (at least 2) in length. ``keys`` are not used. Convolves in float32 when the input
    is half precision; ``dropout`` is unused.

    Parameters: ``in_proj`` Linear(d, (order + 1) d), ``out_proj``, ``filter_params.{i}``
    (d, max_len // 2 + 1, 2), ``gates.{i}`` Linear(d, d).

    Raises:
        CanvasError: ``order`` below 1, ``max_len`` below 2; in ``apply``, too many queries for the filters.
    """

    order: int = 2
    max_len: int = 4096

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("order", self.order)
        if self.max_len < 2:
            raise CanvasError(f"max_len must be at least 2, got max_len={self.max_len}")

    def init(self, key: Array, dtype: Any = jnp.float32) -> Params:
        """All of the above."""
        d = self.d_model
        key_in, key_out, key_filters, key_gates = jax.random.split(key, 4)
        filters = jax.random.split(key_filters, self.order)
        gates = jax.random.split(key_gates, self.order)
        shape = (d, self.max_len // 2 + 1, 2)
        return {
            "in_proj": init_linear(key_in, d, d * (self.order + 1), dtype),
            "out_proj": init_linear(key_out, d, d, dtype),
            "filter_params": {str(i): jax.random.normal(k, shape, dtype) * 0.02 for i, k in enumerate(filters)},
            "gates": {str(i): init_linear(k, d, d, dtype) for i, k in enumerate(gates)},
        }

    def _attend(self, params: Params, queries: Array, keys: Array, values: Array, rng: Array | None) -> Array:
        n_queries, n_keys = queries.shape[1], values.shape[1]
        length = 1 << max(1, (n_queries - 1).bit_length())
        if length // 2 > self.max_len // 2:
            raise CanvasError(
                f"hyena convolves over the next power of two of the number of queries, which must be at most "
                f"max_len={self.max_len}, got {n_queries} queries (length {length})"
            )
        if queries.size == 0 or n_keys == 0:
            return linear(params["out_proj"], jnp.zeros_like(queries))
        if n_keys != n_queries:
            values = average_pool(values, n_queries)
        v, *streams = jnp.split(linear(params["in_proj"], values), self.order + 1, axis=-1)  # (B, N, d) each
        signal = v.swapaxes(1, 2)  # time last, where the FFT is contiguous
        for i, stream in enumerate(streams):
            gate = jax.nn.sigmoid(linear(params["gates"][str(i)], stream)).swapaxes(1, 2)
            signal = full_precision(signal * gate)
            response = full_precision(params["filter_params"][str(i)][:, : length // 2 + 1])
            spectrum = jnp.fft.rfft(signal, n=length) * lax.complex(response[..., 0], response[..., 1])
            signal = jnp.fft.irfft(spectrum, n=length)[..., :n_queries]
        return linear(params["out_proj"], signal.swapaxes(1, 2).astype(v.dtype))


def average_pool(x: Array, n_out: int) -> Array:
    """Adaptive average pooling of ``x (B, M, d)`` to ``(B, n_out, d)``.

    Row ``i`` is the mean of the steps from ``floor(i M / n_out)`` to before ``ceil((i + 1) M / n_out)``.
    """
    n_in = x.shape[1]
    row = np.arange(n_out)
    start, stop = row * n_in // n_out, -(-(row + 1) * n_in // n_out)
    offset = np.arange(int((stop - start).max()))
    index = np.minimum(start[:, None] + offset, n_in - 1)  # (n_out, w)
    share = (offset < (stop - start)[:, None]) / (stop - start)[:, None]
    return jnp.einsum("bnwd,nw->bnd", x[:, index], jnp.asarray(share, x.dtype))
