"""Resamples of patients: equal to scikit-learn on the same rows, by hand, paired, and honest about missing outcomes."""

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, roc_auc_score

from mpc.metrics import Resamples, compare, counts_at, intervals, rates, score
from mpc.metrics.intervals import interval

NAMES = ("a", "b", "c")


def drawn(images: int = 300, seed: int = 0, decimals: int | None = None):
    """Patients with several images, findings of unequal frequency, unknown entries, and probabilities that know some.

    With `decimals` most probabilities are shared by many images.
    """
    rng = np.random.default_rng(seed)
    patients = rng.integers(0, images // 3, images).astype(str)
    labels = (rng.random((images, 3)) < (0.5, 0.2, 0.03)).astype(int)
    probabilities = np.clip(rng.random((images, 3)) * 0.8 + 0.2 * labels, 0, 1)
    if decimals is not None:
        probabilities = probabilities.round(decimals)
    return patients, probabilities, labels, rng.random((images, 3)) < 0.8


def rows_of(resamples: Resamples, number: int) -> np.ndarray:
    """The images of one resample, each as often as its patient was drawn."""
    return np.repeat(np.arange(len(resamples.patient)), resamples.weights[number][resamples.patient].astype(int))


@pytest.mark.parametrize("decimals", [None, 2, 1, 0])
def test_every_resample_agrees_with_scikit_learn(decimals: int | None) -> None:
    patients, p, y, known = drawn(decimals=decimals)
    resamples = Resamples.draw(patients, 25, seed=3)
    auroc, ap = resamples.scores(p, y, known, NAMES)
    lacking = 0
    for number in range(25):
        rows = rows_of(resamples, number)
        for k in range(3):
            seen = rows[known[rows, k]]
            if not 0 < y[seen, k].sum() < len(seen):
                lacking += 1
                assert np.isnan(auroc[number, k])
                assert np.isnan(ap[number, k])
                continue
            assert auroc[number, k] == pytest.approx(roc_auc_score(y[seen, k], p[seen, k]), abs=1e-12)
            assert ap[number, k] == pytest.approx(average_precision_score(y[seen, k], p[seen, k]), abs=1e-12)
    assert lacking < 25


def test_a_resample_draws_whole_patients_as_often_as_there_are() -> None:
    resamples = Resamples.draw(["x", "y", "x", "z"], 500)
    assert resamples.patients == 3
    assert (resamples.weights.sum(1) == 3).all()
    assert {tuple(row) for row in resamples.weights.tolist()} == {
        (a, b, 3 - a - b) for a in range(4) for b in range(4 - a)
    }
    # each patient is drawn once on average; both images of x always go together
    assert resamples.weights.mean(0) == pytest.approx([1, 1, 1], abs=0.15)
    assert resamples.totals(np.array([1, 0, 1, 0])).tolist() == (2 * resamples.weights[:, 0]).tolist()


def test_the_seed_decides() -> None:
    patients, p, y, known = drawn()
    one, same, other = (
        intervals(p, y, known, NAMES, Resamples.draw(patients, 200, seed=seed))["macro"] for seed in (0, 0, 1)
    )
    assert one == same
    assert one["auroc_interval"] != other["auroc_interval"]
    assert one["auroc"] == other["auroc"]


def test_intervals_hold_the_scores_and_are_wider_with_more_confidence() -> None:
    patients, p, y, known = drawn(600)
    resamples = Resamples.draw(patients, 400)
    narrow, wide = (intervals(p, y, known, NAMES, resamples, level) for level in (0.5, 0.95))
    plain = score(p, y, known, NAMES)
    for name in NAMES:
        row = wide["findings"][name]
        assert {key: row[key] for key in plain["findings"][name]} == plain["findings"][name]
        for metric in ("auroc", "ap"):
            low, high = row[f"{metric}_interval"]
            inner = narrow["findings"][name][f"{metric}_interval"]
            assert low < inner[0] < row[metric] < inner[1] < high


def test_copies_of_an_image_do_not_narrow_the_interval() -> None:
    """Eight copies of each image, all of its patient: no more is known, and the interval stays exactly as wide."""
    patients, p, y, known = drawn(200)
    once = intervals(p, y, known, NAMES, Resamples.draw(patients, 300))
    copies = [np.repeat(values, 8, axis=0) for values in (patients, p, y, known)]
    again = intervals(*copies[1:], NAMES, Resamples.draw(copies[0], 300))
    assert again["macro"]["auroc_interval"] == pytest.approx(once["macro"]["auroc_interval"], abs=1e-12)
    images = intervals(*copies[1:], NAMES, Resamples.draw(np.arange(1600), 300))  # what ignoring patients would claim
    width, claimed = (np.ptp(found["macro"]["auroc_interval"]) for found in (again, images))
    assert claimed < 0.6 * width


def test_an_interval_by_hand() -> None:
    # two patients with a positive and a negative each: one ranked right, one wrong
    p = np.array([[0.9], [0.1], [0.1], [0.9]])
    y = np.array([[1], [0], [1], [0]])
    resamples = Resamples.draw(["x", "x", "y", "y"], 2000)
    auroc, _ = resamples.scores(p, y, y >= 0, ["a"])
    # x twice: 1; y twice: 0; both: (1 right, 1 wrong, 2 ties) 0.5
    assert sorted(set(auroc[:, 0].tolist())) == [0.0, 0.5, 1.0]
    assert np.mean(auroc == 0.5) == pytest.approx(0.5, abs=0.05)


def test_a_finding_without_both_outcomes_has_no_interval_and_enters_no_mean() -> None:
    patients, p, y, known = drawn()
    y[:, 1] = 0
    known[:, 2] = False
    found = intervals(p, y, known, NAMES, Resamples.draw(patients, 100))
    assert found["macro"]["findings_averaged"] == ["a"]
    assert found["macro"]["auroc_interval"] == found["findings"]["a"]["auroc_interval"]
    for name in ("b", "c"):
        row = found["findings"][name]
        assert (row["auroc"], row["auroc_interval"], row["ap_interval"], row["resamples"]) == (None, None, None, 0)


def test_a_mean_is_over_the_same_findings_in_every_resample() -> None:
    """One patient holds all positives of b: without him a resample has no macro, rather than one of fewer findings."""
    patients, p, y, known = drawn(90)
    known[:] = True
    y[:, 1] = (patients == "7").astype(int)
    y[0, 1] = y[0, 1] or 0
    assert 0 < y[:, 1].sum() < 90
    resamples = Resamples.draw(patients, 400)
    found = intervals(p, y, known, NAMES, resamples)
    number = int((resamples.weights[:, np.unique(patients).tolist().index("7")] > 0).sum())
    rare = found["findings"]["b"]["resamples"]
    assert rare == number
    assert found["macro"]["resamples"] <= rare < 400 == found["findings"]["a"]["resamples"]
    auroc, _ = resamples.scores(p, y, known, NAMES)
    whole = auroc[np.isfinite(auroc).all(1)].mean(1)
    assert found["macro"]["auroc_interval"] == pytest.approx(np.quantile(whole, [0.025, 0.975]).tolist(), abs=1e-12)


def test_too_few_resamples_or_patients_give_no_interval() -> None:
    values = np.full(100, np.nan)
    values[:49] = 0.5
    assert interval(values) is None
    values[49] = 0.5
    assert interval(values) == [0.5, 0.5]
    _, p, y, known = drawn(50)
    alone = intervals(p, y, known, NAMES, Resamples.draw(["x"] * 50, 100))
    assert alone["macro"]["auroc"] is not None
    assert alone["macro"]["auroc_interval"] is None


def test_a_difference_is_paired() -> None:
    """The same model is better by what it is better by, far more surely than two separate intervals would say."""
    patients, p, y, known = drawn(900, decimals=3)
    rival = p - 0.03 * y
    resamples = Resamples.draw(patients, 300)
    found = compare(p, rival, y, known, NAMES, resamples)
    ours, theirs = (intervals(values, y, known, NAMES, resamples) for values in (p, rival))
    for metric in ("auroc", "ap"):
        difference = ours["macro"][metric] - theirs["macro"][metric]
        low, high = found["macro"][f"{metric}_interval"]
        assert found["macro"][metric] == pytest.approx(difference, abs=1e-12)
        assert 0 < low < difference < high
        assert high - low < 0.5 * np.ptp(ours["macro"][f"{metric}_interval"])
    assert compare(p, p, y, known, NAMES, resamples)["macro"]["auroc_interval"] == [0.0, 0.0]
    back = compare(rival, p, y, known, NAMES, resamples)
    assert back["findings"]["a"]["auroc"] == pytest.approx(-found["findings"]["a"]["auroc"], abs=1e-12)


def test_a_difference_of_every_resample_agrees_with_scikit_learn() -> None:
    patients, p, y, known = drawn(120, decimals=1)
    rival = np.random.default_rng(5).random(p.shape).round(1)
    resamples = Resamples.draw(patients, 100)
    values = []
    for number in range(100):
        rows = rows_of(resamples, number)
        seen = rows[known[rows, 0]]
        values.append(roc_auc_score(y[seen, 0], p[seen, 0]) - roc_auc_score(y[seen, 0], rival[seen, 0]))
    found = compare(p, rival, y, known, NAMES, resamples)["findings"]["a"]["auroc_interval"]
    assert found == pytest.approx(np.quantile(values, [0.025, 0.975]).tolist(), abs=1e-12)


def test_chosen_findings_are_averaged() -> None:
    patients, p, y, known = drawn()
    found = intervals(p, y, known, NAMES, Resamples.draw(patients, 100), averaged=["b"])
    assert found["macro"]["auroc"] == found["findings"]["b"]["auroc"]
    assert found["macro"]["ap_interval"] == found["findings"]["b"]["ap_interval"]
    nothing = intervals(p, y, known, NAMES, Resamples.draw(patients, 100), averaged=[])["macro"]
    assert (nothing["auroc"], nothing["auroc_interval"], nothing["resamples"]) == (None, None, 0)


def test_rates_of_resamples_are_those_of_their_rows() -> None:
    patients, p, y, known = drawn()
    resamples = Resamples.draw(patients, 20)
    counts = counts_at(p, y, known, np.array([0.4, 0.5, np.nan]))
    totals = resamples.totals(counts)
    for number in range(20):
        rows = rows_of(resamples, number)
        assert (totals[number] == counts[rows].sum(0)).all()
    found = rates(totals)
    assert found["sensitivity"].shape == (20, 3)
    assert (found["sensitivity"][:, 2][np.isfinite(found["sensitivity"][:, 2])] == 0).all(), "NaN calls nothing"
