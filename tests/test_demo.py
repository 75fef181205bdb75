"""The whole chain by its verbs, on a small phantom: demo, then what a person does with its result."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from logged import column, leaks

SMALL = ["train.epochs=2", "search.max_trials=2", "prepare.phantom.images=800"]


def call(*arguments: str) -> str:
    """The output of a call that must succeed."""
    command = [sys.executable, "-c", "from infra.cli import main; main()", *arguments]
    environment = {key: value for key, value in os.environ.items() if key != "MLFLOW_TRACKING_URI"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert not done.stderr, done.stderr
    return done.stdout


@pytest.mark.long
def test_demo_and_what_follows(tmp_path: Path) -> None:
    out = tmp_path / "demo"
    overrides = [text for setting in SMALL for text in ("--set", setting)]
    shown = call("demo", "--out", str(out), *overrides)
    assert "models:/mpc-cxr-demo@champion" in shown

    search = json.loads((out / "search" / "search.json").read_text())
    assert len(search["trials"]) == 2
    metrics = json.loads((out / "test" / "metrics.json").read_text())
    assert metrics["n_images"] > 50
    assert metrics["synthetic"] is True
    with (out / "predictions" / "findings.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 12 * 14
    assert {row["model_version"] for row in rows} == {"mpc-cxr-demo/1"}

    again = call("demo", "--out", str(out), "--resume", *overrides)
    assert "models:/mpc-cxr-demo/2" in again, "the same search, registered once more"

    tracking = ["--set", f"tracking.uri=sqlite:///{out / 'mlflow.db'}"]
    registered = call("register", "--checkpoint", str(out / "search" / "best"), "--model", "mine", *tracking)
    assert "models:/mine/1" in registered
    judged = ["--data", str(out / "data"), "--set", "gate.minimum=0"]
    assert "champion is version 1" in call("promote", "--model", "models:/mine/1", *judged, *tracking)
    assert "champion is version 1 again, version 2" in call(
        "promote", "--model", "models:/mpc-cxr-demo@previous", *tracking
    )
    ids = [value for name in ("image_id", "patient_id") for value in column(out / "data", name)]
    assert leaks(tracking[1].partition("=")[2], [*ids, f"{tmp_path}/", str(Path.home()) + "/"]) == []
    call(
        *("evaluate", "--model", "models:/mine@champion", "--data", str(out / "data"), "--out", str(tmp_path / "val")),
        *("--split", "val", *tracking),
    )
    assert json.loads((tmp_path / "val" / "metrics.json").read_text())["split"] == "val"
    assert "sound" in call("check", "--data", str(out / "data"))
    assert "runs" in call("sync", "--out", str(out / "search"), *tracking)

    run, one_epoch = tmp_path / "run", ["--config", "demo", "--set", "train.epochs=1"]
    assert "would train" in call("train", "--data", str(out / "data"), "--out", str(run), *one_epoch, "--dry-run")
    assert "best epoch 1 of 1" in call("train", "--data", str(out / "data"), "--out", str(run), *one_epoch)
    assert (run / "mlflow.db").exists()
    assert "best epoch 1 of 1" in call("train", "--data", str(out / "data"), "--out", str(run), *one_epoch, "--resume")
