"""What is said about an image: calibrated probabilities, thresholds in the same units, and flags."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import logit

from mpc.config import CheckpointInfo
from mpc.metrics.calibration import Calibration
from pipeline.inference import DEFAULT_FLAG, LoadedModel, thresholds

Way = Literal["platt", "temperature", "none"]
UNCALIBRATED, UNCHECKED = "uncalibrated", "input_unchecked"
AS_IT_IS = Calibration(1.0, 1.0, 0.0)


class Scale:
    """From logits to probabilities that hold, with thresholds that move along: what is called does not change.

    Args:
        info: what validation chose and fitted.
        way: of calibration; findings that validation could not calibrate stay as they are, and are flagged.
    """

    def __init__(self, info: CheckpointInfo, way: Way = "platt") -> None:
        self.findings, self.way = info.findings, way
        fits = [info.calibration.get(name) for name in self.findings]
        self.fits = [AS_IT_IS if fit is None else Calibration(**fit.model_dump()) for fit in fits]
        raw, default = thresholds(info)
        moved = self.probabilities(logit(np.clip(raw, 1e-9, 1 - 1e-9))[None])[0]
        same = [fit is AS_IT_IS or way == "none" for fit in self.fits]
        self.thresholds: NDArray[np.float64] = np.where(same, raw, moved)
        """[K]"""
        self.flags = tuple(
            tuple(name for name, holds in ((DEFAULT_FLAG, at), (UNCALIBRATED, fit is None and way != "none")) if holds)
            for at, fit in zip(default, fits, strict=True)
        )
        """Of each finding, the same for every image."""

    def probabilities(self, logits: NDArray[np.float64]) -> NDArray[np.float64]:
        """[N, K] of logits [N, K]."""
        return np.stack([fit.apply(logits[:, k], self.way) for k, fit in enumerate(self.fits)], 1)

    @property
    def any_flags(self) -> tuple[str, ...]:
        """Every flag that at least one finding has."""
        return tuple(dict.fromkeys(flag for flags in self.flags for flag in flags))


class Judged(NamedTuple):
    """What is said about one image."""

    probabilities: NDArray[np.float64]
    """[K]"""
    flags: tuple[str, ...]
    """Of the image as a whole."""
    unlikeness: float | None
    """Distance from the training images, flagged above 1; None where the checkpoint has no reference."""


def judge(
    loaded: LoadedModel, scale: Scale, images: NDArray[np.uint8], known: Sequence[tuple[str, ...]]
) -> list[Judged]:
    """Judges images [N, size, size]; `known` are the flags that each has already, from its header."""
    logits, features = loaded.outputs(images)
    probabilities, reference = scale.probabilities(logits.astype(np.float64)), loaded.reference
    if reference is None:
        return [Judged(row, (UNCHECKED, *flags), None) for row, flags in zip(probabilities, known, strict=True)]
    seen, far = reference.flags(features, images), reference.unlikeness(features, images)
    rows = zip(probabilities, seen, known, far.tolist(), strict=True)
    return [Judged(row, (*found, *flags), distance) for row, found, flags, distance in rows]
