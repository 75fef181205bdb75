"""Calibration: whether 0.3 comes true three times in ten, how far it is off, and two ways to mend it."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import expit, log_expit

from mpc.metrics.scores import Array, both_outcomes, columns_of

SLOPES = (0.02, 50.0)  # of the logit: bounds where validation separates perfectly, or ranks the wrong way round
SHIFTS = (-20.0, 20.0)


class Calibration(NamedTuple):
    """How logits s of a finding become probabilities: sigmoid(s / temperature), or sigmoid(slope s + shift)."""

    temperature: float
    """Guo et al., ICML 2017, for one finding: the certainty changes, one half stays one half."""
    slope: float
    shift: float
    """Platt 1999: the level changes too, which training on one positive an image has lowered."""

    def apply(self, logits: Array, way: str) -> NDArray[np.float64]:
        """Probabilities [N] of logits [N]; `way` is `temperature` or `platt`, anything else leaves them as they are."""
        scale, shift = {"temperature": (1 / self.temperature, 0.0), "platt": (self.slope, self.shift)}.get(way, (1, 0))
        return np.asarray(expit(np.asarray(logits, np.float64) * scale + shift))


def calibrate(logits: Array, labels: Array, known: Array, findings: Sequence[str]) -> dict[str, Calibration]:
    """Temperature, and slope with shift, of each finding: those of the largest likelihood (SciPy's L-BFGS-B).

    Fit on validation. Both keep the order of images, hence AUROC and AP. A finding without both outcomes is left out.

    Args:
        logits: float [N, K].
        labels: [N, K] in {0, 1}, read where `known`.
        known: bool [N, K].
        findings: K names.

    Raises:
        ValueError: as `mpc.metrics.score`.
    """
    columns = columns_of(logits, labels, known, findings)
    found = {}
    for name, (s, y) in columns.items():
        if both_outcomes(y):
            found[name] = Calibration(1 / _fit(s, y, (0.0, 0.0))[0], *_fit(s, y, SHIFTS))
    return found


def calibration(probabilities: Array, labels: Array, bins: int = 10) -> dict[str, float]:
    """Expected calibration error and Brier score of one finding, both 0 at best.

    Args:
        probabilities: [n] in [0, 1].
        labels: [n] in {0, 1}.
        bins: of equal numbers of images, as `reliability` makes them.

    Returns:
        `ece`: mean over images of how far the mean probability of their bin is from the share of positives in it.
        `brier`: mean squared distance of probability and label.
    """
    curve = reliability(probabilities, labels, bins)
    gaps = np.abs(np.subtract(curve["predicted"], curve["observed"]))
    squares = (np.asarray(probabilities, np.float64) - labels) ** 2
    return {"ece": float(np.average(gaps, weights=curve["n"])), "brier": float(squares.mean())}


def reliability(probabilities: Array, labels: Array, bins: int = 10) -> dict[str, list[Any]]:
    """Mean probability, share of positives and number of images of each bin that holds any, from low to high.

    Bins hold equal numbers of images (edges are quantiles, as in scikit-learn's `calibration_curve`): of a rare finding
    most probabilities are small, and bins of equal width would leave all but one empty.
    """
    p, y = np.asarray(probabilities, np.float64), np.asarray(labels, np.float64)
    edges = np.percentile(p, np.linspace(0, 1, bins + 1) * 100)
    which = np.searchsorted(edges[1:-1], p)
    n = np.bincount(which, minlength=bins)
    full = n > 0
    predicted, observed = (np.bincount(which, values, bins)[full] / n[full] for values in (p, y))
    return {"predicted": predicted.tolist(), "observed": observed.tolist(), "n": n[full].tolist()}


def _fit(logits: Array, labels: Array, shifts: tuple[float, float]) -> tuple[float, float]:
    """Slope and shift within their bounds that make the labels likeliest; the problem is convex."""

    def loss(x: Array) -> tuple[float, Array]:
        s = x[0] * logits + x[1]
        error = expit(s) - labels
        likelihood = log_expit(np.where(labels == 1, s, -s)).mean()
        return -float(likelihood), np.array([np.mean(error * logits), error.mean()])

    found = minimize(loss, [1.0, 0.0], jac=True, method="L-BFGS-B", bounds=[SLOPES, shifts], options=_EXACT)
    return float(found.x[0]), float(found.x[1])


_EXACT = {"ftol": 1e-14, "gtol": 1e-9, "maxiter": 500}
