"""Raster primitives of the synthetic radiographs: soft edges, ellipses, strokes and smooth noise at any size."""

import math
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
    step = np.asarray(distance * np.float32(1 / width))
    step += np.float32(0.5)
    return step.clip(0, 1, out=step)


def radius(size: int, centre: tuple[float, float], radii: tuple[float, float], angle: float = 0.0) -> Array:
    """Distance from the centre in units of an ellipse's radii: 1 on its border; [size, size]. `angle` in radians."""
    x, y = grid(size)
    dx, dy = x - np.float32(centre[0]), y - np.float32(centre[1])
    cos, sin = math.cos(angle), math.sin(angle)
    along = dx * (cos / radii[0]) + dy * (sin / radii[0])
    across = dx * (-sin / radii[1]) + dy * (cos / radii[1])
    return np.asarray(cv2.magnitude(along, across))


def bell(distance: Array) -> Array:
    """A smooth hump of a normalised distance: 1 at 0, 0 from 1 on."""
    fall = np.maximum(np.float32(1) - distance * distance, 0)
    return fall * fall


def smooth_noise(rng: np.random.Generator, cells: int, size: int) -> Array:
    """Uniform noise in [0, 1] on cells x cells, interpolated to [size, size]: the same pattern at every size."""
    coarse = rng.random((cells, cells), dtype=np.float32)
    return np.asarray(cv2.resize(coarse, (size, size), interpolation=cv2.INTER_LINEAR))


def strokes(size: int, curves: NDArray[np.floating], width: float) -> Array:
    """Curves ([n, points, 2] of x, y) drawn with a width; below one pixel they fade instead. [size, size] in [0, 1]."""
    pixels = max(1, round(width * size))
    level = min(1.0, width * size / pixels)
    drawn = np.zeros((size, size), np.uint8)
    fixed = np.rint((curves * size - 0.5) * (1 << _SHIFT)).astype(np.int32, order="C")
    cv2.polylines(drawn, list(fixed), False, 255, pixels, cv2.LINE_AA, _SHIFT)
    return drawn * np.float32(level / 255)


def bands(size: int, curves: NDArray[np.floating], width: float) -> Array:
    """Curves ([n, points, 2] of x, y) as filled bands, `width` tall at every point; they must not overlap each other.

    A third of the cost of thick strokes, and of exact width at every size. [size, size] in [0, 1].
    """
    half = np.array([0.0, width / 2])
    drawn = np.zeros((size, size), np.uint8)
    border = np.concatenate([curves - half, curves[:, ::-1] + half], axis=1)
    fixed = np.rint((border * size - 0.5) * (1 << _SHIFT)).astype(np.int32, order="C")
    cv2.fillPoly(drawn, list(fixed), 255, cv2.LINE_AA, _SHIFT)
    return drawn * np.float32(1 / 255)


def blur(image: Array, sigma: float) -> Array:
    """Gaussian blur with sigma as a fraction of the side; below a third of a pixel nothing happens."""
    pixels = sigma * image.shape[0]
    if pixels < 0.33:
        return image
    return np.asarray(cv2.GaussianBlur(image, (0, 0), pixels))
