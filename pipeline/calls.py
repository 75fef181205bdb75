"""Predictions against the thresholds of a checkpoint: what is called, how surely, which errors are worst."""

from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray
from scipy.special import logit

from mpc.config import CheckpointInfo
from pipeline.inference import DEFAULT_THRESHOLD
from pipeline.predictions import Predictions

FAR = 98  # per cent of all predictions lie nearer to their threshold than the end of a bar


@dataclass(frozen=True)
class Calls:
    """Predictions with the threshold of each finding."""

    predictions: Predictions
    thresholds: NDArray[np.float64]
    """[K], probabilities."""
    default: tuple[bool, ...]
    """Whether a threshold is only the default of one half."""

    @classmethod
    def of(cls, predictions: Predictions, info: CheckpointInfo) -> "Calls":
        """With the thresholds that validation chose for a checkpoint."""
        chosen = [info.thresholds.get(name) for name in predictions.findings]
        values = np.array([DEFAULT_THRESHOLD if value is None else value for value in chosen])
        return cls(predictions, values, tuple(value is None for value in chosen))

    @property
    def findings(self) -> tuple[str, ...]:
        """The model's names."""
        return self.predictions.findings

    @cached_property
    def called(self) -> NDArray[np.bool_]:
        """[N, K]: the probability reaches the threshold."""
        return np.asarray(self.predictions.probabilities >= self.thresholds)

    @cached_property
    def present(self) -> NDArray[np.bool_]:
        """[N, K]: known, and there."""
        return np.asarray(self.predictions.known & (self.predictions.labels == 1))

    @cached_property
    def absent(self) -> NDArray[np.bool_]:
        """[N, K]: known not to be there."""
        return np.asarray(self.predictions.known & (self.predictions.labels == 0))

    @cached_property
    def margins(self) -> NDArray[np.float64]:
        """[N, K]: how far a prediction lies above its threshold, in log-odds."""
        return np.asarray(self.predictions.logits - logit(np.clip(self.thresholds, 1e-9, 1 - 1e-9)))

    @cached_property
    def margin_scale(self) -> float:
        """Log-odds from a threshold within which nearly all predictions lie; > 0."""
        return float(np.percentile(np.abs(self.margins), FAR)) + 1e-9 if self.margins.size else 1.0

    def examples(self, number: int) -> list[int]:
        """Some images, in their order, chosen by a hash of their id and not by how well the model does."""
        ids = self.predictions.image_id
        return sorted(sorted(range(len(ids)), key=lambda row: hash_of(ids[row]))[:number])

    def errors(self, number: int, *, missed: bool) -> list[tuple[int, int]]:
        """The most confident errors as (row, finding): positives that were not called, else negatives that were."""
        wrong = self.present & ~self.called if missed else self.absent & self.called
        return extremes(np.where(wrong, np.abs(self.margins), -1.0), number)

    def highest(self, row: int) -> int:
        """The finding of an image that lies highest above its threshold."""
        return int(self.margins[row].argmax())


def extremes(values: NDArray[np.float64], number: int) -> list[tuple[int, int]]:
    """The largest values >= 0 of [N, K] as (row, column), each row and each column once."""
    free = values.copy()
    found: list[tuple[int, int]] = []
    while len(found) < number and free.size:
        row, k = divmod(int(free.argmax()), free.shape[1])
        if free[row, k] < 0:
            break
        found.append((row, k))
        free[row, :] = free[:, k] = -1.0
    return found


def hash_of(image_id: str) -> int:
    """64 bits that depend on the id alone."""
    return int.from_bytes(blake2b(f"report:{image_id}".encode(), digest_size=8).digest(), "big")
