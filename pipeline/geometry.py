"""From a rectangle to a square of the stored size."""

from typing import Any, Literal

import cv2
import numpy as np
from numpy.typing import NDArray

Fit = Literal["crop", "pad"]
MAX_PIXELS = 64 * 2**20
"""Largest image that is decoded: 8192 x 8192, twice the side of any radiograph; more is taken for a bomb."""


def square(grey: NDArray[Any], size: int, fit: Fit, reduce_to: int | None = None) -> NDArray[Any]:
    """Grey [H, W] of uint8, uint16 or float32 as [size, size] of the same type.

    `crop` cuts the longer side centrally before resizing; `pad` resizes the longer side to `size` and centres the
    result on black. Odd remainders go to the bottom and the right. With `reduce_to`, what is resized is first reduced
    until its longer side has that many pixels; smaller images stay as they are.
    """
    height, width = grey.shape
    if fit == "crop":
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        return _resize(_reduce(grey[top : top + side, left : left + side], reduce_to), size, size)
    scale = size / max(height, width)
    inner_height, inner_width = max(1, round(height * scale)), max(1, round(width * scale))
    inner = _resize(_reduce(grey, reduce_to), inner_height, inner_width)
    if inner.shape == (size, size):
        return inner
    top, left = (size - inner_height) // 2, (size - inner_width) // 2
    canvas = np.zeros((size, size), dtype=grey.dtype)
    canvas[top : top + inner_height, left : left + inner_width] = inner
    return canvas


def _reduce(grey: NDArray[Any], side: int | None) -> NDArray[Any]:
    """The image with its longer side at most `side`, by averaging areas; None leaves it as it is."""
    height, width = grey.shape
    if side is None or max(height, width) <= side:
        return grey
    scale = side / max(height, width)
    return _resize(grey, max(1, round(height * scale)), max(1, round(width * scale)))


def _resize(grey: NDArray[Any], height: int, width: int) -> NDArray[Any]:
    """Averages areas when shrinking, interpolates linearly when growing (area would repeat pixels)."""
    if grey.shape == (height, width):
        return np.ascontiguousarray(grey)
    shrinks = height <= grey.shape[0] and width <= grey.shape[1]
    method = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    return np.asarray(cv2.resize(np.ascontiguousarray(grey), (width, height), interpolation=method))
