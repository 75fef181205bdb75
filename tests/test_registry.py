"""Register, fetch and load, on a real MLflow database."""

import base64
import io
import json
import shutil
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
import yaml
from factory import FINDINGS, SIZE, tiny_checkpoint
from mlflow.tracking import MlflowClient

from mpc.checkpoint import load_weights, read_info
from mpc.errors import MissingError, UserError
from pipeline.card import read_card
from pipeline.config import EvaluateConfig
from pipeline.decode import decode
from pipeline.evaluate import evaluate
from pipeline.inference import load_model, pack, version_of
from tuning.gate import Gate
from tuning.lineage import lineage_of
from tuning.model_card import LONGEST
from tuning.promotion import promote, rollback
from tuning.record import RunRecord, Status
from tuning.registry import RegisteredVersion, download, register
from tuning.store import default_uri
from tuning.tracking import Tracker


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A database for the tests of this file."""
    return f"sqlite:///{tmp_path_factory.mktemp('store') / 'mlflow.db'}"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "best"
    tiny_checkpoint(folder, thresholds={"Mass": 0.25})
    return folder


@pytest.fixture(scope="module")
def registered(store: str, checkpoint: Path) -> RegisteredVersion:
    return register(checkpoint, "served", store)


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory; nothing may appear in it."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def png(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (40, 48), np.uint8)
    return bytes(cv2.imencode(".png", pixels)[1].tobytes())


def configured(checkpoint: Path, out: Path, **sections: dict[str, object]) -> None:
    """A copy of a checkpoint as if it had been trained with other settings."""
    shutil.copytree(checkpoint, out)
    info = json.loads((out / "checkpoint.json").read_text())
    for section, values in sections.items():
        info["config"][section] |= values
    (out / "checkpoint.json").write_text(json.dumps(info))


def described(store: str, version: RegisteredVersion) -> str:
    """What MLflow shows beside a version: its card."""
    return str(MlflowClient(tracking_uri=store).get_model_version(version.name, version.version).description)


def test_mlflow_loads_it_without_pickle(
    store: str, registered: RegisteredVersion, checkpoint: Path, elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    import mlflow
    from mlflow.pyfunc import load_model as load_served
    from mlflow.pyfunc.scoring_server import predictions_to_json

    mlflow.set_tracking_uri(store)
    try:
        served = load_served(registered.uri)
    finally:
        mlflow.set_tracking_uri(None)
    images = [base64.b64encode(png(seed)).decode() for seed in range(3)]
    found = served.predict(
        pd.DataFrame({"image": [images[0], "?", images[1], base64.b64encode(b"x").decode(), *images]})
    )
    assert list(found.columns) == [*FINDINGS, "positive", "flags", "error"]
    expected = load_model(checkpoint).probabilities(np.stack([decode(png(seed), "", SIZE, "pad") for seed in range(3)]))
    np.testing.assert_allclose(found.loc[[0, 2, 6], list(FINDINGS)].astype(float), expected, atol=1e-5)
    assert found["error"].tolist()[1] == "not base64 of a file's bytes"
    assert found["error"].tolist()[3].startswith("unsupported")
    assert found["positive"][0] == ";".join(
        name for name, p, t in zip(FINDINGS, expected[0], (0.5, 0.25, 0.5), strict=True) if p >= t
    )
    text = io.StringIO()
    predictions_to_json(found, text)
    rows = json.loads(text.getvalue(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))["predictions"]
    assert rows[1][FINDINGS[0]] is None
    assert not list(elsewhere.iterdir())


def test_the_package_holds_no_pickle_and_no_place(store: str, registered: RegisteredVersion, checkpoint: Path) -> None:
    client = MlflowClient(tracking_uri=store)
    folder = Path(client.get_model_version_download_uri(registered.name, registered.version))
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert {"MLmodel", "served_model.py", "artifacts/model.safetensors", "artifacts/checkpoint.json"} <= names
    assert not [name for name in names if name.endswith((".pkl", ".pickle", ".pt", ".pth"))]
    assert [name for name in names if name.startswith("code/mpc_cxr-") and name.endswith(".whl")]
    content = (folder / "MLmodel").read_text()
    assert str(checkpoint) not in content
    assert "/" not in yaml.safe_load(content)["flavors"]["python_function"]["model_code_path"]
    assert (folder / "requirements.txt").read_text().splitlines()[-1].startswith("code/mpc_cxr-")
    assert json.loads(yaml.safe_load(content)["signature"]["inputs"])[0]["name"] == "image"


def test_a_version_carries_metrics_and_origin(store: str, registered: RegisteredVersion) -> None:
    version = MlflowClient(tracking_uri=store).get_model_version(registered.name, registered.version)
    assert registered.uri == f"models:/served/{registered.version}"
    assert version.tags["metric.val_macro_auroc"] == "0.75"
    assert version.tags["data.digest"] == "0" * 64
    assert version.tags["findings"] == ",".join(FINDINGS)
    run = MlflowClient(tracking_uri=store).get_run(version.run_id)
    assert run.data.metrics["val_macro_auroc"] == 0.75
    (output,) = run.outputs.model_outputs
    model = MlflowClient(tracking_uri=store).get_logged_model(output.model_id)
    assert (model.name, model.source_run_id) == ("served", version.run_id)
    assert model.artifact_location == version.source
    assert run.info.status == "FINISHED"


def test_a_downloaded_version_is_a_checkpoint(
    store: str, registered: RegisteredVersion, checkpoint: Path, elsewhere: Path
) -> None:
    folder = download(registered.uri, store)
    images = np.random.default_rng(0).integers(0, 256, (2, SIZE, SIZE), np.uint8)
    loaded = load_model(folder)
    np.testing.assert_array_equal(loaded.logits(images), load_model(checkpoint).logits(images))
    weights, average = load_weights(folder, "model"), load_weights(checkpoint, "ema")
    assert all(weights[name].equal(average[name]) for name in average)
    assert version_of(folder, loaded.info, pack(folder)) == f"served/{registered.version}"
    assert not list(elsewhere.iterdir())


def test_the_card_shows_scores_with_intervals_and_what_they_do_not_cover(
    phantom_data: str, tmp_path: Path, store: str
) -> None:
    card = read_card(phantom_data)
    tiny_checkpoint(tmp_path / "best", findings=card.findings, digest=card.digest)
    evaluation = evaluate(tmp_path / "best", phantom_data, "test", tmp_path, config=EvaluateConfig(resamples=100))
    version = register(tmp_path / "best", "carded", store, evaluation=evaluation, data=card)
    found = MlflowClient(tracking_uri=store).get_model_version("carded", version.version)
    package = Path(MlflowClient(tracking_uri=store).get_model_version_download_uri("carded", version.version))
    text = (package / "model_card.md").read_text()
    macro = evaluation["macro"]
    low, high = macro["auroc_interval"]
    assert f"| AUROC | {macro['auroc']:.3f} | {low:.3f} to {high:.3f} |" in text
    assert found.tags["metric.test_macro_auroc_low"] == repr(low)
    assert found.tags["metric.test_macro_auroc"] == repr(macro["auroc"])
    for finding, row in evaluation["findings"].items():
        assert f"| {finding} | {row['n_pos']} | {row['n_neg']} |" in text
    assert "Trained on synthetic images" in text
    assert "patients. **The images are synthetic: these scores say nothing of real radiographs.**\n" in text
    assert "Training saw one positive label an image; every other entry counts as unlabelled, not as absent.\n" in text
    assert f"| train | {card.counts['train'].images} | {card.counts['train'].patients} |" in text
    assert f"Not calibrated, so that a probability orders images and means no frequency: {card.findings[0]}" in text
    for title in ("Intended use", "Method", "Data", "Metrics", "Limits", "Origin", "Every finding"):
        assert f"\n## {title}\n" in text
    assert text.startswith(found.description.partition("\n\nThe whole card")[0])
    assert len(found.description) <= LONGEST
    assert str(tmp_path) not in text
    assert phantom_data not in text


def test_without_images_the_card_says_so(store: str, registered: RegisteredVersion) -> None:
    text = MlflowClient(tracking_uri=store).get_model_version("served", registered.version).description
    assert "without intervals" in text
    assert "| val_macro_auroc | 0.750 |" in text
    assert "not at hand" in text
    assert "not for decisions about patients. Whether the training images are synthetic is not recorded.\n" in text


@pytest.mark.parametrize(
    ("synthetic", "head"),
    [
        (
            "true",
            "**Trained on synthetic images: it knows nothing of real radiographs.** For research on methods only.",
        ),
        ("false", "For research only: not a medical device, not for decisions about patients."),
    ],
)
def test_the_card_tells_what_training_saw(
    checkpoint: Path, tmp_path: Path, store: str, synthetic: str, head: str
) -> None:
    configured(checkpoint, tmp_path / "best", train={"method": "full"})
    record = RunRecord(key="r", name="r", experiment="e", tags={"data.name": "c", "data.synthetic": synthetic})
    (tmp_path / "tracking.json").write_text(record.model_dump_json())
    place = tmp_path / "best"
    text = described(store, register(place, "upper", store, lineage=lineage_of(str(place))))
    assert f"\n\n{head}\n\n## Intended use\n" in text
    assert "Training saw every known label (an upper bound, not a method for single positives).\n" in text


def test_the_card_names_no_place(checkpoint: Path, tmp_path: Path, store: str) -> None:
    configured(checkpoint, tmp_path / "best", model={"weights": "s3://secret-bucket/at/vit.safetensors"})
    text = described(store, register(tmp_path / "best", "placed", store))
    assert "| model.weights | vit.safetensors |" in text
    assert "secret-bucket" not in text


def test_a_version_belongs_to_the_run_and_the_search_that_made_it(checkpoint: Path, tmp_path: Path, store: str) -> None:
    """`search/best` is the best trial's checkpoint: its records lie as a search leaves them."""
    out = tmp_path / "search"
    records = [RunRecord(key="s", name="search", experiment="e", status=Status.FINISHED)]
    records.append(RunRecord(key="s/t1", name="t1", experiment="e", parent="s", tags={"data.name": "collection-7"}))
    tracker = Tracker(store, "e")
    runs = [tracker.start_run(record) for record in records]
    tracker.close()
    for place, record in zip((out, out / "trials" / "t1"), records, strict=True):
        shutil.copytree(checkpoint, place / "best")
        (place / "tracking.json").write_text(record.model_dump_json())
    (out / "search.json").write_text(json.dumps({"best": "t1"}))
    client = MlflowClient(tracking_uri=store)
    for place in (out / "best", out / "trials" / "t1" / "best"):
        version = client.get_model_version("m", register(place, "m", store, lineage=lineage_of(str(place))).version)
        assert version.run_id == version.tags["lineage.run_id"] == runs[1].run_id
        assert version.tags["lineage.search_id"] == runs[0].run_id
        assert version.tags["lineage.search_key"] == "s"
        assert version.tags["data.digest"] == read_info(place).data_digest
        assert "| data set | collection-7 |" in version.description
        assert "| search | search |" in version.description
    assert len(client.get_run(str(runs[1].run_id)).outputs.model_outputs) == 2
    (out / "trials" / "t1" / "tracking.json").write_text(
        records[1].model_copy(update={"key": "s/t2"}).model_dump_json()
    )
    version = register(out / "best", "m", store, lineage=lineage_of(str(out / "best")))
    found = client.get_model_version("m", version.version)
    assert found.tags["lineage.run_key"] == "s/t2", "its run is not on this server, its name is"
    assert "lineage.run_id" not in found.tags


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("models:/absent/1", "no registered model 'absent'; there are: .*served"),
        ("models:/served/99", "no such version; served has 1"),
        ("models:/served@champion", "no such alias; served has none"),
    ],
)
def test_what_is_not_there_is_named_with_what_is(
    store: str, registered: RegisteredVersion, uri: str, message: str
) -> None:
    with pytest.raises(MissingError, match=message):
        download(uri, store)


@pytest.mark.parametrize("uri", ["models:/m-123456", "models:/served", "runs:/1/model", "served@champion"])
def test_other_addresses_are_refused(uri: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="models:/NAME@champion"):
        download(uri, default_uri(str(tmp_path)))


def test_looking_something_up_makes_no_database(elsewhere: Path) -> None:
    store = default_uri(str(elsewhere / "out"))
    for look in (
        lambda: download("models:/m@champion", store),
        lambda: promote("m", 1, store, gate=Gate(kind="none")),
        lambda: rollback("m", store),
    ):
        with pytest.raises(MissingError, match=r"no MLflow store at sqlite:///.*out/mlflow\.db; name it with --set"):
            look()
    assert not list(elsewhere.iterdir()), "an --out that holds a database is no longer free"


def test_a_database_that_does_not_answer_is_one_line(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").write_text("a file that is no database")
    store = f"sqlite:///{tmp_path}/mlflow.db"
    for use in (
        lambda: register(checkpoint, "m", store),
        lambda: download("models:/m@champion", store),
        lambda: promote("m", 1, store, gate=Gate()),
        lambda: rollback("m", store),
    ):
        with pytest.raises(UserError, match=r"^MLflow at sqlite:.*: file is not a database; check the address") as told:
            use()
        assert "\n" not in str(told.value)


def test_a_registry_of_many_models_knows_each_of_them(tmp_path: Path, checkpoint: Path) -> None:
    store = f"sqlite:///{tmp_path}/many.db"
    client = MlflowClient(tracking_uri=store)
    for number in range(101):  # MLflow lists a hundred at a time
        client.create_registered_model(f"model-{number:03d}")
    version = register(checkpoint, "model-of-mine", store)
    assert (download(version.uri, store) / "model.safetensors").exists()


def test_names_and_folders_that_do_not_register(store: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="one word"):
        register(tmp_path, "a/b", store)
    with pytest.raises(MissingError, match=r"checkpoint\.json"):
        register(tmp_path, "served", store)
    with pytest.raises(MissingError, match="no registered model"):
        promote("absent", 1, store, gate=Gate())
