"""Thresholds by rule, calibration error and its repair: by hand, against scikit-learn, and at the edges."""

import numpy as np
import pytest
from scipy.special import expit, logit
from sklearn.calibration import calibration_curve
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import brier_score_loss, f1_score, precision_score, recall_score

from mpc.metrics import RULES, Calibration, calibrate, calibration, counts_at, operating_points, rates, reliability

ONE = ("Mass",)


def column(*values: float) -> np.ndarray:
    return np.array(values)[:, None]


def test_thresholds_by_hand() -> None:
    p, y = column(0.9, 0.8, 0.7, 0.6, 0.5, 0.1), column(1, 1, 0, 1, 0, 0)
    point = operating_points(p, y, y >= 0, ONE, RULES)["Mass"]
    assert point is not None
    # F1 at .8: 4/5, at .6: 6/7; sensitivity at .8: 2/3, at .6: 1
    assert (point["youden"], point["max_f1"]) == (0.8, 0.6)
    assert {point[f"sensitivity_{level}"] for level in ("0.80", "0.90", "0.95", "0.98")} == {0.6}


def test_rules_reach_what_they_promise() -> None:
    rng = np.random.default_rng(0)
    y = (rng.random((1000, 1)) < 0.2).astype(int)
    p = expit(rng.normal(size=(1000, 1)) + 1.5 * y - 2).round(2)
    point = operating_points(p, y, y >= 0, ONE, RULES)["Mass"]
    assert point is not None
    for rule, threshold in point.items():
        called = (p >= threshold).ravel()
        tighter = (p > threshold).ravel()
        if rule.startswith("sensitivity"):
            level = float(rule.partition("_")[2])
            assert recall_score(y, called) >= level > recall_score(y, tighter)
    best = max(f1_score(y, p >= t) for t in np.unique(p))
    assert f1_score(y, p >= point["max_f1"]) == pytest.approx(best, abs=1e-12)


def test_a_sensitivity_that_is_met_exactly_is_met() -> None:
    """9 of 10 positives: 0.9 as a share of floats may fall below 0.9."""
    p, y = column(*np.linspace(0.95, 0.05, 20)), column(*[1, 0] * 10)
    point = operating_points(p, y, y >= 0, ONE, ["sensitivity_0.90"])["Mass"]
    assert point is not None
    assert ((p >= point["sensitivity_0.90"]) & (y == 1)).sum() == 9


def test_rates_agree_with_scikit_learn() -> None:
    rng = np.random.default_rng(1)
    p, y, known = rng.random((400, 2)).round(1), rng.integers(0, 2, (400, 2)), rng.random((400, 2)) < 0.7
    limits = np.array([0.5, 0.3])
    found = rates(counts_at(p, y, known, limits).sum(0))
    for k in range(2):
        truth, called = y[known[:, k], k], p[known[:, k], k] >= limits[k]
        assert found["sensitivity"][k] == pytest.approx(recall_score(truth, called), abs=1e-12)
        assert found["specificity"][k] == pytest.approx(recall_score(truth, called, pos_label=0), abs=1e-12)
        assert found["precision"][k] == pytest.approx(precision_score(truth, called), abs=1e-12)
        assert found["f1"][k] == pytest.approx(f1_score(truth, called), abs=1e-12)


@pytest.mark.parametrize("decimals", [8, 1])
def test_reliability_and_brier_agree_with_scikit_learn(decimals: int) -> None:
    rng = np.random.default_rng(2)
    p = (rng.random(500) ** 3).round(decimals)
    y = (rng.random(500) < p).astype(int)
    curve = reliability(p, y, 10)
    observed, predicted = calibration_curve(y, p, n_bins=10, strategy="quantile")
    assert curve["observed"] == pytest.approx(observed.tolist(), abs=1e-12)
    assert curve["predicted"] == pytest.approx(predicted.tolist(), abs=1e-12)
    assert sum(curve["n"]) == 500
    found = calibration(p, y, 10)
    assert found["brier"] == pytest.approx(brier_score_loss(y, p), abs=1e-12)
    weights = np.array(curve["n"]) / 500
    assert found["ece"] == pytest.approx((weights * np.abs(observed - predicted)).sum(), abs=1e-12)


def test_calibration_error_by_hand() -> None:
    # two bins of two: |.2 - .5| and |.8 - 1|
    found = calibration(np.array([0.1, 0.3, 0.7, 0.9]), np.array([0, 1, 1, 1]), bins=2)
    assert found["ece"] == pytest.approx(0.25)
    assert found["brier"] == pytest.approx((0.01 + 0.49 + 0.09 + 0.01) / 4)


def test_fits_agree_with_scikit_learn() -> None:
    rng = np.random.default_rng(3)
    s = rng.normal(size=(3000, 1)) * 2
    y = (rng.random((3000, 1)) < expit(0.7 * s + 1.2)).astype(int)
    found = calibrate(s, y, y >= 0, ONE)["Mass"]
    options = {"C": np.inf, "tol": 1e-10, "max_iter": 1000}
    platt = LogisticRegression(**options).fit(s, y.ravel())
    slope = LogisticRegression(fit_intercept=False, **options).fit(s, y.ravel())
    assert found.slope == pytest.approx(platt.coef_.item(), abs=1e-5)
    assert found.shift == pytest.approx(platt.intercept_.item(), abs=1e-5)
    assert 1 / found.temperature == pytest.approx(slope.coef_.item(), abs=1e-5)


def test_what_training_on_one_positive_does_is_mended_by_a_shift_alone() -> None:
    """AN lowers every probability: a temperature cannot raise 0.2 above one half, Platt's shift can."""
    rng = np.random.default_rng(4)
    truth = rng.random(4000) * 0.98 + 0.01
    y = (rng.random(4000) < truth).astype(int)
    s = logit(truth / 2.5)
    fit = calibrate(s[:, None], y[:, None], y[:, None] >= 0, ONE)["Mass"]
    errors = {way: calibration(fit.apply(s, way), y)["ece"] for way in ("raw", "temperature", "platt")}
    assert errors["raw"] > 0.25
    assert errors["platt"] < 0.5 * errors["temperature"] < errors["raw"]
    assert (np.argsort(fit.apply(s, "platt")) == np.argsort(s)).all()


def test_fits_stay_finite_where_validation_separates_or_is_upside_down() -> None:
    s = column(-3, -2, -1, 1, 2, 3)
    for y in (s > 0, s < 0):
        fit = calibrate(s, y.astype(int), s > -9, ONE)["Mass"]
        assert np.isfinite(fit).all()
        assert fit.slope > 0
        assert fit.temperature > 0
    assert calibrate(s, np.zeros((6, 1), int), s > -9, ONE) == {}


def test_a_temperature_keeps_one_half() -> None:
    fit = Calibration(temperature=2.0, slope=3.0, shift=-1.0)
    assert fit.apply(np.array([0.0, 2.0]), "temperature").tolist() == [0.5, expit(1.0)]
    assert fit.apply(np.array([0.0]), "platt").tolist() == [expit(-1.0)]
    assert fit.apply(np.array([0.7]), "raw").tolist() == [expit(0.7)]
