"""What stays on disk while a search runs: the best of the best trials, and what unfinished ones go on from."""

import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from pyarrow import fs
from ray.tune import Callback
from ray.tune.experiment import Trial

from mpc.errors import UserError
from pipeline import storage
from pipeline.checkpoints import BEST, Found, found_in
from pipeline.record import MetricsLog
from pipeline.worker import STORAGE_NAME
from tuning.config import SearchConfig
from tuning.follow import name_of

log = logging.getLogger(__name__)

LATEST = 2
"""Newest checkpoints of a trial that may go on: after a kill, Tune's state may name the one before the last."""


@contextmanager
def surviving(what: str) -> Iterator[None]:
    """While storage is away a run or a search goes on: what failed is told, and tried again at the next occasion."""
    try:
        yield
    except (UserError, OSError) as error:
        log.warning("%s: %s; it goes on without", what, error)


def best_value(history: Sequence[dict[str, Any]], config: SearchConfig) -> float | None:
    """The best value of the metric in a trial's record."""
    values = [line[config.metric] for line in history if line.get(config.metric) is not None]
    return (max if config.mode == "max" else min)(values, default=None)


def ranked(values: Mapping[str, float | None], config: SearchConfig) -> list[str]:
    """The trials that have a value, by name, the best first; of equals, the first name."""
    valued = {name: value for name, value in values.items() if value is not None}
    return sorted(valued, key=lambda name: (-config.sign * valued[name], name))


class Keep(Callback):  # type: ignore[misc]
    """Deletes checkpoints as soon as nothing will need them; their folders stay, empty.

    Tune's state on disk is older than what happens: after a kill it may name a checkpoint that is gone since, and Tune
    fails a trial for good whose checkpoint has no folder. A trial that finds it empty looks for the newest one itself.

    A trial that may go on keeps its best one and the newest, and any that another trial goes on from; of trials that
    have ended, the best `keep_trials` keep their best one.

    Args:
        config: of the search.
        state: URI of Tune's own folder, which holds one folder a trial.
        trials: URI of the folder with one folder a trial that holds its metrics.jsonl.
    """

    def __init__(self, config: SearchConfig, state: str, trials: str) -> None:
        self.config, self.state, self.trials = config, state, trials
        # a population takes over checkpoints of its last comparison
        self.latest = LATEST + (config.pbt.interval if config.scheduler == "pbt" else 0)
        self._values: dict[str, float | None] = {}
        self._swept: set[str] = set()

    def on_trial_save(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """A trial has written a checkpoint."""
        with surviving(f"old checkpoints of trial {name_of(trial)}"):
            self._thin(trial, trials)

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """A trial has ended: if it is among the best its best checkpoint stays, else none."""
        with surviving("checkpoints of trials that have ended"):
            self._rank([*(other for other in trials if other.status == Trial.TERMINATED), trial], trials)

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """A trial has failed for good."""
        with surviving(f"checkpoints of trial {name_of(trial)}"):
            self._delete(name_of(trial), _gone_on_from(trials, trial))

    def _thin(self, trial: Trial, trials: list[Trial]) -> None:
        """Leaves a trial what it, or another one, may go on from."""
        if not trial.is_finished():
            found = found_in(storage.join(self.state, name_of(trial)))
            self._leave(found, [*found[-self.latest :], *self._best(name_of(trial), found)], _gone_on_from(trials))

    def _best(self, name: str, found: Sequence[Found]) -> list[Found]:
        """Of a trial's checkpoints the one with the best value, if any has one."""
        best = best_of(found, MetricsLog(storage.join(self.trials, name)).read(), self.config)
        return [] if best is None else [best]

    def _leave(self, found: Sequence[Found], wanted: Sequence[Found], needed: Collection[str]) -> None:
        """Deletes of what was found all but what is wanted here or needed elsewhere."""
        paths = {item.checkpoint.path for item in wanted}
        for item in found:
            if item.checkpoint.path not in paths and item.checkpoint.path not in needed:
                item.checkpoint.filesystem.delete_dir_contents(item.checkpoint.path)

    def _rank(self, ended: list[Trial], trials: list[Trial]) -> None:
        """Deletes what is not the best checkpoint of one of the best trials that have ended."""
        for name in {name_of(trial) for trial in ended} - self._values.keys():
            self._values[name] = best_value(MetricsLog(storage.join(self.trials, name)).read(), self.config)
        best = ranked(self._values, self.config)[: self.config.keep_trials]
        needed = _gone_on_from(trials, ended[-1])
        for trial in ended:
            name = name_of(trial)
            if name in best:
                found = found_in(storage.join(self.state, name))
                self._leave(found, self._best(name, found), needed)
            elif name not in self._swept:
                self._delete(name, needed)
                self._swept.add(name)

    def _delete(self, name: str, needed: Collection[str]) -> None:
        """Deletes what a trial leaves, but for what others need."""
        delete_checkpoints(self.state, name, needed)
        delete_job(self.trials, name)


def _gone_on_from(trials: list[Trial], ended: Trial | None = None) -> set[str]:
    """Checkpoints that trials which are not through will go on from, perhaps another one's."""
    left = [trial for trial in trials if trial is not ended and not trial.is_finished()]
    return {trial.checkpoint.path for trial in left if trial.checkpoint}


def best_of(found: Sequence[Found], history: Sequence[dict[str, Any]], config: SearchConfig) -> Found | None:
    """The checkpoint with the best value of the metric; of equals, the latest.

    Only those count whose epoch is in the trial's record as it was stored: population based training may take a trial
    back to an epoch of another one, and its own epochs since then are no part of what it became.
    """
    recorded = {(line["epoch"], line.get(config.metric)) for line in history}
    valued = [item for item in found if config.metric in item.metrics]
    kept = [item for item in valued if (item.metrics["epoch"], item.metrics[config.metric]) in recorded]
    return max(reversed(kept), key=lambda item: config.sign * item.metrics[config.metric], default=None)


def delete_checkpoints(state: str, name: str, needed: Collection[str] = (), *, folders: bool = False) -> None:
    """Of a trial those that Ray Tune keeps, half-written ones too.

    Args:
        state: URI of Tune's own folder.
        name: of the trial.
        needed: paths of checkpoints that stay.
        folders: delete the folders too, as nothing goes on from them; else they stay, empty.
    """
    filesystem, path = storage.resolve(storage.join(state, name))
    entries = filesystem.get_file_info(fs.FileSelector(path, allow_not_found=True, recursive=not folders))
    places = {entry.path if folders else entry.path.rpartition("/")[0] for entry in entries if folders or entry.is_file}
    for place in places:  # emptying what is empty would be three requests on S3
        if place.rpartition("/")[2].startswith("checkpoint_") and place not in needed:
            (filesystem.delete_dir if folders else filesystem.delete_dir_contents)(place)


def delete_job(trials: str, name: str) -> None:
    """Of a trial what a Ray Train job inside it keeps.

    Args:
        trials: URI of the folder with one folder a trial.
        name: of the trial.
    """
    for part in (STORAGE_NAME, BEST):
        storage.delete(storage.join(trials, name, part))
