"""Thresholds: chosen on one split by a rule, counted on another."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from sklearn.metrics import roc_curve

from mpc.metrics.scores import Array, both_outcomes, columns_of

SENSITIVITIES = (0.80, 0.90, 0.95, 0.98)
RULES = ("youden", "max_f1", *(f"sensitivity_{level:.2f}" for level in SENSITIVITIES))
"""`youden` maximises sensitivity + specificity (Youden, Cancer 1950), `max_f1` the F1 score; `sensitivity_0.90` is the
largest threshold with at least that sensitivity."""
COUNTS = ("tp", "fn", "fp", "tn")


def operating_points(
    probabilities: Array, labels: Array, known: Array, findings: Sequence[str], rules: Sequence[str] = ("youden",)
) -> dict[str, dict[str, float] | None]:
    """Thresholds of each finding, by rule: `youden` maximises sensitivity + specificity (Youden, Cancer 1950).

    A probability >= the threshold is positive; of equally good thresholds the largest is taken. None stands for a
    finding without both outcomes. Arguments and errors are those of `score`; `rules` are some of RULES.
    """
    columns = columns_of(probabilities, labels, known, findings)
    return {name: _thresholds(p, y, rules) for name, (p, y) in columns.items()}


def counts_at(probabilities: Array, labels: Array, known: Array, thresholds: Array) -> Array:
    """Which of tp, fn, fp, tn each entry is at thresholds [K], as 0 and 1: int64 [N, K, 4]; all 0 where not known.

    NaN as a threshold calls nothing.
    """
    p, y, mask = np.asarray(probabilities), np.asarray(labels) == 1, np.asarray(known, bool)
    called = p >= np.asarray(thresholds)
    return np.stack([mask & y & called, mask & y & ~called, mask & ~y & called, mask & ~y & ~called], -1).astype(int)


def rates(counts: Array) -> dict[str, Array]:
    """Sensitivity, specificity, precision and F1 from counts [..., 4] of tp, fn, fp, tn; NaN where nothing is there."""
    tp, fn, fp, tn = np.moveaxis(np.asarray(counts, np.float64), -1, 0)
    with np.errstate(invalid="ignore", divide="ignore"):
        return {
            "sensitivity": tp / (tp + fn),
            "specificity": tn / (tn + fp),
            "precision": tp / (tp + fp),
            "f1": 2 * tp / (2 * tp + fp + fn),
        }


def _thresholds(probabilities: Array, labels: Array, rules: Sequence[str]) -> dict[str, float] | None:
    if not both_outcomes(labels):
        return None
    false_positive_rate, true_positive_rate, thresholds = roc_curve(labels, probabilities, drop_intermediate=False)
    # the first point is "nothing is positive" at an infinite threshold, which no report can hold
    curve = (false_positive_rate[1:], true_positive_rate[1:], float(labels.mean()))
    # rounded: equal merits differ in the last bit, such as 2/3 - 0 and 1 - 1/3
    return {rule: float(thresholds[1 + int(np.argmax(np.round(_merit(rule, *curve), 12)))]) for rule in rules}


def _merit(rule: str, false_positive_rate: Array, true_positive_rate: Array, prevalence: float) -> Any:
    """What a rule maximises, at each threshold of a ROC curve; the first of the best is the largest threshold."""
    if rule == "youden":
        return true_positive_rate - false_positive_rate
    if rule == "max_f1":
        called = prevalence * true_positive_rate + (1 - prevalence) * false_positive_rate
        return 2 * prevalence * true_positive_rate / (called + prevalence)
    level = float(rule.removeprefix("sensitivity_"))
    return np.float64(true_positive_rate >= level - 1e-12)  # a share such as 9 of 10 is not exactly 0.9
