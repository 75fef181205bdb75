"""Raster primitives of the synthetic radiographs: soft edges, ellipses, strokes and smooth noise at any size."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
"""float32; arithmetic with Python numbers keeps it so."""
_SHIFT = 4  # fractional bits of OpenCV's polygon coordinates


@lru_cache(maxsize=8)
def grid(size: int) -> tuple[Array, Array]:
    """Pixel centres in [0, 1]: x as [1, size], y as [size, 1]."""
    centres = ((np.arange(size) + 0.5) / size).astype(np.float32)
    centres.flags.writeable = False
    return centres[None, :], centres[:, None]


def edge(distance: Array, width: float) -> Array:
    """A soft step: 0 where `distance` <= -width/2, 1 where >= width/2; same shape."""
    return np.asarray(np.clip(distance * np.float32(1 / width) + np.float32(0.5), 0, 1))


def radius(size: int, centre: tuple[float, float], radii: tuple[float, float], angle: float = 0.0) -> Array:
    """Distance from the centre in units of an ellipse's radii: 1 on its border; [size, size]. `angle` in radians."""
    x, y = grid(size)
    dx, dy = x - np.float32(centre[0]), y - np.float32(centre[1])
    cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    along = dx * (cos / np.float32(radii[0])) + dy * (sin / np.float32(radii[0]))
    across = dy * (cos / np.float32(radii[1])) - dx * (sin / np.float32(radii[1]))
    return np.asarray(np.sqrt(along * along + across * across))


def bell(distance: Array) -> Array:
    """A smooth hump of a normalised distance: 1 at 0, 0 from 1 on."""
    fall = np.maximum(np.float32(1) - distance * distance, 0)
    return fall * fall


def smooth_noise(rng: np.random.Generator, cells: int, size: int) -> Array:
    """Uniform noise in [0, 1] on cells x cells, interpolated to [size, size]: the same pattern at every size."""
    coarse = rng.random((cells, cells), dtype=np.float32)
    return np.asarray(cv2.resize(coarse, (size, size), interpolation=cv2.INTER_LINEAR))


def strokes(size: int, curves: Sequence[NDArray[np.floating]], width: float, canvas: Array | None = None) -> Array:
    """Curves ([points, 2] of x, y) drawn with a width; below one pixel they fade instead. [size, size] in [0, 1]."""
    pixels = max(1, round(width * size))
    level = min(1.0, width * size / pixels)
    drawn = np.zeros((size, size), np.uint8)
    fixed = [np.rint((np.asarray(curve) * size - 0.5) * (1 << _SHIFT)).astype(np.int32) for curve in curves]
    cv2.polylines(drawn, fixed, False, 255, pixels, cv2.LINE_AA, _SHIFT)
    result: Array = drawn.astype(np.float32) * np.float32(level / 255)
    return result if canvas is None else np.maximum(canvas, result)


def blur(image: Array, sigma: float) -> Array:
    """Gaussian blur with sigma as a fraction of the side; below a third of a pixel nothing happens."""
    pixels = sigma * image.shape[0]
    if pixels < 0.33:
        return image
    return np.asarray(cv2.GaussianBlur(image, (0, 0), pixels))
