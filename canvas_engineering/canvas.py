"""Canvas geometry: a grid of latent vectors and the regions that share it.

A canvas is a row-major grid ``(T, *spatial_shape)`` of ``d_model``-vectors. A region is an axis-aligned
box of that grid; regions may overlap and may leave positions uncovered.

The torch modules that fill a canvas (``SpatiotemporalCanvas`` and its embeddings) are importable from
here and load torch on first use.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

import numpy as np

from canvas_engineering._checks import check_int, check_number, check_shape, check_str
from canvas_engineering._forward import torch_attribute
from canvas_engineering._optional import require
from canvas_engineering.errors import CanvasError

if TYPE_CHECKING:
    from torch import Tensor

    from canvas_engineering.nn.canvas import SpatiotemporalCanvas as SpatiotemporalCanvas
    from canvas_engineering.nn.embedding import (
        FamilyCarrierEmbedding as FamilyCarrierEmbedding,
        PeriodEmbedding as PeriodEmbedding,
        SinusoidalPositionalEncoding3D as SinusoidalPositionalEncoding3D,
        SinusoidalPositionalEncodingND as SinusoidalPositionalEncodingND,
    )

_TORCH_NAMES = {
    "SpatiotemporalCanvas": "canvas_engineering.nn.canvas",
    "SinusoidalPositionalEncodingND": "canvas_engineering.nn.embedding",
    "SinusoidalPositionalEncoding3D": "canvas_engineering.nn.embedding",
    "PeriodEmbedding": "canvas_engineering.nn.embedding",
    "FamilyCarrierEmbedding": "canvas_engineering.nn.embedding",
}


def __getattr__(name: str) -> Any:
    return torch_attribute(__name__, _TORCH_NAMES, name)


ATTENTION_TYPES: dict[str, str] = {
    "cross_attention": "softmax(q kᵀ / sqrt(head_dim)) v with learned projections. Cost |src| x |dst|.",
    "linear_attention": "Feature map elu + 1 in place of the softmax, so keys and values are summed once. "
    "Cost |src| + |dst|.",
    "cosine_attention": "Softmax over cosine similarities times a learned temperature; bounded logits.",
    "sigmoid_attention": "Each logit passes its own sigmoid: keys do not compete, weights need not sum to 1.",
    "gated": "Cross-attention scaled by one learned sigmoid gate: context the model may learn to ignore.",
    "perceiver": "A few learned latents read dst, then src reads the latents. Cost |src| + |dst|.",
    "pooling": "The projected mean of dst, broadcast to every position of src. The cheapest learned edge.",
    "copy": "The first |src| rows of dst, zero-padded; nothing learned.",
    "mamba": "Selective state-space scan over dst; src reads the scanned states.",
    "rwkv": "Recurrent weighted key-value average with a learned per-channel decay: older tokens fade.",
    "hyena": "Gated long convolutions by FFT. Cost n log n.",
    "sparse_attention": "Softmax over the top-k logits of each query only.",
    "local_attention": "Softmax within a one-dimensional index window around each query.",
    "none": "Declared, but carries nothing: an ablated edge.",
    "random_fixed": "Softmax over a random subset of dst per query, drawn once: a baseline.",
    "mixture": "Keys in four chunks with an expert each; a router mixes the best two per query.",
    "cogvideox": "Cross-attention here; marks regions whose backbone brings its own 3D-RoPE attention.",
}
"""Known attention function names and what each computes (see ``canvas_engineering.attention``)."""


class UnknownRegionError(CanvasError, KeyError):
    """A region name that the layout does not hold; both a ``ValueError`` and a ``KeyError``."""

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""


@dataclass(frozen=True)
class RegionSpec:
    """What one region of a canvas is.

    A spec is checked when a :class:`CanvasLayout` takes it in: only there are its name and grid known.

    Args:
        bounds: Half-open box ``(t0, t1, lo, hi, ...)``, two numbers per axis of ``(T, *spatial_shape)``.
        period: Real-world frames per canvas timestep; timestep ``t`` stands for real time ``t * period``.
        is_output: Whether the region takes part in the loss.
        loss_weight: Weight of the region's positions in the loss, finite and >= 0.
        semantic_type: Plain-language description of the modality; ``semantic_embedding`` is derived from it.
        semantic_embedding: ``embedding_model``'s vector of ``semantic_type``, for :func:`transfer_distance`.
        embedding_model: Name of the model that made ``semantic_embedding``.
        default_attn: Attention function of outgoing connections that name none; see :data:`ATTENTION_TYPES`.
        carrier: Dynamics: ``deterministic``, ``diffusive``, ``filter``, ``memory`` or ``residual``.
    """

    bounds: tuple[int, ...]
    period: int = 1
    is_output: bool = True
    loss_weight: float = 1.0
    semantic_type: str | None = None
    semantic_embedding: tuple[float, ...] | None = None
    embedding_model: str = "openai/text-embedding-3-small"
    default_attn: str = "cross_attention"
    carrier: str = "deterministic"

    def __post_init__(self) -> None:
        # Python numbers in tuples keep the spec hashable and JSON-ready when made from lists or NumPy values.
        for item in fields(self):
            object.__setattr__(self, item.name, _plain(getattr(self, item.name)))


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, (list, tuple, np.ndarray)):
        return tuple(_plain(item) for item in value)
    return value


def transfer_distance(a: RegionSpec, b: RegionSpec) -> float:
    """Cosine distance between the semantic embeddings of two regions, in ``[0, 2]``.

    0 means the same modality, 1 unrelated, 2 opposite. A zero vector has distance 1 from everything.

    Raises:
        CanvasError: an embedding is missing, or they differ in embedding model or length.
    """
    if a.semantic_embedding is None or b.semantic_embedding is None:
        side = "a" if a.semantic_embedding is None else "b"
        raise CanvasError(f"transfer_distance needs semantic_embedding set on both regions, {side} has None")
    if a.embedding_model != b.embedding_model:
        raise CanvasError(
            "transfer_distance compares embeddings of one model only: "
            f"embedding model mismatch, got {a.embedding_model!r} and {b.embedding_model!r}"
        )
    u = np.asarray(a.semantic_embedding, dtype=np.float64)  # (E,)
    v = np.asarray(b.semantic_embedding, dtype=np.float64)  # (E,)
    if u.shape != v.shape:
        raise CanvasError(f"transfer_distance: embedding dimension mismatch, got {u.shape[0]} and {v.shape[0]} numbers")
    norms = float(np.linalg.norm(u) * np.linalg.norm(v))
    cosine = float(u @ v) / norms if norms > 0.0 else 0.0
    return 1.0 - min(1.0, max(-1.0, cosine))


@dataclass
class CanvasLayout:
    """Geometry of a canvas: grid, width, and named regions.

    ``H`` and ``W`` are shorthand for a two-dimensional ``spatial_shape`` (a missing one counts as 1); after
    construction they mirror its first two sizes. Regions are given as bounds or as :class:`RegionSpec`.

    Args:
        T: Number of timesteps.
        d_model: Length of the vector at each position.
        spatial_shape: Sizes of the spatial axes, one or more.
        regions: Region name to bounds ``(t0, t1, lo, hi, ...)`` or :class:`RegionSpec`.
        t_current: First timestep that is an output of the model; earlier ones are context.

    Raises:
        CanvasError: sizes that are not positive integers, bounds of the wrong length, reversed or outside the
            grid, a period below 1, a loss weight that is negative or not finite.

    Example:
        >>> layout = CanvasLayout(T=5, H=8, W=8, d_model=256,
        ...                       regions={"visual": (0, 5, 0, 6, 0, 6), "action": (0, 5, 6, 7, 0, 1)})
        >>> layout.num_positions, layout.region_size("visual")
        (320, (5, 6, 6))
        >>> layout.region_indices("action")
        [48, 112, 176, 240, 304]
    """

    T: int
    d_model: int
    spatial_shape: tuple[int, ...] = ()
    regions: dict[str, tuple[int, ...] | RegionSpec] = field(default_factory=dict)
    t_current: int = 0
    H: int | None = field(default=None, repr=False)
    W: int | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        shorthand = self.H is not None or self.W is not None
        if shorthand and self.spatial_shape != ():
            raise CanvasError(
                "give either spatial_shape or H and W, not both: "
                f"got spatial_shape={self.spatial_shape!r}, H={self.H!r}, W={self.W!r}"
            )
        if shorthand:
            height = 1 if self.H is None else check_int(self.H, "H", minimum=1)
            width = 1 if self.W is None else check_int(self.W, "W", minimum=1)
            self.spatial_shape = (height, width)
        elif isinstance(self.spatial_shape, (tuple, list)) and len(self.spatial_shape) == 0:
            raise CanvasError("a layout needs spatial_shape, or H and W; got neither")
        self.T = check_int(self.T, "T", minimum=1)
        self.d_model = check_int(self.d_model, "d_model", minimum=1)
        self.spatial_shape = check_shape(self.spatial_shape, "spatial_shape")
        self.t_current = check_int(self.t_current, "t_current", minimum=0)
        self.H = self.spatial_shape[0]
        self.W = self.spatial_shape[1] if len(self.spatial_shape) > 1 else None
        if not isinstance(self.regions, Mapping):
            raise CanvasError(f"regions: expected a mapping of names to bounds or RegionSpec, got {self.regions!r}")
        self.regions = {
            check_str(name, "regions: region name"): _plain(region) for name, region in self.regions.items()
        }
        for name in self.regions:
            self._check_region(name)

    # Geometry

    @property
    def shape(self) -> tuple[int, ...]:
        """The grid ``(T, *spatial_shape)``."""
        return (self.T, *self.spatial_shape)

    @property
    def n_spatial_dims(self) -> int:
        """Number of spatial axes."""
        return len(self.spatial_shape)

    @property
    def spatial_volume(self) -> int:
        """Positions per timestep."""
        return math.prod(self.spatial_shape)

    @property
    def num_positions(self) -> int:
        """Positions on the whole canvas."""
        return self.T * self.spatial_volume

    @property
    def strides(self) -> tuple[int, ...]:
        """Flat-index steps of ``(T, *spatial_shape)``, in positions."""
        shape = self.shape
        return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))

    def flat_index(self, t: int, *spatial_coords: int) -> int:
        """Flat index of a position; trailing coordinates left out count as 0.

        Raises:
            CanvasError: too many coordinates, or one outside the grid.
        """
        coords = (t, *spatial_coords)
        shape = self.shape
        if len(coords) > len(shape):
            raise CanvasError(f"flat_index: expected at most {len(shape)} coordinates (t, *spatial), got {coords}")
        for axis, (coord, size) in enumerate(zip(coords, shape, strict=False)):
            if not 0 <= check_int(coord, f"flat_index: coordinate {axis}") < size:
                raise CanvasError(f"flat_index: coordinate {axis} must be in 0..{size - 1}, got {coords}")
        return int(sum(coord * stride for coord, stride in zip(coords, self.strides, strict=False)))

    # Regions

    def region_spec(self, name: str) -> RegionSpec:
        """The region's spec; plain bounds become a spec with all defaults.

        Raises:
            UnknownRegionError: no such region (a ``KeyError`` as well).
        """
        try:
            region = self.regions[name]
        except (KeyError, TypeError):
            known = ", ".join(map(repr, self.regions)) or "none"
            raise UnknownRegionError(f"unknown region {name!r}; the layout has {known}") from None
        return region if isinstance(region, RegionSpec) else RegionSpec(bounds=region)

    def bounds(self, name: str) -> tuple[int, ...]:
        """The region's checked bounds ``(t0, t1, lo, hi, ...)``.

        Raises:
            UnknownRegionError: no such region.
            CanvasError: a region added after construction has bounds outside the grid.
        """
        return check_bounds(self.region_spec(name).bounds, self.shape, f"region {name!r}: bounds")

    def region_bounds(self, name: str) -> tuple[tuple[int, int], ...]:
        """The region's half-open extent per axis, ``((t0, t1), (lo, hi), ...)``."""
        flat = self.bounds(name)
        return tuple(zip(flat[::2], flat[1::2], strict=True))

    def region_size(self, name: str) -> tuple[int, ...]:
        """The region's extent per axis, ``(timesteps, *spatial)``."""
        return tuple(hi - lo for lo, hi in self.region_bounds(name))

    def region_numel(self, name: str) -> int:
        """Number of positions in the region."""
        return math.prod(self.region_size(name))

    def region_index_array(self, name: str, t: int | None = None) -> np.ndarray:
        """Flat indices of the region in row-major order, as an int64 array.

        Args:
            name: Region.
            t: Absolute timestep to restrict to; outside the region the result is empty. None: all of them.

        Returns:
            ``(region_numel,)``, or ``(region_numel / timesteps,)`` with ``t``.
        """
        extents = self.region_bounds(name)
        if t is not None:
            (t0, t1), *rest = extents
            extents = ((t, t + 1) if t0 <= t < t1 else (t0, t0), *rest)
        index = np.zeros((), dtype=np.int64)
        for (lo, hi), stride in zip(extents, self.strides, strict=True):
            index = index[..., None] + np.arange(lo, hi, dtype=np.int64) * stride
        return index.reshape(-1)

    def region_indices(self, name: str) -> list[int]:
        """Flat indices of the region in row-major order."""
        indices: list[int] = self.region_index_array(name).tolist()
        return indices

    def region_indices_at_t(self, name: str, t_abs: int) -> list[int]:
        """Flat indices of the region at absolute timestep ``t_abs``; empty outside its extent."""
        indices: list[int] = self.region_index_array(name, t_abs).tolist()
        return indices

    def region_timesteps(self, name: str) -> list[int]:
        """Absolute timesteps that the region covers."""
        t0, t1 = self.region_bounds(name)[0]
        return list(range(t0, t1))

    # Outputs and loss

    def output_mask(self) -> list[int]:
        """Flat indices of all positions with ``t >= t_current``, in order."""
        return list(range(min(self.t_current, self.T) * self.spatial_volume, self.num_positions))

    def loss_weight_mask(self, device: Any = "cpu") -> Tensor:
        """Loss weight of every position; overlapping output regions add up, uncovered positions get 0.

        Args:
            device: Torch device of the result.

        Returns:
            ``(num_positions,)`` float32 torch tensor.

        Raises:
            MissingDependencyError: torch is not installed.
        """
        torch = require("torch", "torch", "CanvasLayout.loss_weight_mask")
        weights = np.zeros(self.shape, dtype=np.float32)
        for name in self.regions:
            spec = self.region_spec(name)
            if spec.is_output:
                weights[tuple(slice(lo, hi) for lo, hi in self.region_bounds(name))] += np.float32(spec.loss_weight)
        mask: Tensor = torch.from_numpy(weights.reshape(-1)).to(device)
        return mask

    # Real time

    def real_frame(self, name: str, canvas_t: int) -> int:
        """Real-world frame of a canvas timestep, both counted from the region's start."""
        return canvas_t * self.region_spec(name).period

    def canvas_frame(self, name: str, real_t: int) -> int | None:
        """Canvas timestep of a real-world frame, both counted from the region's start.

        Returns:
            None where the frame falls between two updates of the region or outside its extent.
        """
        canvas_t, remainder = divmod(real_t, self.region_spec(name).period)
        if remainder != 0 or not 0 <= canvas_t < self.region_size(name)[0]:
            return None
        return canvas_t

    def __eq__(self, other: object) -> bool:
        """Same grid and regions; plain bounds equal a RegionSpec with all defaults, as in JSON files."""
        if not isinstance(other, CanvasLayout):
            return NotImplemented
        return (self.shape, self.d_model, self.t_current, self._specs()) == (
            other.shape,
            other.d_model,
            other.t_current,
            other._specs(),
        )

    def _specs(self) -> dict[str, RegionSpec]:
        return {name: self.region_spec(name) for name in self.regions}

    def _check_region(self, name: str) -> None:
        self.bounds(name)
        spec = self.region_spec(name)
        check_int(spec.period, f"region {name!r}: period", minimum=1)
        check_number(spec.loss_weight, f"region {name!r}: loss_weight", minimum=0)
        check_str(spec.default_attn, f"region {name!r}: default_attn")
        for index, number in enumerate(spec.semantic_embedding or ()):
            check_number(number, f"region {name!r}: semantic_embedding[{index}]")


def check_bounds(bounds: object, shape: tuple[int, ...], where: str) -> tuple[int, ...]:
    """Return region bounds ``(t0, t1, lo, hi, ...)`` of a grid as a tuple of ints.

    Args:
        bounds: Sequence of two integers per axis.
        shape: The grid ``(T, *spatial_shape)``.
        where: Start of the error message.

    Raises:
        CanvasError: not such a sequence, reversed, or outside the grid.
    """
    if isinstance(bounds, str) or not isinstance(bounds, (Sequence, np.ndarray)):
        raise CanvasError(f"{where}: expected (t0, t1, lo, hi, ...), got {bounds!r}")
    if len(bounds) != 2 * len(shape):
        raise CanvasError(
            f"{where}: expected {2 * len(shape)} numbers (t0, t1 and lo, hi for each of {len(shape) - 1} "
            f"spatial axes), got {len(bounds)}: {tuple(bounds)}"
        )
    flat = tuple(check_int(value, f"{where}[{i}]") for i, value in enumerate(bounds))
    for axis, size in enumerate(shape):
        lo, hi = flat[2 * axis : 2 * axis + 2]
        limit = f"T={size}" if axis == 0 else f"spatial_shape[{axis - 1}]={size}"
        if lo > hi:
            raise CanvasError(
                f"{where}[{2 * axis}]={lo} must not exceed bounds[{2 * axis + 1}]={hi} (axis of {limit}), got {flat}"
            )
        if lo < 0:
            raise CanvasError(f"{where}[{2 * axis}]={lo} must be >= 0 (axis of {limit}), got {flat}")
        if hi > size:
            raise CanvasError(f"{where}[{2 * axis + 1}]={hi} must be <= {limit}, got {flat}")
    return flat
