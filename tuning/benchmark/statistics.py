"""Means, paired differences and shares of a gap over replicates, with 95 % intervals (Student's t)."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats
from statsmodels.stats.multitest import multipletests

LEVEL = 0.95


class Estimate(NamedTuple):
    """A mean over replicates with its interval; one replicate has none."""

    mean: float
    low: float | None
    high: float | None
    n: int

    def excludes_zero(self) -> bool:
        """Whether the interval lies on one side of 0."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


class Comparison(NamedTuple):
    """A method minus a rival on the same replicates."""

    difference: Estimate
    p: float | None
    """Two-sided paired t-test; None below two replicates."""
    p_holm: float | None = None
    """Corrected over all rivals (Holm 1979), where the method is tested against all of them."""


def estimate(values: Sequence[float]) -> Estimate:
    """Mean of the replicates with its t-interval."""
    if len(values) < 2:
        return Estimate(float(np.mean(values)), None, None, len(values))
    interval = stats.ttest_1samp(values, 0.0).confidence_interval(LEVEL)
    return Estimate(float(np.mean(values)), float(interval.low), float(interval.high), len(values))


def compare(method: Mapping[int, float], rival: Mapping[int, float]) -> Comparison:
    """Paired over the replicates that both have; equal values on all of them have p = 1."""
    common = sorted(method.keys() & rival.keys())
    differences = np.array([method[seed] - rival[seed] for seed in common])
    if len(common) < 2 or np.ptp(differences) == 0:
        same = len(common) > 1 and not differences.any()
        return Comparison(Estimate(float(differences.mean()), None, None, len(common)), 1.0 if same else None)
    return Comparison(estimate(differences.tolist()), float(stats.ttest_1samp(differences, 0.0).pvalue))


def corrected(comparisons: Mapping[str, Comparison]) -> dict[str, Comparison]:
    """The same comparisons with p-values after Holm over all of them that have one."""
    names = [name for name, comparison in comparisons.items() if comparison.p is not None]
    if not names:
        return dict(comparisons)
    adjusted = multipletests([comparisons[name].p for name in names], method="holm")[1]
    holm = dict(zip(names, map(float, adjusted), strict=True))
    return {name: comparison._replace(p_holm=holm.get(name)) for name, comparison in comparisons.items()}


def gap_share(method: Mapping[int, float], lower: Mapping[int, float], upper: Mapping[int, float]) -> Estimate | None:
    """Share of the gap from `lower` to `upper` that `method` closes: 0 none of it, 1 all of it.

    A ratio of means over the replicates that all three have; its interval is the percentile bootstrap over replicates,
    given from five of them. None where the interval of the gap itself holds 0: a share of nothing means nothing.
    """
    common = sorted(method.keys() & lower.keys() & upper.keys())
    if len(common) < 2 or not estimate([upper[seed] - lower[seed] for seed in common]).excludes_zero():
        return None
    gain = np.array([method[seed] - lower[seed] for seed in common])
    gap = np.array([upper[seed] - lower[seed] for seed in common])
    share = float(gain.mean() / gap.mean())
    if len(common) < 5:
        return Estimate(share, None, None, len(common))
    interval = stats.bootstrap(
        (gain, gap),
        lambda a, b, axis: a.mean(axis) / b.mean(axis),
        paired=True,
        confidence_level=LEVEL,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return Estimate(share, float(interval.low), float(interval.high), len(common))
