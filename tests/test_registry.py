"""Register, gate, promote, fetch and load, on a real MLflow database."""

import base64
import io
import json
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
import yaml
from factory import FINDINGS, SIZE, tiny_checkpoint
from mlflow.tracking import MlflowClient

from mpc.checkpoint import load_weights
from mpc.errors import MissingError, UserError
from pipeline.decode import decode
from pipeline.inference import load_model, pack, version_of
from tuning.gate import Candidate, Decision, Gate
from tuning.registry import RegisteredVersion, download, promote, register
from tuning.store import default_uri

GATE = Gate(metric="val_macro_auroc")


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
    return register(checkpoint, "served", store, metrics={"test_macro_auroc": 0.8})


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory; nothing may appear in it."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def png(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (40, 48), np.uint8)
    return bytes(cv2.imencode(".png", pixels)[1].tobytes())


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
    assert version.tags["metric.test_macro_auroc"] == "0.8"
    assert version.tags["data.digest"] == "0" * 64
    assert version.tags["findings"] == ",".join(FINDINGS)
    run = MlflowClient(tracking_uri=store).get_run(version.run_id)
    assert run.data.metrics["test_macro_auroc"] == 0.8
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


def test_only_a_better_version_becomes_champion(store: str, tmp_path: Path, elsewhere: Path) -> None:
    versions = []
    for seed, value in enumerate((0.70, 0.65, 0.80)):
        tiny_checkpoint(tmp_path / str(seed), seed=seed, metrics={"val_macro_auroc": value})
        versions.append(register(tmp_path / str(seed), "gated", store).version)
    decisions = [promote("gated", version, store, gate=GATE) for version in versions]
    assert [item.decision for item in decisions] == [Decision.ACCEPT, Decision.REFUSE, Decision.ACCEPT]
    assert "0.6500 against 0.7000 of champion 1" in decisions[1].reason
    client = MlflowClient(tracking_uri=store)
    assert str(client.get_model_version_by_alias("gated", "champion").version) == versions[2]
    assert client.get_model_version("gated", versions[1]).tags["gate.decision"] == "refuse"
    assert download("models:/gated@champion", store).joinpath("registered.txt").read_text() == "gated/3\n"
    assert promote("gated", versions[1], store).reason == "promoted without a gate"
    assert str(client.get_model_version_by_alias("gated", "champion").version) == versions[1]


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


def test_names_and_folders_that_do_not_register(store: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="one word"):
        register(tmp_path, "a/b", store)
    with pytest.raises(MissingError, match=r"checkpoint\.json"):
        register(tmp_path, "served", store)
    with pytest.raises(MissingError, match="no registered model"):
        promote("absent", 1, store, gate=GATE)


NEW = Candidate("2", {"val_macro_auroc": 0.7}, "d1")


@pytest.mark.parametrize(
    ("new", "champion", "decision"),
    [
        (NEW, None, Decision.ACCEPT),
        (NEW, Candidate("1", {"val_macro_auroc": 0.7}, "d1"), Decision.ACCEPT),
        (NEW, Candidate("1", {"val_macro_auroc": 0.71}, "d1"), Decision.REFUSE),
        (NEW, Candidate("1", {"val_macro_auroc": 0.6}, "d2"), Decision.REFUSE),
        (NEW, Candidate("1", {}, "d1"), Decision.REFUSE),
        (NEW, NEW, Decision.ACCEPT),
        (Candidate("2", {}, "d1"), None, Decision.REFUSE),
    ],
)
def test_the_gate(new: Candidate, champion: Candidate | None, decision: Decision) -> None:
    verdict = GATE.judge(new, champion)
    assert verdict.decision is decision
    assert verdict.reason


def test_a_tolerance_lets_a_little_less_through() -> None:
    champion = Candidate("1", {"val_macro_auroc": 0.71}, "d1")
    assert Gate(tolerance=0.02).judge(NEW, champion).decision is Decision.ACCEPT
