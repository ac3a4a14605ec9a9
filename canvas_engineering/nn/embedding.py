"""Embeddings of a canvas position: where it is, how often its region updates, what its region is for."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from canvas_engineering.errors import CanvasError

#: Standard deviation of freshly initialised embedding tables.
INIT_STD = 0.02


class SinusoidalPositionalEncodingND(nn.Module):
    """Sinusoids per axis of a ``(T, *spatial)`` grid, side by side (Vaswani et al., 2017, arXiv:1706.03762).

    Every axis gets ``d_model // n_axes`` channels, the last axis also the remainder.

    Args:
        d_model: channels of the encoding.
        max_T: largest number of timesteps.
        max_spatial: largest size of every spatial axis; one to any number of axes.

    Buffers: ``pe`` (max_T, *max_spatial, d_model), float32.

    Raises:
        CanvasError: ``d_model`` or a size is below 1.
    """

    pe: Tensor

    def __init__(self, d_model: int, max_T: int = 32, max_spatial: Sequence[int] = (64, 64)) -> None:
        super().__init__()
        sizes = (max_T, *max_spatial)
        if d_model < 1 or min(sizes) < 1:
            raise CanvasError(
                "d_model, max_T and max_spatial must be at least 1, got "
                f"d_model={d_model}, max_T={max_T}, max_spatial={tuple(max_spatial)}"
            )
        share = d_model // len(sizes)
        pe = torch.empty(*sizes, d_model)
        for axis, size in enumerate(sizes):
            stop = d_model if axis == len(sizes) - 1 else (axis + 1) * share
            encoding = _sinusoids(size, stop - axis * share)
            along_axis = [size if a == axis else 1 for a in range(len(sizes))]
            pe[..., axis * share : stop] = encoding.view(*along_axis, -1) if encoding.numel() else encoding.view(-1)
        self.register_buffer("pe", pe)

    def forward(self, T: int, spatial_shape: Sequence[int]) -> Tensor:
        """The encoding of the grid's first corner, a view of shape ``(T, *spatial_shape, d_model)``.

        Raises:
            CanvasError: the grid has another number of axes, or is larger than the buffer.
        """
        grid, limit = (T, *spatial_shape), tuple(self.pe.shape[:-1])
        if len(grid) != len(limit) or any(size > most for size, most in zip(grid, limit, strict=True)):
            raise CanvasError(f"the grid (T, *spatial_shape) must fit into {limit}, got {grid}")
        return self.pe[tuple(slice(size) for size in grid)]


def _sinusoids(size: int, channels: int) -> Tensor:
    """(size, channels): sine and cosine by turns, wavelengths from 2π to 10000 · 2π."""
    position = torch.arange(size, dtype=torch.float32).unsqueeze(1)
    frequency = torch.exp(torch.arange(0, channels, 2).float() * (-math.log(10000.0) / max(channels, 1)))
    encoding = torch.empty(size, channels)
    encoding[:, 0::2] = torch.sin(position * frequency)
    encoding[:, 1::2] = torch.cos(position * frequency[: channels // 2])
    return encoding


class SinusoidalPositionalEncoding3D(SinusoidalPositionalEncodingND):
    """``SinusoidalPositionalEncodingND`` for a ``(T, H, W)`` grid.

    Args:
        d_model: channels of the encoding.
        max_T, max_H, max_W: largest sizes of the grid.
    """

    def __init__(self, d_model: int, max_T: int = 32, max_H: int = 64, max_W: int = 64) -> None:
        super().__init__(d_model, max_T=max_T, max_spatial=(max_H, max_W))

    def forward(  # type: ignore[override]  # takes H and W, as well as the base class's spatial_shape
        self, T: int, H: int = 0, W: int = 0, spatial_shape: Sequence[int] | None = None
    ) -> Tensor:
        """The encoding of ``(T, H, W)``, or of ``(T, *spatial_shape)`` where that is given."""
        return super().forward(T, (H, W) if spatial_shape is None else spatial_shape)


class PeriodEmbedding(nn.Module):
    """A learned vector for the update period of a region, by logarithmic buckets.

    Added to the positions, it tells a model how old a value may be that it reads from a slower region.
    ``bucket = floor(log(period) / log(max_period) * (n_buckets - 1))``, clipped to the table. With the
    defaults: 1 → 0, 4 → 2, 16 → 4, 576 → 10, 4608 → 13.

    Args:
        d_model: channels of the embedding.
        n_buckets: number of buckets.
        max_period: period that reaches the last bucket; at least 2 is used.
        legacy_buckets: the buckets of canvas-engineering 0.5.0, which are one higher for periods above 1
            (1 → 0, 4 → 3, 16 → 5, 576 → 11, 4608 → 14). Set it to go on with weights trained there.

    Parameters: ``embedding.weight`` (n_buckets, d_model).

    Raises:
        CanvasError: ``n_buckets`` below 1.
    """

    def __init__(
        self, d_model: int, n_buckets: int = 16, max_period: int = 10000, *, legacy_buckets: bool = False
    ) -> None:
        super().__init__()
        if n_buckets < 1:
            raise CanvasError(f"n_buckets must be at least 1, got n_buckets={n_buckets}")
        self.n_buckets = n_buckets
        self.max_period = max_period
        self.legacy_buckets = legacy_buckets
        self.embedding = nn.Embedding(n_buckets, d_model)
        nn.init.normal_(self.embedding.weight, std=INIT_STD)

    def bucket(self, period: int) -> int:
        """The bucket of a period; periods below 1 count as 1."""
        # Python's integers do not overflow in the powers below, NumPy's would.
        period, base, last = int(period), max(int(self.max_period), 2), self.n_buckets - 1
        if period <= 1:
            return 0
        position = math.log(period) / math.log(base) * last
        if self.legacy_buckets:
            return min(int(position) + 1, last)
        found = min(round(position), last)
        # The nearest whole number is the floor or one above it; integers decide, so that exact powers of
        # max_period ** (1 / last) are not at the mercy of the logarithm's last bit.
        return found if base**found <= period**last else found - 1

    def forward(self, period: int) -> Tensor:
        """The vector of a period, ``(d_model,)``."""
        return self.embedding.weight[self.bucket(period)]


class FamilyCarrierEmbedding(nn.Module):
    """The sum of a learned vector for a region's family and one for its carrier.

    Names outside ``FAMILIES`` and ``CARRIERS`` share the last row of their table.

    Args:
        d_model: channels of the embedding.

    Parameters: ``family_embedding.weight`` and ``carrier_embedding.weight``, (6, d_model) each.
    """

    FAMILIES = ("observation", "state", "memory", "residual", "action")
    CARRIERS = ("deterministic", "diffusive", "filter", "memory", "residual")

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.d_model = d_model
        self.family_embedding = nn.Embedding(len(self.FAMILIES) + 1, d_model)
        self.carrier_embedding = nn.Embedding(len(self.CARRIERS) + 1, d_model)
        nn.init.normal_(self.family_embedding.weight, std=INIT_STD)
        nn.init.normal_(self.carrier_embedding.weight, std=INIT_STD)

    def family_idx(self, family: str) -> int:
        """Row of a family in its table."""
        return self.FAMILIES.index(family) if family in self.FAMILIES else len(self.FAMILIES)

    def carrier_idx(self, carrier: str) -> int:
        """Row of a carrier in its table."""
        return self.CARRIERS.index(carrier) if carrier in self.CARRIERS else len(self.CARRIERS)

    def forward(self, family: str, carrier: str) -> Tensor:
        """The vector of a family and a carrier, ``(d_model,)``."""
        family_vector = self.family_embedding.weight[self.family_idx(family)]
        return family_vector + self.carrier_embedding.weight[self.carrier_idx(carrier)]

    def extra_repr(self) -> str:
        """The arguments, for ``repr``."""
        return f"d_model={self.d_model}"
