"""What the training images were like, and whether another image is unlike them: distances in two descriptions of it.

Each description, the network's pooled features and a coarse picture, gets a Gaussian of the training images with Ledoit
and Wolf's covariance; the distance is Mahalanobis's (Lee et al., NeurIPS 2018, with one class, since images have many
findings). Features miss what the network has learned to ignore; the picture misses what looks alike from afar. The
larger of both counts. Only means and covariances are kept: no image, and no patient's features, travel with a model.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save
from scipy.linalg import cholesky, solve_triangular
from sklearn.covariance import ledoit_wolf

from mpc.errors import UserError

FILE = "reference.safetensors"
UNLIKE, INVERTED, LOW_CONTRAST = "unlike_training", "inverted", "low_contrast"
CELLS = 16  # side of the coarse picture
BANDS = 3  # halvings whose detail is measured
FLOOR = 0.1  # of the mean deviation: what hardly varies in training may still vary a little
FAINT = 0.25  # of the least contrast among training images

PARTS, SINGLE = ("network", "picture"), ("limit", "false_alarms", "contrast")

Values = NDArray[np.float64]


class Gaussian(NamedTuple):
    """A distribution of vectors [C] by its mean and the matrix [C, C] that makes it white."""

    mean: NDArray[np.float32]
    whiten: NDArray[np.float32]

    @classmethod
    def of(cls, rows: NDArray[Any]) -> "Gaussian":
        """That of [N, C], each column in units of its own deviation before the covariance is shrunk."""
        rows = np.asarray(rows, np.float64)
        mean, deviation = rows.mean(0), rows.std(0)
        unit = np.maximum(deviation, FLOOR * deviation.mean() + 1e-9)
        covariance, _ = ledoit_wolf((rows - mean) / unit, assume_centered=True)
        root = cholesky(covariance, lower=True)
        whiten = solve_triangular(root, np.diag(1 / unit), lower=True)
        # row by row: safetensors would write the columns of LAPACK's result as if they were rows
        return cls(mean.astype(np.float32), np.ascontiguousarray(whiten, np.float32))

    def distance(self, rows: NDArray[Any]) -> Values:
        """Mahalanobis distance of each row over the square root of C: about 1 for rows of the distribution, or less."""
        white = (np.asarray(rows, np.float64) - self.mean) @ self.whiten.T.astype(np.float64)
        return np.asarray(np.sqrt(np.square(white).mean(1)))


class Described(NamedTuple):
    """Images as a reference knows them."""

    features: NDArray[np.float32]
    """[N, C], pooled features of the network."""
    pictures: NDArray[np.float32]
    """[N, D], see `describe`."""
    contrast: NDArray[np.float64]
    """[N], deviation of the grey values."""

    @classmethod
    def of(cls, features: NDArray[np.float32], images: NDArray[np.uint8]) -> "Described":
        """Of images [N, size, size] with their features."""
        return cls(features, describe(images), images.std((1, 2)))


class Reference(NamedTuple):
    """The training images, and from where on an image counts as unlike them."""

    network: Gaussian
    picture: Gaussian
    unit: Values
    """[2]: the distance that a tenth of the held-out images exceeds, of each description: makes both comparable."""
    limit: float
    """Of the larger of both, in those units."""
    false_alarms: float
    """Share of images like those held out that are flagged."""
    contrast: float
    """Least deviation of grey values among the training images."""

    @classmethod
    def of(cls, train: "Described", held_out: "Described", false_alarms: float) -> "Reference":
        """Fits the training images and sets the limit on others.

        Args:
            train: images that the network was trained on.
            held_out: images that it was not; with n of them no rate below 1 / (n + 1) can be kept, and the lowest that
                can be is taken.
            false_alarms: rate in (0, 1): the limit is the split-conformal quantile of the distances.
        """
        network, picture = Gaussian.of(train.features), Gaussian.of(train.pictures)
        distances = np.stack([network.distance(held_out.features), picture.distance(held_out.pictures)], 1)
        unit = np.quantile(distances, 0.9, axis=0)  # further out it would depend on the images that set the limit
        n = len(distances)
        rank = min(int(np.ceil((n + 1) * (1 - false_alarms))), n)
        limit = float(np.sort((distances / unit).max(1))[rank - 1])
        return cls(network, picture, unit, limit, (n + 1 - rank) / (n + 1), float(train.contrast.min()))

    def unlikeness(self, features: NDArray[np.float32], images: NDArray[np.uint8]) -> Values:
        """[N]: how far each image lies from the training images; flagged above 1."""
        return np.asarray(self.parts(features, images).max(1) / self.limit)

    def parts(self, features: NDArray[np.float32], images: NDArray[np.uint8]) -> Values:
        """[N, 2]: the distance in the network's features and in the picture, in comparable units."""
        found = (self.network.distance(features), self.picture.distance(describe(images)))
        return np.asarray(np.stack(found, 1) / self.unit)

    def flags(self, features: NDArray[np.float32], images: NDArray[np.uint8]) -> list[tuple[str, ...]]:
        """For each image nothing, or `unlike_training` with what can be said about why."""
        far = self.unlikeness(features, images) > 1
        negative = self.picture.distance(describe(255 - images)) < self.picture.distance(describe(images))
        faint = images.std((1, 2)) < FAINT * self.contrast
        hints = ((INVERTED, negative & ~faint), (LOW_CONTRAST, faint))
        return [
            (UNLIKE, *(name for name, holds in hints if holds[row])) if far[row] else () for row in range(len(images))
        ]

    def to_bytes(self) -> bytes:
        """As safetensors."""
        single = {name: np.array(getattr(self, name)) for name in SINGLE}
        parts = {f"{name}.{key}": value for name in PARTS for key, value in getattr(self, name)._asdict().items()}
        return bytes(save({**single, **parts, "unit": self.unit}))

    @classmethod
    def from_bytes(cls, content: bytes, where: str) -> "Reference":
        """What `to_bytes` wrote; `where` names it in messages.

        Raises:
            UserError: it is something else.
        """
        try:
            tensors: Mapping[str, NDArray[Any]] = load(content)
            network, picture = (Gaussian(tensors[f"{name}.mean"], tensors[f"{name}.whiten"]) for name in PARTS)
            limit, rate, contrast = (float(tensors[name]) for name in SINGLE)
            return cls(network, picture, tensors["unit"], limit, rate, contrast)
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise UserError(f"{where}: no reference of training images ({reason}); use another checkpoint") from error


def describe(images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """[N, D] of [N, size, size]: grey values of 16 x 16 cells, and how much detail there is at three scales."""
    return np.stack([_describe(image.astype(np.float32) / 255) for image in images])


def _describe(image: NDArray[np.float32]) -> NDArray[np.float32]:
    cells = cv2.resize(image, (CELLS, CELLS), interpolation=cv2.INTER_AREA)
    detail = []
    for _ in range(BANDS):
        side = max(1, image.shape[0] // 2)
        half = cv2.resize(image, (side, side), interpolation=cv2.INTER_AREA)
        back = cv2.resize(half, image.shape[::-1], interpolation=cv2.INTER_LINEAR)
        detail.append(np.log(float((image - back).std()) + 1e-3))
        image = np.asarray(half)
    return np.concatenate([np.asarray(cells).ravel(), np.array(detail, np.float32)])
