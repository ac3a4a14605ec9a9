"""Long convolutions with gates that depend on the data."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from canvas_engineering.attention.base import AttentionFunction, check_positive, full_precision
from canvas_engineering.errors import CanvasError


class HyenaAttention(AttentionFunction):
    """Gated circular convolutions of the values, filters given by frequency (see Hyena, arXiv:2302.10866).

    The values are brought to N rows by adaptive average pooling where ``M != N``, projected to ``order + 1``
    streams, and the first stream is gated by the others in turn, each time followed by a convolution of
    the next power of two (at least 2) in length. ``keys`` are not used. Convolves in float32 when the input
    is half precision; ``dropout`` is unused.

    Parameters: ``in_proj`` Linear(d, (order + 1) d), ``out_proj``, ``filter_params.{i}``
    (d, max_len // 2 + 1, 2), ``gates.{i}`` Linear(d, d).

    Raises:
        CanvasError: ``order`` below 1, ``max_len`` below 2; in ``forward``, too many queries for the filters.
    """

    def __init__(
        self, d_model: int, n_heads: int = 4, dropout: float = 0.0, order: int = 2, max_len: int = 4096
    ) -> None:
        super().__init__(d_model, n_heads, dropout)
        check_positive("order", order)
        if max_len < 2:
            raise CanvasError(f"max_len must be at least 2, got max_len={max_len}")
        self.order = order
        self.max_len = max_len
        self.in_proj = nn.Linear(d_model, d_model * (order + 1))
        self.out_proj = nn.Linear(d_model, d_model)
        self.filter_params = nn.ParameterList(
            nn.Parameter(torch.randn(d_model, max_len // 2 + 1, 2) * 0.02) for _ in range(order)
        )
        self.gates = nn.ModuleList(nn.Linear(d_model, d_model) for _ in range(order))

    def forward(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """``queries (B, N, d)``, ``keys (B, M, d)`` (unused), ``values (B, M, d)`` to ``(B, N, d)``."""
        self.check_inputs(queries, keys, values)
        n_queries, n_keys = queries.shape[1], values.shape[1]
        length = 1 << max(1, (n_queries - 1).bit_length())
        if length // 2 > self.max_len // 2:
            raise CanvasError(
                f"hyena convolves over the next power of two of the number of queries, which must be at most "
                f"max_len={self.max_len}, got {n_queries} queries (length {length})"
            )
        if queries.numel() == 0 or n_keys == 0:
            return self.out_proj(values.sum(1, keepdim=True).expand(-1, n_queries, -1))  # zeros
        if n_keys != n_queries:
            values = F.adaptive_avg_pool1d(values.transpose(1, 2), n_queries).transpose(1, 2)
        v, *streams = self.in_proj(values).chunk(self.order + 1, dim=-1)  # (B, N, d) each
        dtype = v.dtype
        signal = v.transpose(1, 2)  # time last, where the FFT is contiguous
        for stream, gate, filter_params in zip(streams, self.gates, self.filter_params, strict=True):
            signal = full_precision(signal * torch.sigmoid(gate(stream)).transpose(1, 2))
            response = torch.view_as_complex(
                full_precision(filter_params[:, : length // 2 + 1]).contiguous()
            )  # (d, length // 2 + 1)
            spectrum = torch.fft.rfft(signal, n=length) * response
            signal = torch.fft.irfft(spectrum, n=length)[..., :n_queries]
        return self.out_proj(signal.transpose(1, 2).to(dtype))
