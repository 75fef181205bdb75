"""Resampling of patients with replacement, and AUROC and average precision of a thousand resamples at once.

A resample is a weight for each patient: how often he was drawn. All his images carry that weight, so that images of one
patient, which resemble each other, never count as independent.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from mpc.metrics.scores import Array, columns_of

BLOCK = 32  # resamples at work at a time


@dataclass(frozen=True)
class Resamples:
    """Draws of patients, the same for every finding, every metric and every model that is compared."""

    patient: NDArray[np.intp]
    """[N], which patient each image is of."""
    weights: Array
    """[R, patients], unsigned: how often each patient occurs in each resample; every row sums to their number."""

    @classmethod
    def draw(cls, patients: Sequence[str] | Array, resamples: int = 1000, seed: int = 0) -> "Resamples":
        """`resamples` draws of as many patients as there are, uniform and with replacement.

        Args:
            patients: the patient of each image, [N], in any form that compares.
            resamples: R.
            seed: the same seed and patients give the same draws.
        """
        names, patient = np.unique(np.asarray(patients), return_inverse=True)
        generator, number = np.random.default_rng(seed), len(names)
        weights = np.empty((resamples, number), np.min_scalar_type(number))
        for row in weights:
            row[:] = np.bincount(generator.integers(0, number, number), minlength=number)
        return cls(patient, weights)

    @property
    def patients(self) -> int:
        """How many there are."""
        return int(self.weights.shape[1])

    def scores(
        self, probabilities: Array, labels: Array, known: Array, findings: Sequence[str]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """AUROC and average precision of every resample and finding, [R, K] each.

        NaN where a resample holds positives or negatives alone. Arguments and errors are those of `mpc.metrics.score`.
        """
        columns = columns_of(probabilities, labels, known, findings)
        auroc, ap = (np.full((len(self.weights), len(findings)), np.nan) for _ in range(2))
        for k, (p, y) in enumerate(columns.values()):
            rows = np.flatnonzero(np.asarray(known, bool)[:, k])
            if len(rows):
                auroc[:, k], ap[:, k] = _areas(p, y, self.patient[rows], self.weights)
        return auroc, ap

    def totals(self, counts: Array) -> NDArray[np.float64]:
        """Sums over the images of each resample, [R, ...], of counts [N, ...] that are integers below 2^53."""
        flat = np.asarray(counts, np.float64).reshape(len(counts), -1)
        by_patient = np.stack([np.bincount(self.patient, column, self.patients) for column in flat.T], axis=1)
        return np.asarray((self.weights.astype(np.float64) @ by_patient).reshape(-1, *np.shape(counts)[1:]))


def _areas(
    p: Array, y: Array, patient: NDArray[np.intp], weights: Array
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """AUROC and AP [R] of one finding: its probabilities and labels [n], the patient of each row, weights [R, P].

    Rows fall into segments: for each distinct score that has positives, the negatives between it and the next higher
    such score, the negatives that share it, and its positives. Sums over segments are all that either area needs, and a
    sparse matrix sums the rows of every resample at once.
    """
    order = np.argsort(-p, kind="stable")
    p, y, patient = p[order], y[order], patient[order]
    first = np.flatnonzero(np.r_[True, p[1:] != p[:-1]])  # where each distinct score begins
    last = np.r_[first[1:], len(p)] - 1
    holds = np.add.reduceat(y, first) > 0
    first, last = np.r_[first[holds], len(p)], last[holds]  # behind the last positive no score has any
    rows = np.arange(len(p))
    score = np.searchsorted(last, rows)
    segment = 3 * score + np.where(rows < first[score], 0, 1 + y)
    shape = (3 * len(first), weights.shape[1])
    sums = sparse.csr_array((np.ones(len(p)), (segment, patient)), shape=shape)
    parts = [_part(sums @ block) for block in _blocks(weights)]
    auroc, ap = (np.concatenate(values) for values in zip(*parts, strict=True))
    return auroc, ap


def _blocks(weights: Array) -> Iterator[Array]:
    """A few resamples at a time, [P, r]: what is at work stays in the cache."""
    for start in range(0, len(weights), BLOCK):
        yield np.ascontiguousarray(weights[start : start + BLOCK].T, np.float64)


def _part(sums: Array) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """AUROC and AP of r resamples from the sums of their segments [3 S, r]."""
    above, tied, positive = sums[0::3], sums[1::3], sums[2::3]
    found, alarms = np.cumsum(positive, 0), np.cumsum(above + tied, 0)
    all_positive, all_negative = found[-1], alarms[-1]
    with np.errstate(invalid="ignore", divide="ignore"):
        auroc = (positive * (all_negative - alarms + 0.5 * tied)).sum(0) / (all_positive * all_negative)
        precision = np.where(positive > 0, found / (found + alarms), 0.0)
        ap = (positive * precision).sum(0) / all_positive
    lacking = (all_positive == 0) | (all_negative == 0)
    return np.where(lacking, np.nan, auroc), np.where(lacking, np.nan, ap)
