"""What metrics.json says beyond scores: intervals, thresholds, calibration, groups, rivals, maps of names, resuming."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from factory import FINDINGS, SIZE, tiny_checkpoint
from scipy.special import expit
from sklearn.metrics import average_precision_score, brier_score_loss, recall_score, roc_auc_score

from mpc.config import CalibrationInfo
from mpc.errors import MissingError, UserError
from mpc.metrics import RULES, Resamples, intervals
from pipeline.card import read_card
from pipeline.config import DataConfig, EvaluateConfig
from pipeline.evaluate import evaluate
from pipeline.inference import load_model
from pipeline.manifest import matrix
from pipeline.pairing import pair
from pipeline.predictions import Predictions
from pipeline.prepare_config import PhantomConfig, PrepareConfig, SplitConfig
from pipeline.scoring import score_rows, validation_metrics
from pipeline.shards import prepare

FEW = EvaluateConfig(resamples=100, min_group=5)
POINTS = dict.fromkeys(RULES, 0.5)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, ray_session: None) -> str:
    """Phantoms of both views and sexes; 60 % of the patients test."""
    out = str(tmp_path_factory.mktemp("data") / "phantom")
    config = PrepareConfig(
        findings=FINDINGS,
        image_size=SIZE,
        row_group=32,
        strata=("sex", "age_band"),
        split=SplitConfig(val=0.2, test=0.6),
        phantom=PhantomConfig(images=120),
    )
    prepare(config, None, out)
    return out


@pytest.fixture(scope="module")
def checkpoint(data: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "best"
    fit = CalibrationInfo(temperature=2.0, slope=0.5, shift=-1.0)
    tiny_checkpoint(
        folder,
        digest=read_card(data).digest,
        thresholds={"Mass": 0.5},
        operating_points={"Effusion": POINTS, "Mass": POINTS},
        calibration={"Effusion": fit, "Nodule": fit},
    )
    return folder


@pytest.fixture(scope="module")
def evaluation(data: str, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("evaluation")
    return out, evaluate(checkpoint, data, "test", out, config=FEW)


def test_intervals_are_those_of_the_predictions_by_patient(evaluation: tuple[Path, dict[str, Any]]) -> None:
    out, metrics = evaluation
    found = Predictions.read(str(out / "predictions.parquet"))
    assert metrics["n_patients"] == len(set(found.patient_id)) < metrics["n_images"]
    drawn = Resamples.draw(found.patient_id, 100, seed=0)
    again = intervals(found.probabilities, found.labels, found.known, FINDINGS, drawn)
    assert {name: metrics[name] for name in again} == again
    assert metrics["bootstrap"] == {"resamples": 100, "level": 0.95, "seed": 0, "unit": "patient"}


def test_thresholds_come_from_the_checkpoint(evaluation: tuple[Path, dict[str, Any]]) -> None:
    out, metrics = evaluation
    points = metrics["operating_points"]
    assert set(points["Effusion"]) == set(RULES)
    assert points["Nodule"] == {}, "validation chose none: nothing is invented"
    found = Predictions.read(str(out / "predictions.parquet"))
    row = points["Mass"]["youden"]
    truth, called = found.labels[:, 1], found.probabilities[:, 1] >= 0.5
    assert row["sensitivity"] == pytest.approx(recall_score(truth, called), abs=1e-12)
    assert row["tp"] + row["fn"] + row["fp"] + row["tn"] == len(truth)
    low, high = row["sensitivity_interval"]
    assert low <= row["sensitivity"] <= high


def test_calibration_is_measured_before_and_after(evaluation: tuple[Path, dict[str, Any]]) -> None:
    out, metrics = evaluation
    found = Predictions.read(str(out / "predictions.parquet"))
    rows = metrics["calibration"]["findings"]
    logits, truth = found.logits[:, 0].astype(float), found.labels[:, 0]
    for way, p in (
        ("raw", expit(logits)),
        ("temperature", expit(logits / 2)),
        ("platt", expit(0.5 * logits - 1)),
    ):
        assert rows["Effusion"][way]["brier"] == pytest.approx(brier_score_loss(truth, p), abs=1e-12)
        assert sum(rows["Effusion"][way]["reliability"]["n"]) == len(truth)
    assert metrics["calibration"]["not_calibrated"] == ["Mass"]
    assert "temperature" not in rows["Mass"]
    mean = np.mean([rows[name]["raw"]["ece"] for name in ("Effusion", "Nodule")])
    assert metrics["calibration"]["mean"]["raw"]["ece"] == pytest.approx(mean)


def test_groups_are_scored_over_the_same_findings(data: str, evaluation: tuple[Path, dict[str, Any]]) -> None:
    out, metrics = evaluation
    found = Predictions.read(str(out / "predictions.parquet"))
    groups = pq.read_table(out / "groups.parquet")
    assert groups["image_id"].to_pylist() == found.image_id
    assert set(metrics["groups"]) == {"view", "sex", "age_band"}
    for name, by in metrics["groups"].items():
        values = np.array(groups[name].to_pylist())
        sizes = {**by["scored"], **by["too_small"]}
        assert sum(row["n_images"] for row in sizes.values()) == len(found.image_id)
        for group, row in by["scored"].items():
            inside = values == group
            assert row["n_patients"] == len(set(np.array(found.patient_id)[inside])) >= 5
            assert row["macro"]["findings_averaged"] == by["findings_averaged"]
            for k, finding in enumerate(FINDINGS):
                truth, p = found.labels[inside, k], found.probabilities[inside, k]
                if 0 < truth.sum() < len(truth):
                    assert row["findings"][finding]["auroc"] == pytest.approx(roc_auc_score(truth, p), abs=1e-12)
                    assert row["findings"][finding]["ap"] == pytest.approx(average_precision_score(truth, p), abs=1e-12)
    assert list(metrics["groups"]["age_band"]["scored"]) == sorted(metrics["groups"]["age_band"]["scored"])


def test_groups_below_the_limit_are_listed(data: str, checkpoint: Path, tmp_path: Path) -> None:
    metrics = evaluate(checkpoint, data, "test", tmp_path, config=EvaluateConfig(resamples=100, min_group=1000))
    by = metrics["groups"]["view"]
    assert (by["scored"], by["findings_averaged"]) == ({}, [])
    assert sum(row["n_images"] for row in by["too_small"].values()) == metrics["n_images"]


def test_a_rival_is_compared_from_its_evaluation_or_its_checkpoint(
    data: str, checkpoint: Path, evaluation: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    other = tmp_path / "other"
    tiny_checkpoint(other, digest=read_card(data).digest, seed=9)
    scores = evaluate(other, data, "test", tmp_path / "scores", config=FEW)
    found = [
        evaluate(checkpoint, data, "test", tmp_path / str(n), config=FEW.model_copy(update={"compare": str(place)}))
        for n, place in enumerate((tmp_path / "scores", other))
    ]
    one, again = (dict(metrics["comparison"], rival="") for metrics in found)
    assert one == again
    difference = evaluation[1]["macro"]["auroc"] - scores["macro"]["auroc"]
    assert one["macro"]["auroc"] == pytest.approx(difference, abs=1e-12)
    assert one["rival_macro"]["auroc_interval"] == scores["macro"]["auroc_interval"]
    low, high = one["macro"]["auroc_interval"]
    assert low < difference < high
    with pytest.raises(UserError, match=r"compare=.*scored on other images"):
        evaluate(checkpoint, data, "val", tmp_path / "v", config=FEW, rival=str(tmp_path / "scores"))
    with pytest.raises(MissingError, match=r"neither predictions\.parquet nor a checkpoint"):
        evaluate(checkpoint, data, "test", tmp_path / "w", config=FEW, rival=str(tmp_path))


def test_another_collection_with_other_names(data: str, checkpoint: Path, tmp_path: Path) -> None:
    """A model that says Pleural Effusion and Hernia, on data that say Effusion, Mass and Nodule."""
    names = ("Hernia", "Nodule", "Pleural Effusion")
    tiny_checkpoint(
        tmp_path / "best", findings=names, digest="1" * 64, operating_points={"Pleural Effusion": {"youden": 0.4}}
    )
    config = FEW.model_copy(update={"finding_map": {"Pleural Effusion": "Effusion"}})
    metrics = evaluate(tmp_path / "best", data, "test", tmp_path / "out", config=config)
    assert metrics["finding_map"] == {
        "scored": {"Nodule": "Nodule", "Pleural Effusion": "Effusion"},
        "model_only": ["Hernia"],
        "data_only": ["Mass"],
    }
    assert list(metrics["findings"]) == ["Nodule", "Pleural Effusion"]
    assert metrics["operating_points"]["Pleural Effusion"]["youden"]["threshold"] == 0.4
    card, found = read_card(data), Predictions.read(str(tmp_path / "out" / "predictions.parquet"))
    loaded = load_model(tmp_path / "best")
    scored = score_rows(loaded.model, data, card, "test").gathered(card.rows("test"))
    assert scored is not None
    np.testing.assert_allclose(found.logits, scored.logits[:, [1, 2]])
    assert (found.labels == scored.labels[:, [2, 0]]).all()
    assert found.findings == ("Nodule", "Pleural Effusion")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (None, "differ in Effusion, Hernia"),
        ({"Edema": "Mass"}, "has no finding 'Edema'; it has Hernia, Mass"),
        ({"Hernia": "Edema"}, "has no finding 'Edema'; it has Effusion, Mass, Nodule"),
        ({"Hernia": "Mass"}, "'Mass' of .* stands for Hernia, Mass"),
    ],
)
def test_maps_that_cannot_hold_are_refused(
    data: str, tmp_path: Path, names: dict[str, str] | None, message: str
) -> None:
    info = tiny_checkpoint(tmp_path / "best", findings=("Hernia", "Mass"))
    with pytest.raises(UserError, match=message):
        pair(info, read_card(data), names, "the model", "the data")


def test_no_finding_in_common(data: str, tmp_path: Path) -> None:
    info = tiny_checkpoint(tmp_path / "best", findings=("Hernia", "Edema"))
    with pytest.raises(UserError, match="share no finding"):
        pair(info, read_card(data), {}, "the model", "the data")


def test_metrics_are_made_anew_without_the_weights(
    data: str, checkpoint: Path, evaluation: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    out, metrics = tmp_path / "out", evaluation[1]
    shutil.copytree(evaluation[0], out)
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(checkpoint / "checkpoint.json", bare)
    before = (out / "predictions.parquet").read_bytes()
    assert evaluate(bare, data, "test", out, config=FEW, resume=True) == metrics
    assert (out / "predictions.parquet").read_bytes() == before
    wider = evaluate(bare, data, "test", out, config=FEW.model_copy(update={"level": 0.99}), resume=True)
    assert wider["macro"]["auroc"] == metrics["macro"]["auroc"]
    assert np.ptp(wider["macro"]["auroc_interval"]) > np.ptp(metrics["macro"]["auroc_interval"])
    tiny_checkpoint(tmp_path / "other", digest=read_card(data).digest)
    for wrong, split in ((tmp_path / "other", "test"), (bare, "val")):
        with pytest.raises(UserError, match="scored with another checkpoint, split or data set"):
            evaluate(wrong, data, split, out, config=FEW, resume=True)


def test_files_of_others_are_refused(data: str, checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "predictions.parquet").write_bytes(b"no parquet")
    with pytest.raises(UserError, match="not a Parquet file"):
        evaluate(checkpoint, data, "test", tmp_path, config=FEW, resume=True)


def test_validation_chooses_for_later(data: str, checkpoint: Path) -> None:
    """Each rule a threshold, each finding a calibration; with one label an image nothing can be calibrated."""
    card = read_card(data)
    scored = score_rows(load_model(checkpoint).model, data, card, "val").gathered(card.rows("val"))
    assert scored is not None
    _, full = validation_metrics(scored, FINDINGS, DataConfig())
    _, observed = validation_metrics(scored, FINDINGS, DataConfig(val_labels="observed"))
    assert set(full.calibration) == set(full.operating_points) == set(full.thresholds)
    for choices in (full, observed):
        assert all(set(points) == set(RULES) for points in choices.operating_points.values())
        assert {name: points["youden"] for name, points in choices.operating_points.items()} == choices.thresholds
    assert observed.calibration == {}
    truth, p = scored.labels[:, 0], scored.probabilities[:, 0]
    assert recall_score(truth, p >= full.operating_points["Effusion"]["sensitivity_0.90"]) >= 0.9
    assert matrix(Predictions.of(scored, FINDINGS, {}).table()["labels"]).tolist() == scored.labels.tolist()
    assert json.dumps(full._asdict() | {"calibration": {}})
