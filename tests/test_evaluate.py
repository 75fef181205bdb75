"""Scoring: every row once, averaged weights, no dependence on the batch size, and data that do not fit."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from factory import FINDINGS, SIZE, tiny_checkpoint, tiny_data

from mpc.errors import UserError
from mpc.metrics import score
from pipeline.card import DatasetCard
from pipeline.evaluate import evaluate, load_model
from pipeline.inference import thresholds
from pipeline.manifest import matrix
from pipeline.spans import images_of
from pipeline.stream import scan


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, ray_session: None) -> tuple[str, DatasetCard]:
    out = tmp_path_factory.mktemp("data") / "phantom"
    return str(out), tiny_data(out)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "best"
    tiny_checkpoint(folder, thresholds={"Mass": 0.25})
    return folder


def test_files_are_those_of_the_contract(data: tuple[str, DatasetCard], checkpoint: Path, tmp_path: Path) -> None:
    uri, card = data
    metrics = evaluate(checkpoint, uri, "test", tmp_path)
    rows = card.rows("test")
    assert metrics == json.loads((tmp_path / "metrics.json").read_text())
    assert (metrics["schema_version"], metrics["split"], metrics["n_images"]) == (1, "test", len(rows))
    assert set(metrics["findings"]) == set(FINDINGS)
    assert metrics["data_digest"] == card.digest
    table = pq.read_table(tmp_path / "predictions.parquet")
    assert table.column_names == ["image_id", "patient_id", "logits", "probabilities", "labels", "known"]
    assert len(table) == len(rows)
    assert all(table.schema.field(name).type.list_size == 3 for name in table.column_names[2:])
    again = score(matrix(table["probabilities"]), matrix(table["labels"]), matrix(table["known"]), FINDINGS)
    assert again["macro"]["auroc"] == pytest.approx(metrics["macro"]["auroc"])


def test_rows_keep_their_order_and_come_once(data: tuple[str, DatasetCard], checkpoint: Path, tmp_path: Path) -> None:
    uri, card = data
    evaluate(checkpoint, uri, "test", tmp_path, batch_size=5)
    expected = [name for batch in scan(uri, card, "test") for name in batch["image_id"].to_pylist()]
    assert pq.read_table(tmp_path / "predictions.parquet")["image_id"].to_pylist() == expected
    assert len(set(expected)) == len(card.rows("test"))


def test_probabilities_do_not_depend_on_the_batch_size(
    data: tuple[str, DatasetCard], checkpoint: Path, tmp_path: Path
) -> None:
    found = []
    for batch_size in (1, 7, 64):
        evaluate(checkpoint, data[0], "test", tmp_path / str(batch_size), batch_size)
        found.append(matrix(pq.read_table(tmp_path / str(batch_size) / "predictions.parquet")["probabilities"]))
    np.testing.assert_allclose(found[1], found[0], atol=1e-5, rtol=0)
    np.testing.assert_allclose(found[2], found[0], atol=1e-5, rtol=0)


def test_the_averaged_weights_are_scored(data: tuple[str, DatasetCard], checkpoint: Path, tmp_path: Path) -> None:
    evaluate(checkpoint, data[0], "test", tmp_path)
    batch = next(iter(scan(*data, "test", 4)))
    loaded = load_model(checkpoint)
    assert not loaded.model.training
    logits = loaded.logits(images_of(batch["image"], SIZE))
    stored = matrix(pq.read_table(tmp_path / "predictions.parquet")["logits"])[: len(batch)]
    np.testing.assert_allclose(stored, logits, atol=1e-5)
    (checkpoint / "ema.safetensors").rename(checkpoint / "kept")
    try:
        raw = load_model(checkpoint).logits(images_of(batch["image"], SIZE))
    finally:
        (checkpoint / "kept").rename(checkpoint / "ema.safetensors")
    assert np.abs(raw - logits).max() > 1e-3
    assert logits.dtype == np.float32
    assert torch.is_grad_enabled()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"findings": ("Effusion", "Mass", "Hernia")}, "differ in Hernia, Nodule"),
        ({"findings": ("Mass", "Effusion", "Nodule")}, "order"),
        ({"size": 64}, "image size 64.*image size 32"),
        ({"reduce_to": 16}, "reduce_to 16.*reduce_to None"),
    ],
)
def test_data_that_do_not_fit_are_refused(
    data: tuple[str, DatasetCard], tmp_path: Path, change: dict[str, object], message: str
) -> None:
    tiny_checkpoint(tmp_path / "best", **change)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=message) as caught:
        evaluate(tmp_path / "best", data[0], "test", tmp_path / "out")
    assert data[0] in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_split_that_is_not_there(data: tuple[str, DatasetCard], checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no split 'holdout'; it has train, val, test"):
        evaluate(checkpoint, data[0], "holdout", tmp_path)


def test_thresholds_fall_back_to_one_half(tmp_path: Path) -> None:
    values, default = thresholds(tiny_checkpoint(tmp_path / "best", thresholds={"Mass": 0.25}))
    assert values.tolist() == [0.5, 0.25, 0.5]
    assert default == (True, False, True)
