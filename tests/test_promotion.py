"""Who becomes champion: the gate on known values, then promotion and rollback on real images and a real database."""

from pathlib import Path
from typing import Any

import pytest
from factory import tiny_checkpoint
from mlflow.tracking import MlflowClient
from sklearn.metrics import roc_auc_score

from mpc.errors import UserError
from pipeline.card import read_card
from pipeline.config import EvaluateConfig
from pipeline.evaluate import evaluate
from pipeline.predictions import Predictions
from tuning.gate import Decision, Evidence, Gate
from tuning.promotion import promote, rollback
from tuning.registry import download, register

FEW = EvaluateConfig(resamples=100)
NO_MINIMUM = Gate(minimum=0.0)


def evidence(
    champion: str | None, difference: float = 0.0, bounds: list[float] | None = None, **findings: float | None
) -> Evidence:
    """Version 2 on a split of 90 patients; findings with their AUROC."""
    metrics: dict[str, Any] = {
        "split": "val",
        "n_images": 100,
        "n_patients": 90,
        "macro": {"auroc": 0.8, "ap": 0.4},
        "findings": {name: {"auroc": value} for name, value in (findings or {"Mass": 0.8}).items()},
        "finding_map": {"model_only": ["Hernia"]},
        "comparison": {"macro": {"auroc": difference, "auroc_interval": bounds, "ap": -0.1, "ap_interval": [-0.2, 0]}},
    }
    return Evidence("2", metrics, champion)


@pytest.mark.parametrize(
    ("gate", "seen", "decision", "reason"),
    [
        (Gate(), evidence(None), "accept", "the first champion: macro AUROC 0.8000 on val"),
        (Gate(), evidence("2"), "accept", "champion already"),
        (
            Gate(),
            evidence("1", 0.03, [0.01, 0.05]),
            "accept",
            "+0.0300 [+0.0100, +0.0500] against champion 1 on 100 images of val, 90 patients: higher",
        ),
        (Gate(), evidence("1", 0.0, [-0.009, 0.009]), "accept", "90 patients: not lower by 0.01"),
        (Gate(), evidence("1", 0.02, [-0.011, 0.05]), "refuse", "may be lower by more than gate.margin 0.01"),
        (Gate(margin=0.02), evidence("1", 0.02, [-0.011, 0.05]), "accept", "not lower by 0.02"),
        (Gate(), evidence("1", -0.005, [-0.009, -0.001]), "refuse", ": lower"),
        (Gate(metric="ap", margin=0.5), evidence("1", 0.0, [0, 0]), "accept", "average precision 0.4000, -0.1000"),
        (Gate(), evidence("1", 0.0, None), "refuse", "too few patients"),
        (Gate(), evidence(None, Mass=0.49, Edema=0.9), "refuse", "minimum: Mass 0.490 (at least 0.5)"),
        (Gate(minimums={"Mass": 0.4}), evidence(None, Mass=0.49, Edema=0.9), "accept", "first champion"),
        (Gate(minimums={"Edema": 0.95}), evidence(None, Mass=0.6, Edema=0.9), "refuse", "Edema 0.900"),
        (Gate(), evidence(None, Mass=0.6, Edema=None), "accept", "not judged, for want of both outcomes: Edema"),
        (Gate(), evidence(None, Mass=0.6), "accept", "0.8000 on val; not judged, absent from the data: Hernia"),
        (Gate(minimums={"Edema": 0.5}), evidence(None, Mass=0.6, Edema=None), "refuse", "cannot judge"),
        (Gate(minimums={"Hernia": 0.5}), evidence(None, Mass=0.6), "refuse", "Hernia"),
        (Gate(minimum=0.0), evidence("1", Mass=None), "refuse", "no finding has both outcomes"),
    ],
)
def test_the_gate(gate: Gate, seen: Evidence, decision: str, reason: str) -> None:
    verdict = gate.judge(seen)
    assert verdict.decision.value == decision
    assert reason in verdict.reason
    assert "\n" not in verdict.reason


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, phantom_data: str) -> str:
    """Three versions of `cxr`: the first two with equal weights, none of them trained."""
    folder = tmp_path_factory.mktemp("store")
    uri, card = f"sqlite:///{folder / 'mlflow.db'}", read_card(phantom_data)
    for number, seed in enumerate((0, 0, 1)):
        place = folder / str(number)
        tiny_checkpoint(place, seed=seed, findings=card.findings, digest=card.digest if number < 2 else "f" * 64)
        register(place, "cxr", uri)
    return uri


def aliases(store: str) -> dict[str, str]:
    return {k: str(v) for k, v in MlflowClient(tracking_uri=store).get_registered_model("cxr").aliases.items()}


def tags(store: str, version: int) -> dict[str, str]:
    return dict(MlflowClient(tracking_uri=store).get_model_version("cxr", str(version)).tags)


def macro_auroc(store: str, version: int, data: str, out: Path) -> float:
    """The same score by scikit-learn alone, over the findings that have one."""
    evaluate(download(f"models:/cxr/{version}", store), data, "val", out, config=FEW)
    found = Predictions.read(str(out / "predictions.parquet"))
    pairs = [(found.labels[:, k], found.logits[:, k]) for k in range(len(found.findings)) if found.labels[:, k].any()]
    return float(sum(roc_auc_score(*pair) for pair in pairs) / len(pairs))


def test_promotion_and_rollback(store: str, phantom_data: str, tmp_path: Path) -> None:
    def judged(version: int, gate: Gate = NO_MINIMUM) -> Any:
        return promote("cxr", version, store, gate=gate, data=phantom_data, config=FEW)

    with pytest.raises(UserError, match=r"add --data, or set gate\.kind=none"):
        promote("cxr", 1, store, gate=Gate())
    with pytest.raises(UserError, match="no champion before this one"):
        rollback("cxr", store)
    chance = judged(1, Gate())
    assert chance.decision is Decision.REFUSE, "an untrained network has findings below chance"
    assert tags(store, 1)["gate.reason"] == chance.reason
    assert aliases(store) == {}

    assert judged(1).reason.startswith("the first champion")
    equal = judged(2)
    assert "+0.0000 [+0.0000, +0.0000] against champion 1" in equal.reason
    assert aliases(store) == {"champion": "2", "previous": "1"}
    assert download("models:/cxr@champion", store).joinpath("registered.txt").read_text() == "cxr/2\n"
    assert tags(store, 2)["gate.decision"] == "accept"
    assert tags(store, 2)["gate.data_digest"] == read_card(phantom_data).digest

    other = judged(3)
    assert other.decision is Decision.REFUSE, "seventy patients do not show that another network is as good"
    assert aliases(store)["champion"] == "2"
    known = tags(store, 3)
    expected = macro_auroc(store, 3, phantom_data, tmp_path / "3") - macro_auroc(store, 2, phantom_data, tmp_path / "2")
    assert float(known["gate.difference"]) == pytest.approx(expected, abs=1e-9)
    low, high = (float(text) for text in known["gate.interval"].strip("[]").split(","))
    assert low < expected < high
    wide = judged(3, Gate(minimum=0.0, margin=0.9))
    assert wide.decision is (Decision.REFUSE if high < 0 else Decision.ACCEPT)
    assert promote("cxr", 3, store, gate=Gate(kind="none")).reason == "promoted without a gate"
    assert {key for key in tags(store, 3) if key.startswith("gate.")} == {"gate.decision", "gate.reason"}
    assert aliases(store) == {"champion": "3", "previous": "2"}

    assert rollback("cxr", store) == ("2", "3", ())
    assert aliases(store) == {"champion": "2", "previous": "1"}
    assert tags(store, 3)["champion.rollback"] == "rolled back from version 3 to version 2"
    assert rollback("cxr", store) == ("1", "2", ())
    assert aliases(store) == {"champion": "1"}
    with pytest.raises(UserError, match="no champion before this one"):
        rollback("cxr", store)


@pytest.fixture
def unscored(tmp_path: Path) -> str:
    """A new database with four versions of `cxr`."""
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    client = MlflowClient(tracking_uri=uri)
    client.create_registered_model("cxr")
    for _ in range(4):
        client.create_model_version("cxr", "somewhere")
    return uri


def crown(store: str, *versions: int) -> None:
    for version in versions:
        promote("cxr", version, store, gate=Gate(kind="none"))


def back(store: str) -> list[str]:
    """The champions that rolling back leads to, until there is none before."""
    found: list[str] = []
    while "previous" in aliases(store) and len(found) < 9:
        expected = aliases(store)["previous"]
        found.append(rollback("cxr", store).back)
        assert aliases(store)["champion"] == found[-1] == expected
    with pytest.raises(UserError, match="no champion before this one"):
        rollback("cxr", store)
    return found


@pytest.mark.parametrize(
    ("promoted", "path"),
    [
        ((1, 2, 1), ["2", "1"]),
        ((1, 2, 3, 2), ["3", "2", "1"]),
        ((1, 2, 2, 3), ["2", "1"]),
    ],
)
def test_rollback_goes_all_the_way_back_and_ends(unscored: str, promoted: tuple[int, ...], path: list[str]) -> None:
    crown(unscored, *promoted)
    assert back(unscored) == path


def test_what_is_promoted_after_a_rollback_goes_back_to_where_that_led(unscored: str) -> None:
    crown(unscored, 1, 2, 3)
    assert rollback("cxr", unscored) == ("2", "3", ())
    crown(unscored, 4)
    assert back(unscored) == ["2", "1"]


def test_rollback_passes_over_deleted_versions(unscored: str) -> None:
    crown(unscored, 1, 2, 3, 4)
    client = MlflowClient(tracking_uri=unscored)
    client.delete_model_version("cxr", "2")
    client.delete_model_version("cxr", "3")
    assert rollback("cxr", unscored) == ("1", "4", ("2", "3"))
    assert aliases(unscored) == {"champion": "1"}
    crown(unscored, 4)
    client.delete_model_version("cxr", "1")
    before = tags(unscored, 4)
    with pytest.raises(UserError, match="no champion before this one"):
        rollback("cxr", unscored)
    assert aliases(unscored) == {"champion": "4"}
    assert tags(unscored, 4) == before


def test_training_on_other_data_is_told(store: str, phantom_data: str) -> None:
    verdict = promote("cxr", 3, store, gate=Gate(minimum=0.0, margin=0.9), data=phantom_data, config=FEW)
    assert "trained on another data set: version 3" in verdict.reason


def test_a_champion_since_the_scoring_is_not_replaced_unseen(
    store: str, phantom_data: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    promote("cxr", 1, store, gate=Gate(kind="none"))

    def meanwhile(*arguments: Any, **options: Any) -> Any:
        MlflowClient(tracking_uri=store).set_registered_model_alias("cxr", "champion", "3")
        return evaluate(*arguments, **options)

    monkeypatch.setattr("tuning.promotion.evaluate", meanwhile)
    before = tags(store, 2)
    with pytest.raises(UserError, match="was version 1 when scoring began and is version 3 now"):
        promote("cxr", 2, store, gate=Gate(minimum=0.0, margin=0.9), data=phantom_data, config=FEW)
    assert aliases(store)["champion"] == "3"
    assert tags(store, 2) == before
