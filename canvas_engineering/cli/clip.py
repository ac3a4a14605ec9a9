"""Pixels for a canvas: a clip from a file, or a window panned over a photograph, cut into patches and back."""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from canvas_engineering._optional import require
from canvas_engineering.errors import CanvasError

FloatArray = NDArray[np.float32]

PHOTOGRAPH = "grace_hopper.jpg"
# The window on the photograph has about this many pixels on its longer side, whatever the size of the region.
WINDOW_PIXELS = 192
LARGEST_PATCH = 8


@dataclass(frozen=True)
class Clip:
    """Frames ready to be cut into patches.

    Attributes:
        frames: ``(T, rows * patch, columns * patch, 3)`` float32 in 0..1.
        patch: Pixels on the side of a patch.
        path: ``(T, 2)`` float32, centre (y, x) of the window on the photograph in 0..1; None for a file.
        source: Where the pixels come from, for the report.
    """

    frames: FloatArray
    patch: int
    path: FloatArray | None
    source: str


def patch_pixels(d_model: int) -> int:
    """The largest patch side, up to 8, whose RGB values fit ``d_model`` so that patches can be decoded again."""
    return next((p for p in (LARGEST_PATCH, 4, 2) if 3 * p * p <= d_model), 1)


def pan_photograph(num_frames: int, rows: int, columns: int, d_model: int) -> Clip:
    """A window panned along an ellipse over the photograph that matplotlib ships as sample data.

    Raises:
        MissingDependencyError: matplotlib is not installed.
        CanvasError: The region has more patches than the photograph has pixels.
    """
    require("matplotlib", "viz", "the built-in photograph")
    from matplotlib import cbook, image

    photograph = image.imread(str(cbook.get_sample_data(PHOTOGRAPH, asfileobj=False))) / np.float32(255)
    height, width = photograph.shape[:2]
    if rows > height or columns > width:
        raise CanvasError(
            f"the built-in photograph has {height} x {width} pixels, the region needs at least {rows} x {columns}: "
            f"give a clip of your own with --input"
        )
    patch = patch_pixels(d_model)
    while rows * patch > height or columns * patch > width:
        patch //= 2
    zoom = max(1, WINDOW_PIXELS // (max(rows, columns) * patch))
    window = np.array([rows, columns]) * patch * zoom
    room = np.array([height, width]) - window
    angle = 2 * np.pi * np.arange(num_frames)[:, None] / max(num_frames, 1)
    corner = np.rint(room * (0.5 + 0.5 * np.concatenate([np.sin(angle), -np.cos(angle)], axis=1))).astype(int)
    frames = np.stack(
        [
            box_average(photograph[y : y + window[0], x : x + window[1]], rows * patch, columns * patch)
            for y, x in corner
        ]
    )
    centre = (corner + window / 2) / [height, width]
    return Clip(frames, patch, centre.astype(np.float32), f"matplotlib sample data {PHOTOGRAPH}, panned")


def clip_from_array(
    array: NDArray[np.generic], num_frames: int, rows: int, columns: int, d_model: int, source: str
) -> Clip:
    """Fit pixels to a region: frames taken at even steps, the centre cropped to the region's shape, resampled.

    Args:
        array: ``(frames, height, width, 3)``, uint8, or floating point in 0..1.

    Raises:
        CanvasError: Another shape, dtype or range, or fewer frames or pixels than the region has.
    """
    if array.ndim != 4 or array.shape[-1] != 3:
        raise CanvasError(f"{source}: a clip must have shape (frames, height, width, 3), got {array.shape}")
    if array.dtype == np.uint8:
        pixels = array.astype(np.float32) / 255
    elif np.issubdtype(array.dtype, np.floating):
        pixels = array.astype(np.float32)
    else:
        raise CanvasError(f"{source}: a clip must be uint8 or floating point, got {array.dtype}")
    if not (np.isfinite(pixels).all() and pixels.min(initial=0) >= 0 and pixels.max(initial=0) <= 1):
        raise CanvasError(f"{source}: a floating-point clip must lie in 0..1, with no NaN")
    have, height, width = pixels.shape[:3]
    if have < num_frames or height < rows or width < columns:
        raise CanvasError(
            f"{source}: the region needs at least {num_frames} frames of {rows} x {columns} pixels, "
            f"got {have} of {height} x {width}"
        )
    patch = patch_pixels(d_model)
    scale = min(height / rows, width / columns)
    crop_height, crop_width = int(rows * scale), int(columns * scale)
    top, left = (height - crop_height) // 2, (width - crop_width) // 2
    chosen = np.linspace(0, have - 1, num_frames).round().astype(int)
    frames = np.stack(
        [
            box_average(pixels[f, top : top + crop_height, left : left + crop_width], rows * patch, columns * patch)
            for f in chosen
        ]
    )
    return Clip(frames, patch, None, source)


def box_average(picture: NDArray[np.floating[Any]], height: int, width: int) -> FloatArray:
    """Resample ``(h, w, 3)`` to ``(height, width, 3)``: each new pixel is the mean of the old ones it covers."""
    for axis, size in enumerate((height, width)):
        old = picture.shape[axis]
        start = np.arange(size) * old // size
        stop = np.maximum(np.arange(1, size + 1) * old // size, start + 1)
        total = np.concatenate([np.zeros_like(picture.take([0], axis)), picture.cumsum(axis, dtype=np.float64)], axis)
        count = (stop - start).reshape([-1 if a == axis else 1 for a in range(3)])
        picture = (total.take(stop, axis) - total.take(start, axis)) / count
    return picture.astype(np.float32)


def to_patches(frames: FloatArray, patch: int) -> FloatArray:
    """``(T, rows * patch, columns * patch, 3)`` to ``(T * rows * columns, 3 * patch ** 2)``, in canvas order."""
    count, height, width, _ = frames.shape
    cut = frames.reshape(count, height // patch, patch, width // patch, patch, 3)
    return cut.transpose(0, 1, 3, 2, 4, 5).reshape(-1, 3 * patch * patch)


def from_patches(patches: FloatArray, num_frames: int, rows: int, columns: int, patch: int) -> FloatArray:
    """The inverse of :func:`to_patches`."""
    cut = patches.reshape(num_frames, rows, columns, patch, patch, 3)
    return cut.transpose(0, 1, 3, 2, 4, 5).reshape(num_frames, rows * patch, columns * patch, 3)


def read_arrays(path: Path) -> dict[str, NDArray[np.generic]]:
    """The arrays of a ``.npz`` file by name, or of a ``.npy`` file under the empty name; no pickles.

    Raises:
        CanvasError: The file is not one of the two. OSError: It cannot be read.
    """
    try:
        with path.open("rb") as file:
            loaded = np.load(file, allow_pickle=False)
            return {"": loaded} if isinstance(loaded, np.ndarray) else {name: loaded[name] for name in loaded.files}
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise CanvasError(f"{path}: must be a .npy or .npz file of plain arrays: {error}") from None
