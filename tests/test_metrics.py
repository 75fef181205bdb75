"""Scores by hand and against scikit-learn; findings without both outcomes; bad input."""

import json

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, roc_auc_score

from mpc.metrics import operating_points, score

NAMES = ("Mass", "Nodule")


def test_scores_by_hand() -> None:
    p = np.array([[0.9], [0.8], [0.7], [0.6]])
    y = np.array([[1], [0], [1], [0]])
    result = score(p, y, y >= 0, ["Mass"])
    # pairs ranked right: (.9 over .8, .6) and (.7 over .6) of 4; precision 1/1 and 2/3 at the two positives
    assert result["findings"]["Mass"] == {"n_pos": 2, "n_neg": 2, "auroc": 0.75, "ap": pytest.approx((1 + 2 / 3) / 2)}
    assert result["macro"] == {"auroc": 0.75, "ap": pytest.approx(5 / 6), "findings_averaged": ["Mass"]}


def test_scores_agree_with_sklearn_on_known_entries() -> None:
    rng = np.random.default_rng(0)
    p, y, known = rng.random((500, 6)).round(2), rng.integers(0, 2, (500, 6)), rng.random((500, 6)) < 0.7
    names = [f"f{k}" for k in range(6)]
    result = score(p, y, known, names)
    for k, name in enumerate(names):
        seen = known[:, k]
        row = result["findings"][name]
        assert row["auroc"] == pytest.approx(roc_auc_score(y[seen, k], p[seen, k]), abs=1e-12)
        assert row["ap"] == pytest.approx(average_precision_score(y[seen, k], p[seen, k]), abs=1e-12)
        assert row["n_pos"] + row["n_neg"] == seen.sum()
    mean = np.mean([row["auroc"] for row in result["findings"].values()])
    assert result["macro"]["auroc"] == pytest.approx(mean, abs=1e-12)


def test_labels_outside_known_are_never_read() -> None:
    p = np.array([[0.9, 0.1], [0.2, 0.3], [0.4, 0.9]])
    y = np.array([[1, 0], [0, -1], [0, 1]])
    known = np.array([[True, True], [True, False], [False, True]])
    flipped = np.where(known, y, 7)
    assert score(p, y, known, NAMES) == score(p, flipped, known, NAMES)


def test_findings_without_both_outcomes_are_left_out_and_named() -> None:
    p = np.array([[0.9, 0.5], [0.2, 0.3]])
    y = np.array([[1, 0], [0, 0]])
    result = score(p, y, y >= 0, NAMES)
    assert result["findings"]["Nodule"] == {"n_pos": 0, "n_neg": 2, "auroc": None, "ap": None}
    assert result["macro"] == {"auroc": 1.0, "ap": 1.0, "findings_averaged": ["Mass"]}
    nothing = score(p, y, np.zeros_like(y, bool), NAMES)
    assert nothing["macro"] == {"auroc": None, "ap": None, "findings_averaged": []}
    assert json.loads(json.dumps(nothing)) == nothing
    assert operating_points(p, y, y >= 0, NAMES)["Nodule"] is None


def test_youden_by_hand() -> None:
    p = np.array([[0.9], [0.8], [0.7], [0.6], [0.1]])
    y = np.array([[1], [1], [0], [1], [0]])
    # sensitivity + specificity - 1 at .8: 2/3 + 1 - 1; at .6: 1 + 1/2 - 1
    assert operating_points(p, y, y >= 0, ["Mass"]) == {"Mass": {"youden": 0.8}}


def test_youden_of_a_useless_or_inverted_score_is_finite() -> None:
    y = np.array([[1], [0], [1], [0]])
    for p in (np.full((4, 1), 0.5), 1.0 - y):
        point = operating_points(p, y, y >= 0, ["Mass"])["Mass"]
        assert point is not None
        assert np.isfinite(point["youden"])


@pytest.mark.parametrize(
    ("p", "y", "known", "message"),
    [
        (np.zeros((3, 2)), np.zeros((2, 2)), np.ones((3, 2), bool), r"labels \(2, 2\)"),
        (np.zeros((3, 3)), np.zeros((3, 3)), np.ones((3, 3), bool), r"\[N, 2\]"),
        (np.array([[0.5, np.nan]]), np.zeros((1, 2)), np.ones((1, 2), bool), "1 probabilities are not finite"),
        (np.zeros((1, 2)), np.array([[2, 0]]), np.ones((1, 2), bool), "neither 0 nor 1"),
    ],
)
def test_bad_input_is_refused(p: np.ndarray, y: np.ndarray, known: np.ndarray, message: str) -> None:
    for function in (score, operating_points):
        with pytest.raises(ValueError, match=message):
            function(p, y, known, NAMES)
