"""Scores of probabilities against labels, their intervals by patient, thresholds and calibration; no file, no network.

`score` is the body of metrics.json; `intervals` and `compare` put bootstrap intervals on it; `operating_points` and
`calibrate` choose on validation what `counts_at` and `calibration_error` then measure elsewhere.
"""

from mpc.metrics.calibration import Calibration, calibrate, calibration, reliability
from mpc.metrics.intervals import compare, intervals
from mpc.metrics.observed import observed_score
from mpc.metrics.resampling import Resamples
from mpc.metrics.scores import score
from mpc.metrics.thresholds import RULES, counts_at, operating_points, rates

__all__ = [
    "RULES", "Calibration", "Resamples", "calibrate", "calibration", "compare", "counts_at", "intervals",
    "observed_score", "operating_points", "rates", "reliability", "score",
]  # fmt: skip
