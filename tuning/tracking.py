"""Runs in MLflow: what is logged, when, and what happens while the tracking server is away."""

import json
import logging
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from enum import StrEnum
from typing import Any
from urllib.parse import urlsplit
from weakref import WeakValueDictionary

import yaml
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from tuning.record import RunRecord, Status, finite, flatten
from tuning.store import check_uri, client_of, experiment_id

log = logging.getLogger(__name__)

KEY_TAG = "mpc.run_key"
PARENT_TAG = "mlflow.parentRunId"
PARAMS_A_BATCH, METRICS_A_BATCH = 100, 1000  # limits of MLflow's log_batch
RACES = ("UNIQUE constraint failed", "duplicate key value", "Duplicate entry")
"""What SQLite, PostgreSQL and MySQL say of a row that another writer made since it was looked for; it is found next."""
PAUSE_S = 30.0  # after a failure the server is left alone for so long

Operation = Callable[[MlflowClient, str], object]


class Verdict(StrEnum):
    """What becomes of a record that could not be logged."""

    RETRY = "retry"
    DROP = "drop"


def judge(error: Exception) -> Verdict:
    """Whether the server may take the same record later (it is away or busy) or never will (the record is at fault)."""
    busy = {"INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE", "REQUEST_LIMIT_EXCEEDED", "RESOURCE_EXHAUSTED", "IO_ERROR"}
    if isinstance(error, MlflowException):
        raced = any(name in str(error) for name in RACES)  # MLflow answers that as a bad request
        return Verdict.RETRY if raced or error.error_code in busy else Verdict.DROP
    return Verdict.RETRY


_trackers: "WeakValueDictionary[tuple[str, str], Tracker]" = WeakValueDictionary()


def shared(uri: str, experiment: str) -> "Tracker":
    """The process's open tracker of that address and experiment, else another open one, else a new one.

    A search may be resumed with another server than it began with: its callbacks come from Tune's state and name the
    old one, but its parent run is on the new one.
    """
    return _trackers.get((uri, experiment)) or next(iter(_trackers.values()), None) or Tracker(uri, experiment)


class TrackedRun:
    """One run, and what the server has not taken yet, in order."""

    def __init__(self, record: RunRecord, parent: "TrackedRun | None" = None) -> None:
        self.record, self.parent = record, parent
        self.run_id: str | None = None
        self.logged: dict[tuple[str, int], float] = {}
        """The newest value of each metric at each step."""
        self.waiting: deque[Operation] = deque()


class Tracker:
    """Writes runs to one MLflow experiment from one background thread, in order.

    A run never waits for the server and never ends because of it: what the server did not take waits and is sent with
    the next record; what is left at `close` can be replayed by `tuning.sync`.

    Args:
        uri: of the tracking server or database.
        experiment: made where it is missing.
        pause: seconds for which a server is left alone after a failure.
    """

    def __init__(self, uri: str, experiment: str = "mpc-cxr", *, pause: float = PAUSE_S) -> None:
        self.uri, self.experiment, self.pause = check_uri(uri), experiment, pause
        self.failures = 0
        self.dropped = 0
        self.refusal = ""
        """What the server said of the first record that was dropped."""
        self._client: MlflowClient | None = None
        self._experiment_id: str | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="mlflow")
        self._runs: list[TrackedRun] = []
        self._quiet_until = 0.0
        _trackers[self.uri, experiment] = self

    def __reduce__(self) -> tuple[Callable[[str, str], "Tracker"], tuple[str, str]]:
        """Ray Tune pickles callbacks with a search's state: a process that has this tracker gets it again."""
        return shared, (self.uri, self.experiment)

    def start_run(self, record: RunRecord, parent: TrackedRun | None = None) -> TrackedRun:
        """A run for `record`; one with the same key is continued: its history is kept."""
        run = TrackedRun(record, parent)
        self._runs.append(run)
        self._thread.submit(self._drain, run)
        return run

    def log_epoch(self, run: TrackedRun, metrics: Mapping[str, object], step: int) -> None:
        """One batch of metrics at `step`; what is no finite number is left out, what is known is not repeated.

        An epoch that was trained again, from other weights perhaps, adds its values: the newest of a step counts.
        """
        now = int(time.time() * 1000)
        batch = [Metric(name, value, now, step) for name, value in finite(metrics).items()]

        def send(client: MlflowClient, run_id: str) -> None:
            fresh = [metric for metric in batch if run.logged.get((metric.key, step)) != metric.value]
            for start in range(0, len(fresh), METRICS_A_BATCH):
                client.log_batch(run_id, metrics=fresh[start : start + METRICS_A_BATCH])
            run.logged.update({(metric.key, step): metric.value for metric in fresh})

        self._submit(run, send)

    def set_tags(self, run: TrackedRun, tags: Mapping[str, str]) -> None:
        """Tags; an older value is replaced."""
        batch = [RunTag(key, str(value)) for key, value in tags.items()]
        self._submit(run, lambda client, run_id: client.log_batch(run_id, tags=batch))

    def log_config(self, run: TrackedRun, config: Mapping[str, Any]) -> None:
        """The resolved configuration: searchable parameters with dotted keys, and `config.yaml` as an artifact.

        Parameters cannot change in MLflow: of a continued run only those that are new are written.
        """
        text = yaml.safe_dump(dict(config), sort_keys=False)
        params = [Param(key, value) for key, value in flatten(config).items()]

        def send(client: MlflowClient, run_id: str) -> None:
            known = client.get_run(run_id).data.params
            fresh = [param for param in params if param.key not in known]
            for start in range(0, len(fresh), PARAMS_A_BATCH):
                client.log_batch(run_id, params=fresh[start : start + PARAMS_A_BATCH])
            client.log_text(run_id, text, "config.yaml")

        self._submit(run, send)

    def log_dataset(self, run: TrackedRun, name: str, digest: str, context: str = "training") -> None:
        """The data set by name and digest; its place stays unlogged."""
        dataset = Dataset(name=name, digest=digest[:36], source_type="local", source=json.dumps({"digest": digest}))
        entry = DatasetInput(dataset, [InputTag("mlflow.data.context", context)])
        self._submit(run, lambda client, run_id: client.log_inputs(run_id, datasets=[entry]))

    def end_run(self, run: TrackedRun, status: Status) -> None:
        """The run's last word: FINISHED, FAILED or KILLED."""

        def send(client: MlflowClient, run_id: str) -> None:
            if client.get_run(run_id).info.status != status.value:  # a replay leaves the time of the end alone
                client.set_terminated(run_id, status=status.value)

        self._submit(run, send)

    def run_id(self, run: TrackedRun) -> str | None:
        """MLflow's id of the run, once all before has been sent; None while the server is away."""
        self.flush()
        return run.run_id

    def flush(self) -> int:
        """Waits until everything was tried once more; the number of records that are still waiting."""
        done: Future[int] = self._thread.submit(self._drain_all)
        return done.result()

    def close(self) -> int:
        """Flushes and stops; the number of records that wait in vain. They are told, and so are those refused."""
        left = self.flush()
        self._thread.shutdown()
        _trackers.pop((self.uri, self.experiment), None)
        if left:
            log.warning(
                "MLflow at %s did not take %d records (%d failures); `mpc-cxr sync` replays them from metrics.jsonl",
                urlsplit(self.uri).hostname or "its database",
                left,
                self.failures,
            )
        if self.dropped:
            log.warning("MLflow refused %d records, the first: %s", self.dropped, self.refusal)
        return left

    def _submit(self, run: TrackedRun, operation: Operation) -> None:
        """Hands `operation` to the background thread."""
        run.waiting.append(operation)
        self._thread.submit(self._drain, run)

    def _drain_all(self) -> int:
        """Tries every run now, until the first failure."""
        self._quiet_until = 0.0
        for run in self._runs:
            self._drain(run)
        return sum(len(run.waiting) + (run.run_id is None) for run in self._runs)

    def _drain(self, run: TrackedRun) -> None:
        """Sends what waits, oldest first, unless the server has just failed."""
        while time.monotonic() >= self._quiet_until and (run.waiting or run.run_id is None):
            try:
                client = self._connect()
                run_id = self._open(client, run)
                if run.waiting:
                    run.waiting[0](client, run_id)
                    run.waiting.popleft()
            except Exception as error:  # whatever a tracking server does, the run goes on
                if self._failed(run, error) is Verdict.RETRY:
                    return

    def _failed(self, run: TrackedRun, error: Exception) -> Verdict:
        """Counts a failure, tells the first one, and pauses or drops the record."""
        verdict = judge(error) if run.run_id else Verdict.RETRY
        told, text = log.debug if self.failures else log.warning, str(error).split("\n")[0][:200]
        told("MLflow: %s: %s (%s); the run goes on", type(error).__name__, text, verdict)
        self.failures += 1
        if verdict is Verdict.DROP:
            run.waiting.popleft()
            self.dropped += 1
            self.refusal = self.refusal or text
        else:
            self._quiet_until = time.monotonic() + self.pause
        return verdict

    def _connect(self) -> MlflowClient:
        """The client, made when it is first needed: a new database takes seconds."""
        if self._client is None:
            self._client = client_of(self.uri)
        return self._client

    def _open(self, client: MlflowClient, run: TrackedRun) -> str:
        """The run's id: found by its key, else made."""
        if run.run_id is None:
            experiment = self._experiment(client)
            tags = {**run.record.tags, KEY_TAG: run.record.key}
            parent = run.parent.run_id if run.parent else None
            if run.record.parent and parent is None:  # a resumed search has it under another name, ended perhaps
                parent = find_run(client, experiment, run.record.parent)
            if run.parent and parent is None:
                parent = self._open(client, run.parent)
            if parent is not None:
                tags[PARENT_TAG] = parent
            run_id = find_run(client, experiment, run.record.key)
            if run_id is None:
                run_id = str(client.create_run(experiment, run_name=run.record.name, tags=tags).info.run_id)
            else:
                _continue(client, run, run_id)
            run.run_id = run_id
        return run.run_id

    def _experiment(self, client: MlflowClient) -> str:
        """The experiment's id, asked for once."""
        if self._experiment_id is None:
            self._experiment_id = experiment_id(client, self.uri, self.experiment)
        return self._experiment_id


def find_run(client: MlflowClient, experiment: str, key: str) -> str | None:
    """The id of the run with this key; None where the experiment has none."""
    found = client.search_runs([experiment], f"tags.`{KEY_TAG}` = '{key}'", max_results=1)
    return str(found[0].info.run_id) if found else None


def _continue(client: MlflowClient, run: TrackedRun, run_id: str) -> None:
    """Sets a known run running again, unless it is a replay, and reads which metrics it has."""
    if run.record.status is Status.RUNNING:
        client.update_run(run_id, status=Status.RUNNING.value)
    for name in client.get_run(run_id).data.metrics:
        history = sorted(client.get_metric_history(run_id, name), key=lambda metric: metric.timestamp)
        run.logged.update({(name, metric.step): metric.value for metric in history})
