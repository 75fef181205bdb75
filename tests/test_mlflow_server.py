"""A real MLflow server over HTTP, artifacts on S3: killed and back again; runs, registry, the served model; leaks."""

import base64
import json
import os
import signal
import subprocess
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import yaml
from conftest import ACCESS_KEY, SECRET_KEY, free_port, s3_client
from factory import FINDINGS, tiny_checkpoint
from logged import column, leaks
from mlflow.artifacts import download_artifacts
from mlflow.tracking import MlflowClient
from runs import tiny
from servers import mlflow_running

from infra.registering import promote, register
from infra.settings import load
from pipeline.card import DatasetCard, read_card
from pipeline.config import RunConfig
from pipeline.inference import load_model
from pipeline.record import MetricsLog
from pipeline.train import train
from tuning import registry
from tuning.gate import Decision
from tuning.listeners import RunListener, read_record
from tuning.package import input_example
from tuning.promotion import rollback
from tuning.record import epoch_metrics, flatten
from tuning.registry import download
from tuning.sync import sync
from tuning.tracking import Tracker

pytestmark = pytest.mark.slow


class KillsTheServer:
    """A listener that kills a server after the first epoch, once the server has that epoch."""

    def __init__(self, tracker: Tracker, server: subprocess.Popen) -> None:
        self.tracker, self.server = tracker, server

    def on_start(self, run: RunConfig, card: DatasetCard) -> None: ...

    def on_log(self, line: dict) -> None: ...

    def on_end(self, status: str, best_checkpoint: str | None) -> None: ...

    def on_epoch(self, metrics: dict) -> None:
        if metrics["epoch"] == 1:
            assert self.tracker.flush() == 0
            os.killpg(self.server.pid, signal.SIGKILL)
            self.server.wait(30)


def test_a_server_that_dies_loses_nothing_and_keeps_models(
    phantom_data: str, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server is killed while a run trains; replay, two versions, promotion, rollback; S3; nothing leaks."""
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "a-password-of-mlflow")
    uri, out = f"http://127.0.0.1:{free_port()}", tmp_path / "somewhere" / "run-1"
    arguments = ["server", "--host", "127.0.0.1", "--port", uri.rpartition(":")[2], "--workers", "1"]
    arguments += ["--backend-store-uri", f"sqlite:///{tmp_path}/db", "--artifacts-destination", f"{bucket}/kept"]
    on_s3 = {"MLFLOW_S3_ENDPOINT_URL": os.environ["AWS_ENDPOINT_URL"]}
    tracker = Tracker(uri, "test", pause=0.0)
    with mlflow_running(arguments, f"{uri}/health", tmp_path, **on_s3) as server:
        listeners = [RunListener(tracker, str(out)), KillsTheServer(tracker, server)]
        result = train(tiny(train={"epochs": 3}), phantom_data, str(out), listeners=listeners)
    assert tracker.close() > 0, "the server is dead, and the run has come to its end"
    with mlflow_running(arguments, f"{uri}/health", tmp_path, **on_s3):
        assert sync(str(out), uri)[:2] == (1, 3)
        run_id = check_run(uri, out, phantom_data)
        check_registry(uri, result.best_checkpoint, phantom_data, run_id)
        people = column(phantom_data, "patient_id") + column(phantom_data, "image_id")
        secrets = [SECRET_KEY, ACCESS_KEY, "a-password-of-mlflow", os.environ["AWS_ENDPOINT_URL"], bucket]
        places = [str(tmp_path), phantom_data, str(Path.home()) + "/", str(Path(__file__).parents[1])]
        assert leaks(uri, [*people, *secrets, *places]) == []
    keys = [item["Key"] for item in s3_client(os.environ["AWS_ENDPOINT_URL"]).list_objects_v2(
        Bucket=bucket.removeprefix("s3://"))["Contents"]]  # fmt: skip
    assert [key for key in keys if key.endswith("model.safetensors")]
    assert not [key for key in keys if key.endswith((".pkl", ".pt"))]


def check_run(uri: str, out: Path, data: str) -> str:
    """The run is on the server as it is on disk; its id."""
    client = MlflowClient(tracking_uri=uri)
    (run,) = client.search_runs([client.get_experiment_by_name("test").experiment_id])
    lines = MetricsLog(str(out)).read()
    kept = {(name, line["epoch"]): value for line in lines for name, value in epoch_metrics(line).items()}
    history = [item for name in run.data.metrics for item in client.get_metric_history(run.info.run_id, name)]
    assert {(item.key, item.step): item.value for item in history} == kept
    assert len(history) == len(kept), "nothing is there twice"
    assert {"val_macro_auroc", "loss", "system/cpu_utilization_percentage", "system/process_memory_megabytes"} <= set(
        run.data.metrics
    )
    assert run.info.status == "FINISHED"
    record = read_record(str(out))
    assert record is not None
    assert run.data.params == flatten(record.config)
    assert record.tags.items() <= run.data.tags.items()
    assert {"git_commit", "version.torch", "version.ray", "best.epoch"} <= set(run.data.tags)
    (given,) = run.inputs.dataset_inputs
    assert (given.dataset.name, given.dataset.digest) == (read_card(data).name, read_card(data).digest[:36])
    config = Path(download_artifacts(run_id=run.info.run_id, artifact_path="config.yaml", tracking_uri=uri))
    assert yaml.safe_load(config.read_text()) == record.config
    return str(run.info.run_id)


def check_registry(uri: str, checkpoint: str, data: str, run_id: str) -> None:
    """Two versions of one checkpoint: registered, promoted, rolled back, fetched."""
    settings = load(None, [f"tracking.uri={uri}", "gate.minimum=0", "evaluate.resamples=100"])
    versions = [register(settings, checkpoint, Path(checkpoint), "cxr", data, "test")[0].version for _ in range(2)]
    client = MlflowClient(tracking_uri=uri)
    assert client.get_model_version("cxr", versions[0]).run_id == run_id
    assert "| AUROC |" in client.get_model_version("cxr", versions[0]).description
    verdicts = [promote(settings, "cxr", version, data, "val") for version in versions]
    assert [verdict.decision for verdict in verdicts] == [Decision.ACCEPT, Decision.ACCEPT]
    assert "against champion 1" in client.get_model_version("cxr", "2").tags["gate.reason"]
    assert rollback("cxr", uri) == ("1", "2", ())
    assert load_model(download("models:/cxr@champion", uri)).info.findings == read_card(data).findings


def test_mlflow_serves_a_registered_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = f"sqlite:///{tmp_path / 'mlflow.db'}"
    tiny_checkpoint(tmp_path / "best")
    version = registry.register(tmp_path / "best", "cxr", store)
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
