"""Who follows a search from the driver, and how Ray Tune tells them."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from ray.tune import Callback

from mpc.errors import UserError
from tuning.interruption import cut_short, heed


class SearchListener(Protocol):
    """Someone who follows a search from the driver."""

    def on_trial_start(self, trial_id: str, params: dict[str, Any]) -> None:
        """A trial begins, or goes on after a resume."""
        ...

    def on_trial_epoch(self, trial_id: str, metrics: dict[str, Any]) -> None:
        """A trial finished an epoch."""
        ...

    def on_trial_end(self, trial_id: str, status: str) -> None:
        """`finished`, `stopped` (early, by the scheduler or with the hours) or `failed`."""
        ...


_listeners: list[SearchListener] = []  # of this process's search: Tune pickles callbacks, displays are not picklable
_expected = [0]  # trials


@contextmanager
def followed(listeners: Sequence[SearchListener], *, resumed: int) -> Iterator[None]:
    """While it lasts, `Follow` tells these listeners; a search that is resumed has so many trials from the beginning.

    Raises:
        UserError: Tune, which says nothing of it, began another search in the place of one that it could not read.
    """
    _listeners[:], _expected[:] = listeners, [resumed]
    try:
        yield
    finally:
        _listeners.clear()
        _expected[:] = [0]


TRIALS = "trials"
"""Folder of a search with one folder a trial: its record, and what it left."""
STATE = "tune"
"""Folder of Tune's own state below that of a search: one folder a trial, with its checkpoints."""
CELL = "cell"
"""Key of a trial that is one point of a grid: its value holds the name and all settings."""


def settings_of(trial: Any) -> dict[str, Any]:
    """What a trial of Ray Tune tries."""
    settings: dict[str, Any] = trial.config.get(CELL, trial.config)
    return settings


def name_of(trial: Any) -> str:
    """What a trial of Ray Tune is called: the name in its settings, or its id."""
    return str(settings_of(trial).get("name", trial.trial_id))


def ended_how(trial: Any, epochs: int) -> str:
    """`finished`, or `stopped` before its last epoch."""
    return "finished" if trial.last_result.get("epoch", 0) >= epochs else "stopped"


class Follow(Callback):  # type: ignore[misc]
    """Tells the listeners of this process what happens."""

    def __init__(self, epochs: int) -> None:
        self.epochs = epochs
        self.unended: set[str] = set()

    def setup(self, **info: Any) -> None:
        """Tune is about to begin."""
        heed()

    def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """Before anything is started."""
        if len(trials) < _expected[0]:
            raise UserError("Ray Tune cannot read the state of this search (-v says why); search anew in another --out")

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial begins."""
        self.unended.add(name_of(trial))
        for listener in _listeners:
            listener.on_trial_start(name_of(trial), settings_of(trial))

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """A trial reports."""
        for listener in _listeners:
            listener.on_trial_epoch(name_of(trial), result)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial has run to its end, or was stopped."""
        self._end(name_of(trial), ended_how(trial, self.epochs))

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial failed."""
        self._end(name_of(trial), "failed")

    def on_experiment_end(self, trials: list[Any], **info: Any) -> None:
        """The search has ended, and with it trials that had not: Tune tells of no other end of those."""
        for trial in trials:
            if name_of(trial) in self.unended and not cut_short():
                self._end(name_of(trial), ended_how(trial, self.epochs))

    def _end(self, name: str, status: str) -> None:
        self.unended.discard(name)
        for listener in _listeners:
            listener.on_trial_end(name, status)
