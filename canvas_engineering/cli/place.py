"""Real input on a canvas: pixels into one region, the pan path into ``mouse``, other arrays where they are named."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from canvas_engineering._optional import require
from canvas_engineering.canvas import CanvasLayout
from canvas_engineering.cli.clip import (
    Clip,
    FloatArray,
    clip_from_array,
    from_patches,
    pan_photograph,
    read_arrays,
    to_patches,
)
from canvas_engineering.errors import CanvasError

if TYPE_CHECKING:
    import torch

POINTER_REGION = "mouse"


@dataclass(frozen=True)
class Features:
    """Numbers for one region that are not pixels: ``(positions, features)`` float32, and where they come from."""

    values: FloatArray
    source: str


@dataclass
class PixelRegion:
    """How the pixels of one region were embedded, so that an attention output can be decoded to pixels again.

    Attributes:
        name: The region.
        shape: Its frames, rows and columns of patches.
        clip: The frames.
        basis: ``(3 * patch ** 2, d_model)`` float32; its rows are orthonormal, so its transpose decodes.
        mean, std: Of the clip's pixels, removed before embedding.
    """

    name: str
    shape: tuple[int, int, int]
    clip: Clip
    basis: FloatArray
    mean: float
    std: float

    def decode(self, content: FloatArray) -> FloatArray:
        """``(T * rows * columns, d_model)`` to ``(T, rows * patch, columns * patch, 3)`` in 0..1."""
        patches = content @ self.basis.T * self.std + self.mean
        return from_patches(patches, *self.shape, self.clip.patch).clip(0, 1)


@dataclass
class Placed:
    """A canvas with real input on it.

    Attributes:
        canvas: ``(1, N, d_model)`` float32 torch tensor: content, positions, regions and periods.
        content: ``(N, d_model)`` float32: the content alone where something was placed, else the canvas token.
            Positions decide who is read (queries, keys), content is what is read (values).
        regions: What stands in every region, in words.
        pixels: The region that holds pixels, if any.
    """

    canvas: torch.Tensor
    content: FloatArray
    regions: dict[str, str] = field(default_factory=dict)
    pixels: PixelRegion | None = None


def orthonormal(rows: int, columns: int, rng: np.random.Generator) -> FloatArray:
    """``(rows, columns)``: random, orthonormal rows (or columns, where there are more rows than columns)."""
    wide = rows <= columns
    tall = rng.standard_normal((columns, rows) if wide else (rows, columns))
    basis = np.linalg.qr(tall)[0]
    return np.ascontiguousarray(basis.T if wide else basis, dtype=np.float32)


def frame_shape(layout: CanvasLayout, name: str) -> tuple[int, int, int]:
    """Frames, rows and columns of a region.

    Raises:
        CanvasError: The canvas does not have two spatial dimensions.
    """
    bounds = layout.region_spec(name).bounds
    if len(bounds) != 6:
        raise CanvasError(
            f"pixels need a canvas with two spatial dimensions, got spatial_shape={tuple(layout.spatial_shape)}: "
            f"give a .npz file with one (positions, features) array per region"
        )
    t0, t1, row0, row1, column0, column1 = bounds
    return t1 - t0, row1 - row0, column1 - column0


def gather_input(layout: CanvasLayout, path: Path | None) -> dict[str, Clip | Features]:
    """What goes into which region: clips, and ``(positions, features)`` arrays.

    Without ``path`` the photograph goes into the region with the most positions. A ``.npy`` clip goes there, too;
    a ``.npz`` file names its regions.

    Raises:
        CanvasError: An array that names no region, or does not fit its region.
    """
    if not layout.regions:
        raise CanvasError("the canvas must have at least one region to place input in, got none")
    largest = max(layout.regions, key=layout.region_numel)
    found: dict[str, Clip | Features] = {}
    if path is None:
        clip = pan_photograph(*frame_shape(layout, largest), layout.d_model)
        found[largest] = clip
        if POINTER_REGION in layout.regions and clip.path is not None:
            found[POINTER_REGION] = pointer_features(layout, clip.path)
        return found
    for name, array in read_arrays(path).items():
        region = name or largest
        if region not in layout.regions:
            raise CanvasError(f"{path}: array {name!r} names no region; known regions: {', '.join(layout.regions)}")
        if array.ndim == 4:
            found[region] = clip_from_array(array, *frame_shape(layout, region), layout.d_model, f"{path}")
        else:
            found[region] = features(array, layout.region_numel(region), f"{path}, array {region!r}")
    return found


def features(array: NDArray[np.generic], positions: int, source: str) -> Features:
    """Check an array of features.

    Raises:
        CanvasError: Not ``(positions, features)``, not numbers, or not finite.
    """
    if array.ndim != 2 or array.shape[0] != positions or array.shape[1] == 0:
        raise CanvasError(f"{source} must have shape ({positions}, features), got {array.shape}")
    if array.dtype.kind not in "fiu":
        raise CanvasError(f"{source} must hold real numbers, got {array.dtype}")
    values = array.astype(np.float32)
    if not np.isfinite(values).all():
        raise CanvasError(f"{source} must be finite, got NaN or infinity")
    return Features(values, source)


def pointer_features(layout: CanvasLayout, path: FloatArray) -> Features:
    """Four features: where the window is and how it moved, repeated over the positions of each frame."""
    spec = layout.region_spec(POINTER_REGION)
    steps = np.resize(np.arange(len(path)), spec.bounds[1] - spec.bounds[0])
    moved = np.diff(path, axis=0, prepend=path[:1])
    per_frame = np.concatenate([path * 2 - 1, moved * len(path)], axis=1)[steps]
    values = np.repeat(per_frame, layout.region_numel(POINTER_REGION) // max(len(steps), 1), axis=0)
    return Features(values.astype(np.float32), "position and motion of the panned window")


def place(layout: CanvasLayout, given: Mapping[str, Clip | Features], seed: int = 0) -> Placed:
    """Embed the input and place it with :class:`SpatiotemporalCanvas`.

    Raises:
        MissingDependencyError: torch is not installed.
    """
    require("torch", "torch", "SpatiotemporalCanvas")
    import torch

    from canvas_engineering.nn.canvas import SpatiotemporalCanvas

    rng = np.random.default_rng(seed)
    with torch.random.fork_rng(devices=[]), torch.inference_mode():
        torch.manual_seed(seed)
        module = SpatiotemporalCanvas(layout)
        canvas = module.create_empty(1)
        positions = module.pos_enc(layout.T, layout.spatial_shape).reshape(layout.num_positions, layout.d_model)
        placed = Placed(canvas, canvas[0].numpy().copy())
        for name in layout.regions:
            if name not in given:
                placed.regions[name] = "empty tokens"
                continue
            item = given[name]
            if isinstance(item, Clip):
                embedded = _embed_pixels(placed, layout, name, item, rng)
            else:
                embedded = item.values @ orthonormal(item.values.shape[1], layout.d_model, rng)
                placed.regions[name] = f"{item.values.shape[1]} features: {item.source}"
            index = np.asarray(layout.region_indices(name))
            placed.content[index] = embedded
            # place() overwrites what create_empty() put there, positions included.
            tokens = torch.from_numpy(embedded) + positions[torch.from_numpy(index)]
            placed.canvas = module.place(placed.canvas, tokens[None], name)
    return placed


def _embed_pixels(placed: Placed, layout: CanvasLayout, name: str, clip: Clip, rng: np.random.Generator) -> FloatArray:
    patches = to_patches(clip.frames, clip.patch)
    basis = orthonormal(patches.shape[1], layout.d_model, rng)
    mean, std = float(patches.mean()), float(patches.std()) or 1.0
    region = PixelRegion(name, frame_shape(layout, name), clip, basis, mean, std)
    placed.pixels = placed.pixels or region
    placed.regions[name] = f"{clip.patch} x {clip.patch} pixel patches of {clip.source}"
    return ((patches - mean) / std @ basis).astype(np.float32)
