"""A run and a search reported to a real MLflow database, by the listener and by real Ray Tune; and their replay."""

import pickle
import shutil
from pathlib import Path

import pytest
from factory import bare_card, tiny_checkpoint
from mlflow.tracking import MlflowClient

from mpc.errors import MissingError, UserError
from pipeline.config import RunConfig, TrainConfig
from pipeline.record import MetricsLog
from tuning.listeners import MlflowCallback, RunListener, close_run, open_run, read_record
from tuning.record import Status
from tuning.store import default_uri
from tuning.sync import sync
from tuning.tracking import KEY_TAG, Tracker

CARD = bare_card()


@pytest.fixture
def out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Folder of a run, with its own database."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return str(tmp_path / "run-1")


def report(tracker: Tracker, out: str, epochs: range, status: str = "FINISHED", best: str | None = None) -> None:
    """What `pipeline.train` tells a listener, with the record that it leaves."""
    listener, history = RunListener(tracker, out), MetricsLog(out)
    listener.on_start(RunConfig(train=TrainConfig(epochs=3)), CARD)
    for epoch in epochs:
        listener.on_log({"step": 1, "steps": 9})
        metrics = {"epoch": epoch, "step": 10 * epoch, "loss": 1.0 / epoch, "val_macro_auroc": 0.5, "pid": 3}
        history.add(metrics)
        listener.on_epoch(metrics)
    listener.on_end(status, best)


def runs_of(uri: str) -> list:
    client = MlflowClient(tracking_uri=uri)
    return client.search_runs([item.experiment_id for item in client.search_experiments()])


def test_a_run_is_reported_and_continued(out: str) -> None:
    uri = default_uri(out)
    tracker = Tracker(uri)
    report(tracker, out, range(1, 3), "FAILED")
    tracker.close()
    assert [run.info.status for run in runs_of(uri)] == ["FAILED"]
    tiny_checkpoint(Path(out) / "best")
    tracker = Tracker(uri)
    report(tracker, out, range(2, 4), "FINISHED", str(Path(out) / "best"))
    tracker.close()
    (run,) = runs_of(uri)
    assert (run.info.status, run.info.run_name) == ("FINISHED", "run-1")
    assert run.data.params["train.epochs"] == "3"
    assert run.data.params["loss.lambda_ipc"] == "1.0"
    assert run.data.tags["data.digest"] == CARD.digest
    assert run.data.tags["data.synthetic"] == "true"
    assert run.data.tags["best.epoch"] == "1"
    assert run.data.tags["version.torch"]
    assert set(run.data.metrics) == {"loss", "val_macro_auroc"}
    history = MlflowClient(tracking_uri=uri).get_metric_history(run.info.run_id, "loss")
    assert [(item.step, item.value) for item in history] == [(1, 1.0), (2, 0.5), (3, 1 / 3)]


def test_a_lost_run_is_replayed_once(out: str, tmp_path: Path) -> None:
    tracker = Tracker("http://127.0.0.1:9", pause=60.0)
    report(tracker, out, range(1, 4))
    assert tracker.close() > 0
    record = read_record(out)
    assert record is not None
    assert record.status is Status.FINISHED
    uri = default_uri(str(tmp_path / "server"))
    assert sync(out, uri)[:2] == (1, 3)
    (first,) = runs_of(uri)
    assert sync(out, uri)[:2] == (1, 3)
    (second,) = runs_of(uri)
    assert first.to_dictionary() == second.to_dictionary()
    history = MlflowClient(tracking_uri=uri).get_metric_history(second.info.run_id, "loss")
    assert [item.step for item in history] == [1, 2, 3]
    assert second.info.status == "FINISHED"
    assert second.data.params["train.epochs"] == "3"


def test_records_that_the_server_refuses_are_told(out: str, tmp_path: Path) -> None:
    report(Tracker("http://127.0.0.1:9", pause=60.0), out, range(1, 3))
    MetricsLog(out).add({"epoch": 3, "loss_*": 1.0})
    uri = default_uri(str(tmp_path / "server"))
    with pytest.raises(UserError, match="refused 1 of the records"):
        sync(out, uri)
    (run,) = runs_of(uri)
    assert run.data.metrics["loss"] == 0.5


def test_a_folder_without_runs(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(MissingError, match=r"tracking\.json"):
        sync(str(tmp_path / "empty"), default_uri(str(tmp_path)))


@pytest.mark.usefixtures("ray_session")
def test_a_search_is_a_parent_with_a_child_a_trial(out: str, tmp_path: Path) -> None:
    from ray import tune

    def trainable(config: dict[str, float]) -> None:
        """Three epochs; one trial breaks in its second."""
        for epoch in range(1, 4):
            if config["optim.lr"] > 0.5 and epoch == 2:
                raise ValueError("diverged")
            tune.report({"epoch": epoch, "val_macro_auroc": config["optim.lr"] * epoch, "loss_sup": 1.0, "note": "x"})

    uri = default_uri(out)
    tracker = Tracker(uri)
    parent = open_run(tracker, out, "search", config={"search": {"max_trials": 2}}, tags={"searcher": "random"})
    callback = MlflowCallback(tracker, parent, f"{out}/trials", tags={"data.digest": CARD.digest})
    # what a killed driver leaves of a trial that Tune had not noted
    open_run(tracker, f"{out}/trials/lost", "lost", config={}, tags={"trial_id": "lost"}, parent=parent)
    tuner = tune.Tuner(
        trainable,
        param_space={"optim.lr": tune.grid_search([0.1, 0.9])},
        run_config=tune.RunConfig(name="tune", storage_path=str(tmp_path / "tune"), callbacks=[callback], verbose=0),
    )
    results = tuner.fit()
    assert results.num_errors == 1
    close_run(tracker, out, parent, Status.FINISHED)
    assert tracker.close() == 0

    found = {run.data.tags.get("trial_id", "parent"): run for run in runs_of(uri)}
    top = found.pop("parent")
    assert len(found) == 3
    assert found.pop("lost").info.status == "KILLED"
    assert {run.data.tags["mlflow.parentRunId"] for run in found.values()} == {top.info.run_id}
    by_rate = {run.data.params["optim.lr"]: run for run in found.values()}
    assert {rate: run.info.status for rate, run in by_rate.items()} == {"0.1": "FINISHED", "0.9": "FAILED"}
    assert set(by_rate["0.1"].data.metrics) == {"val_macro_auroc", "loss_sup"}
    client = MlflowClient(tracking_uri=uri)
    steps = client.get_metric_history(by_rate["0.1"].info.run_id, "val_macro_auroc")
    assert [item.step for item in steps] == [1, 2, 3]
    assert by_rate["0.1"].data.tags[KEY_TAG].startswith(top.data.tags[KEY_TAG] + "/")

    other = default_uri(str(tmp_path / "other"))
    assert sync(out, other).runs == 4
    copied = {run.data.tags.get("trial_id", "parent"): run for run in runs_of(other)}
    assert copied["parent"].info.status == "FINISHED"
    assert all(
        run.data.tags["mlflow.parentRunId"] == copied["parent"].info.run_id
        for key, run in copied.items()
        if key != "parent"
    )
    shutil.rmtree(tmp_path / "other")


def test_a_callback_from_tunes_pickle_continues_its_trials(out: str) -> None:
    tracker = Tracker(default_uri(out))
    parent = open_run(tracker, out, "search", config={}, tags={})
    callback = MlflowCallback(tracker, parent, f"{out}/trials")
    copy = pickle.loads(pickle.dumps(callback))
    assert copy.tracker is tracker
    assert copy.parent.record == parent.record
    tracker.close()
