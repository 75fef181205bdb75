"""Runs in a real MLflow database, and a server that is not there."""

import logging
import pickle
import socket
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from mpc.errors import UserError
from tuning.record import RunRecord, Status, epoch_metrics, flatten
from tuning.store import client_of, default_uri
from tuning.tracking import KEY_TAG, TrackedRun, Tracker, Verdict, judge

CONFIG = {"loss": {"lambda_ipc": 0.5}, "model": {"weights": "/home/somebody/weights/d121.safetensors"}}


@pytest.fixture
def uri(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A database of this test alone; the working directory is another folder, which must stay empty."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    return default_uri(str(tmp_path / "out"))


@pytest.fixture
def absent() -> str:
    """An address where nothing listens."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{listener.getsockname()[1]}"


def record(key: str, parent: str | None = None) -> RunRecord:
    return RunRecord(key=key, name=key, experiment="test", parent=parent, tags={"data.digest": "abc"})


def test_a_run_holds_parameters_metrics_tags_and_its_parent(uri: str, tmp_path: Path) -> None:
    tracker = Tracker(uri, "test")
    search = tracker.start_run(record("search"))
    trial = tracker.start_run(record("trial", "search"), search)
    tracker.log_config(trial, CONFIG)
    for epoch in (1, 2):
        tracker.log_epoch(trial, {"loss": 1.0 / epoch, "val_macro_auroc": float("nan"), "note": "text"}, epoch)
    tracker.log_dataset(trial, "phantom", "abc")
    tracker.end_run(trial, Status.FAILED)
    assert tracker.close() == 0

    client = MlflowClient(tracking_uri=uri)
    run = client.get_run(str(trial.run_id))
    assert run.data.params == {"loss.lambda_ipc": "0.5", "model.weights": "d121.safetensors"}
    assert [(m.step, m.value) for m in client.get_metric_history(str(trial.run_id), "loss")] == [(1, 1.0), (2, 0.5)]
    assert run.data.metrics == {"loss": 0.5}
    assert run.data.tags["mlflow.parentRunId"] == search.run_id
    assert run.info.status == "FAILED"
    assert run.inputs.dataset_inputs[0].dataset.digest == "abc"
    assert {item.path for item in client.list_artifacts(str(trial.run_id))} == {"config.yaml"}
    assert not list(Path.cwd().iterdir()), "MLflow left files in the working directory"
    assert (tmp_path / "out" / "mlartifacts").is_dir()


def test_a_run_is_continued_by_its_key_and_epochs_are_not_repeated(uri: str) -> None:
    for epochs in ((1, 2), (2, 3)):
        tracker = Tracker(uri, "test")
        run = tracker.start_run(record("one"))
        tracker.log_config(run, CONFIG)
        for epoch in epochs:
            tracker.log_epoch(run, {"loss": float(epoch)}, epoch)
        tracker.end_run(run, Status.FINISHED)
        tracker.close()
    client = MlflowClient(tracking_uri=uri)
    found = client.search_runs([client.get_experiment_by_name("test").experiment_id])
    assert [item.data.tags[KEY_TAG] for item in found] == ["one"]
    assert [m.step for m in client.get_metric_history(found[0].info.run_id, "loss")] == [1, 2, 3]
    assert found[0].info.status == "FINISHED"


def test_an_absent_server_costs_one_warning_and_no_run(absent: str, caplog: pytest.LogCaptureFixture) -> None:
    tracker = Tracker(absent, "test", pause=60.0)
    run = tracker.start_run(record("one"))
    for epoch in range(20):
        tracker.log_epoch(run, {"loss": 1.0}, epoch)
    with caplog.at_level(logging.WARNING, "tuning.tracking"):
        assert tracker.run_id(run) is None
        left = tracker.close()
    assert left == 21, "the run itself and 20 epochs wait"
    assert tracker.failures <= 3, "a server that is away is left alone"
    assert "sync" in caplog.records[-1].message
    assert len([item for item in caplog.records if item.name == "tuning.tracking"]) <= 2


def test_an_absent_server_is_not_asked_in_a_loop(absent: str) -> None:
    tracker = Tracker(absent, "test", pause=0.0)
    tracker.log_epoch(tracker.start_run(record("one")), {"loss": 1.0}, 1)
    assert tracker.close() == 2
    assert tracker.failures <= 3


def test_records_wait_for_a_server_that_comes_back(uri: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.write_text("a file where the database's folder belongs")
    tracker = Tracker(uri, "test", pause=60.0)
    run = tracker.start_run(record("one"))
    tracker.log_epoch(run, {"loss": 1.0}, 1)
    assert tracker.flush() == 2
    out.unlink()
    tracker.log_epoch(run, {"loss": 0.5}, 2)
    assert tracker.close() == 0
    history = MlflowClient(tracking_uri=uri).get_metric_history(str(run.run_id), "loss")
    assert [(m.step, m.value) for m in history] == [(1, 1.0), (2, 0.5)]


def test_an_epoch_trained_again_is_logged_as_it_was_recorded_last(uri: str) -> None:
    """Population based training may take a trial back to an epoch of another one."""
    for loss in (1.0, 0.9, 0.9, 0.8):
        tracker = Tracker(uri, "test")
        run = tracker.start_run(record("one"))
        tracker.log_epoch(run, {"loss": loss, "val": 0.5}, 1)
        assert tracker.close() == 0
    client = MlflowClient(tracking_uri=uri)
    assert [metric.value for metric in client.get_metric_history(str(run.run_id), "val")] == [0.5], "what is known"
    assert [metric.value for metric in client.get_metric_history(str(run.run_id), "loss")] == [1.0, 0.9, 0.8]
    assert client.get_run(str(run.run_id)).data.metrics == {"loss": 0.8, "val": 0.5}


def test_a_child_leaves_a_parent_that_has_ended_as_it_is(uri: str) -> None:
    """Ray Tune's state holds the run of a resumed search as it was when that began."""
    tracker = Tracker(uri, "test")
    search = tracker.start_run(record("search"))
    tracker.end_run(search, Status.FINISHED)
    trial = tracker.start_run(record("trial", "search"), TrackedRun(record("search")))
    assert tracker.close() == 0
    client = MlflowClient(tracking_uri=uri)
    assert client.get_run(str(search.run_id)).info.status == "FINISHED"
    assert client.get_run(str(trial.run_id)).data.tags["mlflow.parentRunId"] == search.run_id


def test_a_record_at_fault_is_dropped_and_does_not_block(uri: str) -> None:
    tracker = Tracker(uri, "test")
    run = tracker.start_run(record("one"))
    tracker.log_epoch(run, {"loss*": 1.0}, 1)
    tracker.log_epoch(run, {"loss": 1.0}, 1)
    assert tracker.close() == 0
    assert tracker.dropped == 1
    assert "loss*" in tracker.refusal
    assert MlflowClient(tracking_uri=uri).get_run(str(run.run_id)).data.metrics == {"loss": 1.0}


@contextmanager
def another_writer(database: str) -> Iterator[list[str]]:
    """Somebody else makes the row of a data set just before we do, once; the ids of what they made."""
    made: list[str] = []

    def before(connection: Any, cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
        if statement.startswith("INSERT INTO datasets") and not made:
            made.append("theirs")
            with closing(sqlite3.connect(database)) as other, other:
                other.execute(statement, (*made, *parameters[1:]))

    sqlalchemy.event.listen(sqlalchemy.engine.Engine, "before_cursor_execute", before)
    try:
        yield made
    finally:
        sqlalchemy.event.remove(sqlalchemy.engine.Engine, "before_cursor_execute", before)


def test_two_runs_that_name_one_new_data_set_in_the_same_moment_both_have_it(uri: str) -> None:
    tracker = Tracker(uri, "test", pause=0)
    run = tracker.start_run(record("one"))
    assert tracker.flush() == 0
    with another_writer(uri.removeprefix("sqlite:///")) as made:
        tracker.log_dataset(run, "phantom", "abc")
        tracker.flush()
    assert tracker.close() == 0
    assert made
    assert tracker.failures == 1
    assert tracker.dropped == 0
    inputs = MlflowClient(tracking_uri=uri).get_run(str(run.run_id)).inputs
    assert [item.dataset.digest for item in inputs.dataset_inputs] == ["abc"]


@pytest.mark.parametrize(
    ("error", "verdict"),
    [
        (MlflowException("away"), Verdict.RETRY),
        (MlflowException("name", error_code=1000), Verdict.DROP),  # INVALID_PARAMETER_VALUE
        (MlflowException("(sqlite3.IntegrityError) UNIQUE constraint failed: a.b", error_code=4), Verdict.RETRY),
        (MlflowException("(psycopg2.errors.UniqueViolation) duplicate key value ...", error_code=4), Verdict.RETRY),
        (MlflowException("(sqlite3.IntegrityError) NOT NULL constraint failed: a.b", error_code=4), Verdict.DROP),
        (MlflowException("(sqlite3.IntegrityError) FOREIGN KEY constraint failed", error_code=4), Verdict.DROP),
        (ConnectionError("reset"), Verdict.RETRY),
    ],
)
def test_what_becomes_of_a_failed_record(error: Exception, verdict: Verdict) -> None:
    assert judge(error) is verdict


def test_a_pickled_tracker_is_the_same_one_in_its_process(uri: str) -> None:
    tracker = Tracker(uri, "test")
    state = pickle.dumps(tracker)
    assert pickle.loads(state) is tracker
    tracker.close()
    later = pickle.loads(state)
    assert later is not tracker
    assert (later.uri, later.experiment) == (uri, "test")
    later.close()
    elsewhere = Tracker(f"{uri}.new", "test")
    assert pickle.loads(state) is elsewhere, "a search that is resumed with another server"
    elsewhere.close()


@pytest.mark.parametrize(
    "bad", ["file:./mlruns", "./mlruns", "https://me:secret@server/", "postgresql://me:secret@db/x"]
)
def test_addresses_that_are_refused(bad: str) -> None:
    with pytest.raises(UserError) as caught:
        client_of(bad)
    assert "secret" not in str(caught.value)


def test_the_environment_names_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://mlflow.example")
    assert default_uri("s3://bucket/run") == "https://mlflow.example"
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    with pytest.raises(UserError, match="MLFLOW_TRACKING_URI"):
        default_uri("s3://bucket/run")


def test_places_stay_here() -> None:
    values = {"a": {"weights": "s3://bucket/x/w.pth?endpoint_override=http://host"}, "b": ["../c/d"], "n": None}
    assert flatten(values) == {"a.weights": "w.pth", "b": "['d']", "n": "None"}


def test_only_finite_numbers_of_ours() -> None:
    values = {"loss": 1, "val_macro_ap": 0.5, "lr": float("inf"), "pid": 7, "loss_x": True, "seconds": None}
    assert epoch_metrics(values) == {"loss": 1.0, "val_macro_ap": 0.5}
