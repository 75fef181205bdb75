"""A real MLflow server over HTTP: away at first, then there; runs, registry and the served model through it."""

import base64
import json
import urllib.request
from pathlib import Path

import pytest
from conftest import free_port
from factory import FINDINGS, tiny_checkpoint
from mlflow.tracking import MlflowClient
from servers import mlflow_running

from pipeline.inference import load_model
from tuning.gate import Decision, Gate
from tuning.package import input_example
from tuning.record import RunRecord, Status
from tuning.registry import download, promote, register
from tuning.tracking import Tracker

pytestmark = pytest.mark.slow


def test_a_server_that_comes_back_holds_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    uri = f"http://127.0.0.1:{free_port()}"
    tracker = Tracker(uri, "test", pause=0.0)
    run = tracker.start_run(RunRecord(key="one", name="one", experiment="test"))
    tracker.log_epoch(run, {"loss": 1.0}, 1)
    assert tracker.run_id(run) is None
    arguments = ["server", "--host", "127.0.0.1", "--port", uri.rpartition(":")[2], "--workers", "1"]
    arguments += ["--backend-store-uri", f"sqlite:///{tmp_path}/db", "--artifacts-destination", f"{tmp_path}/kept"]
    tiny_checkpoint(tmp_path / "best", thresholds={"Mass": 0.25})
    with mlflow_running(arguments, f"{uri}/health", tmp_path):
        tracker.log_epoch(run, {"loss": 0.5}, 2)
        tracker.log_config(run, {"loss": {"sup": "an"}})
        tracker.end_run(run, Status.FINISHED)
        run_id = tracker.run_id(run)
        assert run_id is not None
        assert tracker.close() == 0
        client = MlflowClient(tracking_uri=uri)
        assert [item.value for item in client.get_metric_history(run_id, "loss")] == [1.0, 0.5]
        assert [item.path for item in client.list_artifacts(run_id)] == ["config.yaml"]
        version = register(tmp_path / "best", "cxr", uri, run_id=run_id)
        assert promote("cxr", version.version, uri, gate=Gate()).decision is Decision.ACCEPT
        folder = download("models:/cxr@champion", uri)
        assert client.get_run(run_id).info.status == "FINISHED"
    assert load_model(folder).info.findings == FINDINGS


def test_mlflow_serves_a_registered_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = f"sqlite:///{tmp_path / 'mlflow.db'}"
    tiny_checkpoint(tmp_path / "best")
    version = register(tmp_path / "best", "cxr", store)
    address = f"http://127.0.0.1:{free_port()}"
    arguments = ["models", "serve", "-m", version.uri, "--env-manager", "local", "-h", "127.0.0.1"]
    arguments += ["-p", address.rpartition(":")[2]]
    secure = {"MLFLOW_TRACKING_URI": store, "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false"}
    image = input_example()["image"][0]
    with mlflow_running(arguments, f"{address}/health", tmp_path, **secure):
        body = {"dataframe_records": [{"image": image}, {"image": base64.b64encode(b"x").decode()}]}
        request = urllib.request.Request(
            f"{address}/invocations", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=30) as reply:
            good, bad = json.loads(reply.read(), parse_constant=pytest.fail)["predictions"]
    assert all(0 < good[name] < 1 for name in FINDINGS)
    assert good["flags"] == "input_unchecked;default_threshold;uncalibrated"
    assert bad["error"].startswith("unsupported")
    assert bad[FINDINGS[0]] is None
