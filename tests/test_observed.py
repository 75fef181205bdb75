"""The estimate from one positive an image: by hand, against scikit-learn, and where its assumption fails."""

from types import SimpleNamespace

import numpy as np
import pytest
from scipy.special import expit
from sklearn.metrics import roc_auc_score

from mpc.errors import UserError
from mpc.metrics import observed_score
from mpc.metrics.observed import hidden_share
from pipeline.config import DataConfig
from pipeline.scoring import Scored, require_validation, validation_metrics
from pipeline.single_positive import draw

NAMES = ("Mass", "Nodule")
# Mass: positives score .9 and .6, negatives .7 and .2, so that its AUROC is 3/4. Two of four positives show it, the
# other two, like every negative, show Nodule instead: a third of those who do not show it has it.
MASS = np.array([0.9, 0.6, 0.9, 0.6, 0.7, 0.2, 0.7, 0.2])
SHOWN = np.array([[1, 0]] * 2 + [[0, 1]] * 6)


def test_by_hand() -> None:
    p = np.stack([MASS, 1 - MASS], axis=1)
    # against hidden positives 2 of 4 pairs are won, against negatives 6 of 8
    assert observed_score(p, SHOWN, NAMES)["findings"]["Mass"]["auroc"] == pytest.approx(8 / 12)
    found = observed_score(p, SHOWN, NAMES, kappa=2.0)
    row = found["findings"]["Mass"]
    assert (row["n_pos"], row["n_neg"]) == (2, 6)
    assert row["hidden"] == pytest.approx(1 / 3), "half of the images have it, a quarter shows it"
    assert row["auroc"] == pytest.approx(3 / 4)
    assert found["macro"]["auroc"] == pytest.approx(np.mean([r["auroc"] for r in found["findings"].values()]))


def test_images_that_show_nothing_are_left_out() -> None:
    p = np.stack([MASS, MASS], axis=1)
    more = np.concatenate([p, np.full((5, 2), 0.95)])
    blank = np.concatenate([SHOWN, np.zeros((5, 2), int)])
    assert observed_score(more, blank, NAMES, kappa=1.5) == observed_score(p, SHOWN, NAMES, kappa=1.5)


def test_without_kappa_it_is_the_auroc_of_observed_entries_under_any_monotone_map() -> None:
    rng = np.random.default_rng(0)
    logits, shown = rng.normal(size=(300, 4)).round(1), np.eye(4, dtype=int)[rng.integers(0, 4, 300)]
    found = observed_score(logits, shown, list("abcd"))
    expected = [roc_auc_score(shown[:, k], logits[:, k]) for k in range(4)]
    assert [row["auroc"] for row in found["findings"].values()] == pytest.approx(expected, abs=1e-12)
    assert observed_score(np.tanh(logits / 9), shown, list("abcd")) == found


def test_the_shares_are_bounded() -> None:
    shown = np.eye(3, dtype=int)[[0, 0, 0, 0, 0, 0, 0, 0, 1, 2]]
    assert hidden_share(shown, 1.0) == pytest.approx([0, 0, 0])
    assert hidden_share(shown, 2.0) == pytest.approx([0.75, 1 / 9, 1 / 9]), "0.8 of the images show the first"
    assert hidden_share(np.ones((4, 1), int), 2.0) == pytest.approx([0])


def simulated(rng: np.random.Generator, chosen_by_score: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """20,000 images, logits, labels, and what is shown: any positive, or the one that scores highest."""
    labels = (rng.random((20_000, 5)) < np.array([0.5, 0.4, 0.3, 0.3, 0.2])).astype(int)
    labels = labels[labels.any(1)]
    logits = rng.normal(size=labels.shape) + labels
    choice = np.where(labels == 1, logits if chosen_by_score else rng.random(labels.shape), -np.inf)
    return logits, labels, np.eye(5, dtype=int)[choice.argmax(1)]


def test_it_is_the_true_score_where_its_assumption_holds_and_not_where_it_fails() -> None:
    rng = np.random.default_rng(1)
    logits, labels, shown = simulated(rng, chosen_by_score=False)
    truth = np.mean([roc_auc_score(labels[:, k], logits[:, k]) for k in range(5)])
    kappa = labels.sum(1).mean()
    raw, corrected = (observed_score(logits, shown, list("abcde"), kappa=k)["macro"]["auroc"] for k in (None, kappa))
    assert truth - raw > 0.05, "hidden positives pull towards one half"
    assert corrected == pytest.approx(truth, abs=0.015)
    logits, labels, shown = simulated(rng, chosen_by_score=True)
    conspicuous = observed_score(logits, shown, list("abcde"), kappa=kappa)["macro"]["auroc"]
    assert conspicuous > truth + 0.05, "a reader who names the most conspicuous finding flatters every model"


@pytest.mark.parametrize(
    ("shown", "kappa", "message"), [(SHOWN + SHOWN[::-1], None, "several"), (SHOWN, 0.5, "kappa 0.5")]
)
def test_what_it_is_not_for(shown: np.ndarray, kappa: float | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        observed_score(np.zeros((8, 2)), shown, NAMES, kappa=kappa)


def test_validation_needs_positives_alone() -> None:
    """What is not a known positive is never read: neither negatives nor which entries are known to be negative."""
    rng = np.random.default_rng(2)
    logits, labels, _ = simulated(rng, chosen_by_score=False)
    logits, labels = logits[:400].astype(np.float32), labels[:400].astype(np.int8)
    ids = np.array([f"image-{n}" for n in range(400)])
    data = DataConfig(val_labels="observed", val_kappa=2.0, draw_seed=3)
    findings = tuple("abcde")

    def metrics(known: np.ndarray, config: DataConfig = data) -> dict:
        return validation_metrics(Scored(np.arange(400), logits, labels, known, ids, ids), findings, config)[0]

    everything, positives = metrics(np.ones_like(labels, bool)), metrics(labels == 1)
    assert everything == positives
    shown = draw(ids.tolist(), labels, labels == 1, 3)
    expected = observed_score(expit(logits.astype(float)), shown, findings, kappa=2.0)["macro"]
    assert positives["val_macro_auroc"] == pytest.approx(expected["auroc"], abs=1e-12)
    assert positives["val_macro_auroc"] > metrics(labels == 1, DataConfig(val_labels="observed"))["val_macro_auroc"]


def test_a_data_set_that_knows_positives_alone_is_for_observed_validation() -> None:
    def card(**positives: int) -> SimpleNamespace:
        counts = SimpleNamespace(images=9, positives=positives, known=positives)
        return SimpleNamespace(name="ours", findings=NAMES, counts={"val": counts})

    require_validation(card(Mass=5, Nodule=4), "observed")
    with pytest.raises(UserError, match=r"data\.val_labels=observed"):
        require_validation(card(Mass=5, Nodule=4))
    with pytest.raises(UserError, match="fewer than two findings of ours occur"):
        require_validation(card(Mass=9), "observed")
