"""Replays runs from their folders to an MLflow server: what was lost while it was away, or all of it on another one."""

from typing import NamedTuple

from mpc.errors import MissingError, UserError
from pipeline.record import MetricsLog
from tuning import journal
from tuning.listeners import RECORD, log_data, records_below
from tuning.record import Status, epoch_metrics
from tuning.searchers import COST
from tuning.tracking import TrackedRun, Tracker


class SyncSummary(NamedTuple):
    """What a replay found and did."""

    runs: int
    epochs: int
    uri: str


def sync(folder: str, tracking_uri: str) -> SyncSummary:
    """Sends every run below `folder` to `tracking_uri`; runs and epochs that are there already are left alone.

    Args:
        folder: the `--out` of a training run or of a search.
        tracking_uri: server or database.

    Raises:
        UserError: no run was recorded there, the server does not take them, or refuses some.
    """
    records = records_below(folder)
    if not records:
        raise MissingError(f"{folder}: no {RECORD} below it; give the --out folder of a train or tune run")
    trackers: dict[str, Tracker] = {}
    runs: dict[str, TrackedRun] = {}
    epochs = 0
    for place, record in records:
        if record.experiment not in trackers:
            trackers[record.experiment] = Tracker(tracking_uri, record.experiment)
        tracker = trackers[record.experiment]
        run = runs[record.key] = tracker.start_run(record, runs.get(record.parent or ""))
        tracker.set_tags(run, record.tags)
        log_data(tracker, run)
        if record.config:
            tracker.log_config(run, record.config)
        lines = MetricsLog(place).read()
        for line in lines:
            tracker.log_epoch(run, epoch_metrics(line), int(line["epoch"]))
        epochs += len(lines)
        cost = journal.read(place).get(COST)  # reckoned over a trial, it is in no epoch's line
        if lines and cost is not None:
            tracker.log_epoch(run, {COST: cost}, int(lines[-1]["epoch"]))
        if record.status is not Status.RUNNING:
            tracker.end_run(run, record.status)
    left = sum(tracker.close() for tracker in trackers.values())
    if left:
        raise UserError(f"MLflow at {tracking_uri} did not take {left} records; see that it runs, then sync again")
    refusals = [(tracker.dropped, tracker.refusal) for tracker in trackers.values() if tracker.dropped]
    if refusals:
        count = sum(dropped for dropped, _ in refusals)
        raise UserError(
            f"MLflow at {tracking_uri} refused {count} of the records: {refusals[0][1]}; all others are there"
        )
    return SyncSummary(len(runs), epochs, tracking_uri)
