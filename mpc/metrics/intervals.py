"""Percentile intervals by patient for scores, and for the difference of two models on the same images.

What happens where a resample lacks an outcome: AUROC and AP of a finding exist only where it has positives and
negatives, so its interval is over the resamples that have both. A macro mean is over the same findings as the point
estimate, in every resample: resamples in which one of them lacks an outcome are left out, never averaged over fewer
findings. `resamples` says how many remain; below half of them, or with one patient, there is no interval (None).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpc.metrics.resampling import Resamples
from mpc.metrics.scores import METRICS, Array, score

LEAST = 0.5
"""Share of the resamples that must have both outcomes."""
Values = NDArray[np.float64]


def intervals(
    probabilities: Array,
    labels: Array,
    known: Array,
    findings: Sequence[str],
    resamples: Resamples,
    level: float = 0.95,
    averaged: Sequence[str] | None = None,
) -> dict[str, Any]:
    """`score` with `auroc_interval`, `ap_interval` ([low, high] or None) and `resamples` in every row and the macro.

    Args:
        probabilities: float [N, K].
        labels: [N, K] in {0, 1}, read where `known`.
        known: bool [N, K].
        findings: K names.
        resamples: of the N images' patients.
        level: of confidence, in (0, 1).
        averaged: findings of the macro mean, each with both outcomes; None takes all that have them.

    Raises:
        ValueError: as `score`.
    """
    result = score(probabilities, labels, known, findings)
    macro = result["macro"]
    if averaged is not None:
        means = {name: [result["findings"][finding][name] for finding in averaged] for name in METRICS}
        macro.update({name: float(np.mean(values)) if values else None for name, values in means.items()})
        macro["findings_averaged"] = list(averaged)
    drawn = dict(zip(METRICS, resamples.scores(probabilities, labels, known, findings), strict=True))
    for k, row in enumerate(result["findings"].values()):
        row.update(_row({name: values[:, k] for name, values in drawn.items()}, resamples, level))
    places = [list(findings).index(name) for name in macro["findings_averaged"]]
    macro.update(_row({name: _macro(values, places) for name, values in drawn.items()}, resamples, level))
    return result


def compare(
    ours: Array,
    theirs: Array,
    labels: Array,
    known: Array,
    findings: Sequence[str],
    resamples: Resamples,
    level: float = 0.95,
) -> dict[str, Any]:
    """Two models on the same images: ours minus theirs, paired, for every finding and the macro mean.

    Both models are scored on the same resamples of patients, so that what makes a resample easy or hard cancels. A
    difference is certain at `level` where its interval excludes 0.

    Args:
        ours: probabilities [N, K] of one model.
        theirs: probabilities [N, K] of the other.
        labels: [N, K] in {0, 1}, read where `known`.
        known: bool [N, K].
        findings: K names.
        resamples: of the N images' patients.
        level: of confidence, in (0, 1).

    Returns:
        `{macro: {auroc, ap, auroc_interval, ap_interval, resamples, findings_averaged}, findings: {name: {...}}}`, all
        scores being differences; None where a finding lacks an outcome.

    Raises:
        ValueError: as `score`.
    """
    one, other = score(ours, labels, known, findings), score(theirs, labels, known, findings)
    drawn = {
        name: a - b
        for name, a, b in zip(
            METRICS,
            resamples.scores(ours, labels, known, findings),
            resamples.scores(theirs, labels, known, findings),
            strict=True,
        )
    }
    averaged = [list(findings).index(name) for name in one["macro"]["findings_averaged"]]
    macro = _row({name: _macro(values, averaged) for name, values in drawn.items()}, resamples, level)
    rows = {
        finding: {
            **_minus(one["findings"][finding], other["findings"][finding]),
            **_row({name: values[:, k] for name, values in drawn.items()}, resamples, level),
        }
        for k, finding in enumerate(findings)
    }
    return {
        "macro": {
            **_minus(one["macro"], other["macro"]),
            **macro,
            "findings_averaged": one["macro"]["findings_averaged"],
        },
        "findings": rows,
    }


def interval(values: Values, level: float = 0.95) -> list[float] | None:
    """The middle `level` of the resampled values [R], which may be NaN; None where fewer than LEAST of them are not."""
    present = values[np.isfinite(values)]
    if len(present) < max(1, LEAST * len(values)):
        return None
    return [float(bound) for bound in np.quantile(present, [(1 - level) / 2, (1 + level) / 2])]


def _row(drawn: dict[str, Values], resamples: Resamples, level: float) -> dict[str, Any]:
    """Intervals of one finding or of the mean; one patient alone has none."""
    found: dict[str, Any] = {
        f"{name}_interval": interval(values, level) if resamples.patients > 1 else None
        for name, values in drawn.items()
    }
    return {**found, "resamples": int(np.isfinite(drawn[METRICS[0]]).sum())}


def _macro(values: Values, averaged: Sequence[int]) -> Values:
    """Mean over the findings of the point estimate; NaN where a resample lacks an outcome of one."""
    return values[:, averaged].mean(1) if averaged else np.full(len(values), np.nan)


def _minus(one: dict[str, Any], other: dict[str, Any]) -> dict[str, float | None]:
    return {name: None if one[name] is None else one[name] - other[name] for name in METRICS}
