"""What reports to MLflow: a listener for one training run, and Ray Tune's callback for the trials of a search."""

import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from ray.tune.experiment import Trial
from ray.tune.logger import LoggerCallback

from mpc.config import CheckpointInfo
from mpc.errors import UserError
from pipeline import storage
from pipeline.card import DatasetCard
from pipeline.config import RunConfig
from pipeline.versions import git_commit, versions
from tuning.follow import name_of, settings_of
from tuning.interruption import cut_short
from tuning.keeping import surviving
from tuning.record import RunRecord, Status, epoch_metrics, without_places
from tuning.space import apply
from tuning.tracking import TrackedRun, Tracker

RECORD = "tracking.json"
INFO_FILE = "checkpoint.json"


def data_tags(card: DatasetCard) -> dict[str, str]:
    """What a run was trained on and with, as tags."""
    packages = {f"version.{name}": version for name, version in versions().items()}
    return {
        "data.name": card.name,
        "data.digest": card.digest,
        "data.synthetic": str(card.synthetic).lower(),
        "git_commit": git_commit() or "unknown",
        **packages,
    }


def read_record(folder: str) -> RunRecord | None:
    """The record in `folder`, None where it holds none."""
    uri = storage.join(folder, RECORD)
    return RunRecord.model_validate_json(storage.read_bytes(uri)) if storage.exists(uri) else None


def records_below(folder: str) -> list[tuple[str, RunRecord]]:
    """Each folder at or below `folder` with its record, parents first."""
    places = [uri.replace(f"/{RECORD}", "") for uri in storage.list_files(folder, suffixes=(RECORD,))]
    found = [(place, record) for place in sorted(places) if (record := read_record(place)) is not None]
    return sorted(found, key=lambda item: item[1].parent is not None)


def write_record(folder: str, record: RunRecord) -> None:
    """Writes `record` beside the run's metrics.jsonl."""
    storage.write_bytes(storage.join(folder, RECORD), record.model_dump_json(indent=1).encode())


def open_run(
    tracker: Tracker,
    folder: str,
    name: str,
    *,
    config: Mapping[str, Any],
    tags: Mapping[str, str],
    key: str | None = None,
    parent: TrackedRun | None = None,
) -> TrackedRun:
    """The MLflow run of `folder`: its record is written first, and a folder that has one continues its run.

    Args:
        tracker: where the run is logged.
        folder: path or URI that will hold metrics.jsonl.
        name: shown in MLflow.
        config: nested; becomes parameters and config.yaml, places cut to their last part.
        tags: searchable in MLflow.
        key: identity of the run; None takes the folder's, or a new random one.
        parent: e.g. the search.
    """
    known = None
    with surviving(f"{RECORD} of {name}"):
        known = read_record(folder)
    record = RunRecord(
        key=key or (known.key if known else uuid.uuid4().hex),
        name=name,
        experiment=tracker.experiment,
        parent=parent.record.key if parent else None,
        tags=dict(tags),
        config=without_places(config),
    )
    with surviving(f"{RECORD} of {name}"):
        write_record(folder, record)
    run = tracker.start_run(record, parent)
    if config:
        tracker.log_config(run, record.config)
    log_data(tracker, run)
    return run


def log_data(tracker: Tracker, run: TrackedRun) -> None:
    """The data set that the run's tags name, as MLflow's own kind of input."""
    tags = run.record.tags
    if "data.digest" in tags:
        tracker.log_dataset(run, tags.get("data.name", "data"), tags["data.digest"])


def close_run(
    tracker: Tracker, folder: str, run: TrackedRun, status: Status, tags: Mapping[str, str] | None = None
) -> None:
    """Ends the run, with its last tags, and writes how it ended beside its metrics."""
    tags = dict(tags or {})
    ended = run.record.model_copy(update={"status": status, "tags": {**run.record.tags, **tags}})
    with surviving(f"{RECORD} of {run.record.name}"):
        write_record(folder, ended)
    if tags:
        tracker.set_tags(run, tags)
    tracker.end_run(run, status)


@contextmanager
def opened(
    tracker: Tracker, folder: str, name: str, *, config: Mapping[str, Any], tags: Mapping[str, str]
) -> Iterator[TrackedRun]:
    """The MLflow run of `folder` while the context lasts: then FINISHED, KILLED by a signal, or FAILED."""
    run = open_run(tracker, folder, name, config=config, tags=tags)
    status = Status.FAILED
    try:
        yield run
        status = Status.FINISHED
    except (KeyboardInterrupt, SystemExit):  # the latter is what Ray makes of SIGTERM
        status = Status.KILLED
        raise
    finally:
        close_run(tracker, folder, run, status)


class RunListener:
    """Reports one training run: `pipeline.train.Listener` for MLflow.

    Args:
        tracker: where to.
        out: folder of the run; its record makes a resumed run continue the same MLflow run.
        name: shown in MLflow; None takes the folder's name.
        parent: e.g. the search whose best trial this is.
        tags: further tags.
    """

    def __init__(
        self,
        tracker: Tracker,
        out: str,
        *,
        name: str | None = None,
        parent: TrackedRun | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> None:
        self.tracker, self.out, self.parent = tracker, out, parent
        self.name = name or storage.name(out)
        self.tags = dict(tags or {})
        self.run: TrackedRun | None = None

    def on_start(self, run: RunConfig, card: DatasetCard) -> None:
        """Opens the run, with its configuration and its data."""
        tags = {**data_tags(card), "method": run.train.method, **self.tags}
        config = run.model_dump(mode="json")
        self.run = open_run(self.tracker, self.out, self.name, config=config, tags=tags, parent=self.parent)

    def on_log(self, line: dict[str, Any]) -> None:
        """Progress inside an epoch is for eyes, not for the record."""

    def on_epoch(self, metrics: dict[str, Any]) -> None:
        """One batch an epoch."""
        assert self.run is not None, "on_start comes first"
        self.tracker.log_epoch(self.run, epoch_metrics(metrics), int(metrics["epoch"]))

    def on_end(self, status: str, best_checkpoint: str | None) -> None:
        """Closes the run: FINISHED, FAILED or KILLED, and at which epoch its best checkpoint stands."""
        assert self.run is not None, "on_start comes first"
        tags = {}
        if best_checkpoint is not None:
            info = CheckpointInfo.model_validate_json(storage.read_bytes(storage.join(best_checkpoint, INFO_FILE)))
            tags = {"best.epoch": f"{info.epoch:g}", "best.step": str(info.step)}
        close_run(self.tracker, self.out, self.run, Status(status), tags)


class MlflowCallback(LoggerCallback):  # type: ignore[misc]
    """Ray Tune's view of a search in MLflow: one child run a trial, written by the driver.

    The driver writes because a stopped trial is killed before it could close its own run (ray.md 1.4).

    Args:
        tracker: where to.
        parent: run of the search.
        trials: folder that holds one folder a trial, named by its name or id, with metrics.jsonl.
        base: what every trial shares: its resolved configuration is this with its own settings.
        tags: of every trial.
        step: key of a result that counts epochs; Tune's own iteration restarts after a restore.
    """

    def __init__(
        self,
        tracker: Tracker,
        parent: TrackedRun,
        trials: str,
        *,
        base: RunConfig | None = None,
        tags: Mapping[str, str] | None = None,
        step: str = "epoch",
    ) -> None:
        self.tracker, self.parent, self.trials, self.base = tracker, parent, trials, base
        self.tags, self.step = dict(tags or {}), step
        self._runs: dict[str, TrackedRun] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Tune pickles callbacks: runs stay behind, they are found again by their keys."""
        return {**self.__dict__, "_runs": {}, "parent": TrackedRun(self.parent.record)}

    def log_trial_start(self, trial: Trial) -> None:
        """Opens the trial's run, or the one it had before a restore."""
        if trial.trial_id in self._runs:
            return
        sampled = {key: value for key, value in settings_of(trial).items() if "." in key}  # spaces address dotted paths
        self._runs[trial.trial_id] = open_run(
            self.tracker,
            self._folder(trial),
            name_of(trial),
            config=self._resolved(sampled),
            tags={"trial_id": trial.trial_id, **self.tags},
            key=f"{self.parent.record.key}/{trial.trial_id}",
            parent=self.parent,
        )

    def _resolved(self, sampled: dict[str, Any]) -> dict[str, Any]:
        """All settings of a trial; only its own ones where they make no run together, which ends the trial itself."""
        if self.base is None:
            return sampled
        try:
            return apply(self.base, sampled, "trial").model_dump(mode="json")
        except UserError:
            return sampled

    def log_trial_result(self, iteration: int, trial: Trial, result: dict[str, Any]) -> None:
        """The epoch's metrics that are ours."""
        self.log_trial_start(trial)
        if self.step in result:
            self.tracker.log_epoch(self._runs[trial.trial_id], epoch_metrics(result), int(result[self.step]))

    def log_trial_end(self, trial: Trial, failed: bool = False) -> None:
        """FINISHED also for a trial that the scheduler stopped early; one that raised is FAILED."""
        self._end(trial, Status.FAILED if failed else Status.FINISHED)

    def on_experiment_end(self, trials: list[Trial], **info: Any) -> None:
        """The search has ended, and with it what had not: Tune tells of no other end of those.

        A trial that Tune does not know was killed with its driver before that had noted it.
        """
        known = {self._folder(trial): trial for trial in trials}
        with surviving(f"{RECORD} of trials that had not ended"):
            for folder, record in records_below(self.trials):
                if record.status is not Status.RUNNING:
                    continue
                if folder in known:
                    self._end(known[folder], Status.KILLED if cut_short() else Status.FINISHED)
                else:
                    close_run(self.tracker, folder, self.tracker.start_run(record, self.parent), Status.KILLED)

    def _end(self, trial: Trial, status: Status) -> None:
        self.log_trial_start(trial)
        close_run(self.tracker, self._folder(trial), self._runs.pop(trial.trial_id), status)

    def _folder(self, trial: Trial) -> str:
        """Where the trial writes its metrics."""
        return storage.join(self.trials, name_of(trial))
