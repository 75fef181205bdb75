"""Weak and strong views of a grey radiograph on the CPU, by albumentations and OpenCV (docs/method.md, 3.1)."""

import math
import random
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from mpc.config import RedConfig, StrongConfig, ViewsConfig, WeakConfig
from mpc.lean import without
from mpc.red import displacement
from mpc.strengths import BLUR_SIGMA, BRIGHTNESS, CONTRAST, FILL, REFERENCE_SIDE, ROTATE, SHARPNESS, SHEAR, TRANSLATE

with without("albumentations.pytorch"):  # its torch, unused here, costs each process that augments 1.2 s and 480 MiB
    import albumentations as A

Image = NDArray[np.uint8]

BORDER = cv2.BORDER_REFLECT_101  # a constant image stays constant under every warp


class TwoViews:
    """Draws the weak view of an image and, on top of the same draw, the strong ones.

    An object holds no state between calls: a view is a pure function of the image, the configuration and the seed.

    Args:
        config: strengths and probabilities.
        image_size: side of the square views, pixels.
        strong: whether strong views are wanted at all; the configuration says how many.
    """

    def __init__(self, config: ViewsConfig, image_size: int, strong: bool) -> None:
        self.weak = A.Compose([*_weak(config.weak, image_size), *_flip(config.hflip)])
        self.strong = A.Compose(_strong(config.strong, config.red, image_size))
        self.count = config.strong.count if strong else 0

    def __call__(self, image_HW: Image, seed: int) -> tuple[Image, ...]:
        """The weak view, then the strong ones, each uint8 [image_size, image_size] and contiguous.

        Args:
            image_HW: uint8 [H, W]; never changed.
            seed: >= 0, of this image in this epoch.

        Raises:
            ValueError: the image is no two-dimensional uint8 array.
        """
        if image_HW.ndim != 2 or image_HW.dtype != np.uint8:
            raise ValueError(f"views need a uint8 image [H, W], got {image_HW.dtype} {image_HW.shape}")
        # one pair of generators for all transforms: Compose.set_random_seed would start each from the same seed, and
        # a blur would then come exactly with every deformation
        generators = np.random.default_rng(seed), random.Random(seed)
        weak = _run(self.weak, image_HW, generators)
        return weak, *(_run(self.strong, weak, generators) for _ in range(self.count))


def _run(pipeline: A.Compose, image: Image, generators: tuple[np.random.Generator, random.Random]) -> Image:
    pipeline.set_random_state(*generators)
    # a copy, because some transforms of albumentations write into their input
    out: Image = np.ascontiguousarray(pipeline(image=image.copy())["image"])
    return out


class ElasticDeformation(A.ImageOnlyTransform):  # type: ignore[misc]
    """RED on albumentations.

    Args:
        rms: displacement per axis, as a fraction of the side.
        sigma: correlation length, as a fraction of the side.
        p: probability.
    """

    def __init__(self, rms: float, sigma: float, p: float) -> None:
        super().__init__(p=p)
        self.rms, self.sigma = rms, sigma

    def get_params_dependent_on_data(self, params: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
        """Draws the field for the image at hand."""
        height, width = params["shape"][:2]
        side = math.sqrt(height * width)
        dy, dx = displacement(self.random_generator, height, width, self.rms * side, self.sigma * side)
        return {"dy": dy, "dx": dx}

    def apply(self, img: Image, dy: NDArray[np.float32], dx: NDArray[np.float32], **params: Any) -> Image:
        """Samples the image at its displaced grid."""
        return warp(img, dy, dx)


def warp(image: Image, dy: NDArray[np.float32], dx: NDArray[np.float32]) -> Image:
    """Bilinear sample of uint8 [H, W] at (y + dy, x + dx), reflected at the border; displacements in pixels."""
    height, width = image.shape
    map_x = dx + np.arange(width, dtype=np.float32)
    map_y = dy + np.arange(height, dtype=np.float32)[:, None]
    out: Image = cv2.remap(image, map_x, map_y, cv2.INTER_LINEAR, borderMode=BORDER)
    return out


def _weak(config: WeakConfig, side: int) -> list[A.BasicTransform]:
    # the aspect is kept: proportions such as the cardiothoracic ratio are signs
    return [A.RandomResizedCrop((side, side), scale=(config.crop, 1.0), ratio=(1.0, 1.0), p=1.0)]


def _flip(probability: float) -> list[A.BasicTransform]:
    return [A.HorizontalFlip(p=probability)] if probability > 0 else []


def _strong(strong: StrongConfig, red: RedConfig, side: int) -> list[A.BasicTransform | A.BaseCompose]:
    """Operations in their order; what is switched off is left out."""
    steps: list[A.BasicTransform | A.BaseCompose] = []
    if strong.ops:
        steps.append(A.SomeOf(_operations(strong.magnitude), n=strong.ops, replace=False, p=1.0))
    if strong.blur:
        low, high = (sigma * side / REFERENCE_SIDE for sigma in BLUR_SIGMA)
        steps.append(A.GaussianBlur(blur_limit=0, sigma_limit=(low, high), p=strong.blur))
    if red.rms and red.p:
        steps.append(ElasticDeformation(red.rms, red.sigma, red.p))
    if strong.cutout:
        limits = (0.0, strong.cutout)
        steps.append(A.CoarseDropout((1, 1), hole_height_range=limits, hole_width_range=limits, fill=FILL, p=1.0))
    return steps


def _operations(magnitude: float) -> list[A.BasicTransform]:
    """The ten operations that a strong view draws from; autocontrast and equalize know no strength."""
    degrees, shear = ROTATE * magnitude, math.degrees(math.atan(SHEAR * magnitude))
    shift = (-TRANSLATE * magnitude, TRANSLATE * magnitude)
    affine: dict[str, Any] = {"border_mode": BORDER, "interpolation": cv2.INTER_LINEAR, "p": 1.0}
    return [
        A.AutoContrast(p=1.0),
        _jitter(brightness=_around_one(BRIGHTNESS * magnitude)),
        _jitter(contrast=_around_one(CONTRAST * magnitude)),
        A.Sharpen(alpha=(0.0, SHARPNESS * magnitude), lightness=(1.0, 1.0), p=1.0),
        A.Equalize(p=1.0),
        A.Affine(rotate=(-degrees, degrees), **affine),
        A.Affine(shear={"x": (-shear, shear), "y": (0.0, 0.0)}, **affine),
        A.Affine(shear={"x": (0.0, 0.0), "y": (-shear, shear)}, **affine),
        A.Affine(translate_percent={"x": shift, "y": (0.0, 0.0)}, **affine),
        A.Affine(translate_percent={"x": (0.0, 0.0), "y": shift}, **affine),
    ]


def _around_one(spread: float) -> tuple[float, float]:
    return max(0.0, 1.0 - spread), 1.0 + spread


def _jitter(
    brightness: tuple[float, float] = (1.0, 1.0), contrast: tuple[float, float] = (1.0, 1.0)
) -> A.BasicTransform:
    """Brightness multiplies, contrast moves away from the mean; both in the sense of torchvision."""
    return A.ColorJitter(brightness=brightness, contrast=contrast, saturation=(1.0, 1.0), hue=(0.0, 0.0), p=1.0)
