"""trial.json: what a trial tries, when it began, how it ended, what it cost; readable without Tune."""

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ray.tune import Callback
from ray.tune.experiment import Trial

from mpc.errors import MissingError
from pipeline import storage
from tuning.follow import ended_how, name_of, settings_of
from tuning.interruption import cut_short
from tuning.keeping import surviving
from tuning.searchers import COST

FILE = "trial.json"


class Journal(Callback):  # type: ignore[misc]
    """Writes the file when a trial begins, and again when it has ended.

    Args:
        trials: URI of the folder with one folder a trial.
        epochs: of a trial that runs to its end.
    """

    def __init__(self, trials: str, epochs: int) -> None:
        self.trials, self.epochs = trials, epochs

    def on_trial_start(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """A trial begins, or goes on."""
        with surviving(f"{FILE} of trial {name_of(trial)}"):
            note = read(self._folder(trial))
            if not note or note.get("status") == "failed":  # which is tried again
                started = note.get("started", time.time())
                self._write(trial, {"settings": settings_of(trial), "started": started})

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """A trial has run to its end, or was stopped."""
        self._end(trial, ended_how(trial, self.epochs))

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """A trial failed."""
        file = Path(trial.error_file or "")
        said = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
        self._end(trial, "failed", last_line(said))

    def on_experiment_end(self, trials: list[Trial], **info: Any) -> None:
        """The search has ended, and with it trials that had not: Tune tells of no other end of those."""
        if cut_short():
            return
        for trial in trials:
            with surviving(f"{FILE} of trial {name_of(trial)}"):
                note = read(self._folder(trial))
                if note and "ended" not in note:
                    self._end(trial, ended_how(trial, self.epochs))

    def _end(self, trial: Trial, status: str, error: str | None = None) -> None:
        with surviving(f"{FILE} of trial {name_of(trial)}"):
            known = read(self._folder(trial)) or {"settings": settings_of(trial)}
            if ended_well(known):  # told again after a resume
                return
            cost = (trial.last_result or {}).get(COST)
            self._write(trial, {**known, "ended": time.time(), "status": status, "error": error, COST: cost})

    def _write(self, trial: Trial, note: dict[str, Any]) -> None:
        uri = storage.join(self._folder(trial), FILE)
        storage.write_bytes(uri, json.dumps(note, indent=1, default=str).encode())

    def _folder(self, trial: Trial) -> str:
        return storage.join(self.trials, name_of(trial))


def last_line(text: str) -> str | None:
    """Of a traceback what was raised; None of nothing."""
    return text.strip().splitlines()[-1][:500] if text.strip() else None


def ended_well(note: Mapping[str, Any]) -> bool:
    """Whether a trial with this note ran to its end or was stopped: nothing of it is left to run."""
    return note.get("status") in ("finished", "stopped")


def read(folder: str) -> dict[str, Any]:
    """The file in a trial's folder; empty where there is none."""
    try:
        note: dict[str, Any] = json.loads(storage.read_bytes(storage.join(folder, FILE)))
    except MissingError:
        return {}
    return note
