"""Runs and searches on the screen: `pipeline.train.Listener` and `tuning.follow.SearchListener` for people."""

from typing import Any

from infra.console import Display
from pipeline.card import DatasetCard
from pipeline.config import RunConfig
from tuning.config import SearchConfig


class EpochLines:
    """Moves a display with the steps of a run and leaves one line an epoch behind."""

    def __init__(self, display: Display) -> None:
        self.display, self.steps, self.epochs = display, 0, 0

    def on_start(self, run: RunConfig, card: DatasetCard) -> None:
        """Knows the length of the run from its data."""
        self.epochs = run.train.epochs
        self.steps = self.epochs * (len(card.rows("train")) // run.train.batch_size)
        self.display(0, self.steps, "starting")

    def on_log(self, line: dict[str, Any]) -> None:
        """Losses, pace and waiting inside an epoch."""
        self.display(int(line["step"]), self.steps, f"{_losses(line)}, {_pace(line)}")

    def on_epoch(self, metrics: dict[str, Any]) -> None:
        """One line: losses and validation scores."""
        scores = f"macro AUROC {_score(metrics, 'val_macro_auroc')}, AP {_score(metrics, 'val_macro_ap')}"
        self.display.line(f"epoch {metrics['epoch']:g}/{self.epochs}: {_losses(metrics)}, validation {scores}")
        self.display(int(metrics["step"]), self.steps, _pace(metrics))

    def on_end(self, status: str, best_checkpoint: str | None) -> None:
        """The verb itself says how a run ended."""


class TrialLines:
    """Moves a display with the trials of a search and leaves one line a trial behind.

    Args:
        display: where to.
        config: names the metric and how many trials there will be.
        epochs: of a trial that runs to its end.
    """

    def __init__(self, display: Display, config: SearchConfig, epochs: int) -> None:
        self.display, self.config, self.epochs = display, config, epochs
        self.best_of: dict[str, float] = {}
        self.epoch_of: dict[str, int] = {}
        self.ended: set[str] = set()

    def on_trial_start(self, trial_id: str, params: dict[str, Any]) -> None:
        """Shows that the search moves."""
        self.epoch_of.setdefault(trial_id, 0)
        self._show(f"{trial_id} starts")

    def on_trial_epoch(self, trial_id: str, metrics: dict[str, Any]) -> None:
        """Keeps the trial's best value."""
        value = metrics.get(self.config.metric)
        if value is not None:
            best = self.best_of.get(trial_id, value)
            self.best_of[trial_id] = max(best, value) if self.config.mode == "max" else min(best, value)
        self.epoch_of[trial_id] = int(metrics.get("epoch", 0))
        self._show(f"{trial_id} epoch {self.epoch_of[trial_id]}/{self.epochs}")

    def on_trial_end(self, trial_id: str, status: str) -> None:
        """One line: how the trial ended, after how many epochs, with which best value."""
        self.ended.add(trial_id)
        value = f"{self.best_of[trial_id]:.3f}" if trial_id in self.best_of else "–"
        epochs = self.epoch_of.get(trial_id, 0)
        self.display.line(f"trial {trial_id}: {status} after {epochs} epochs, {self.config.metric} {value}")
        self._show(f"{trial_id} {status}")

    def _show(self, text: str) -> None:
        """Epochs done, those that ended trials need no more among them, and the best value so far."""
        choose = max if self.config.mode == "max" else min
        best = f", best {choose(self.best_of.values()):.3f}" if self.best_of else ""
        done = sum(self.epochs if trial in self.ended else epoch for trial, epoch in self.epoch_of.items())
        trials = f"{len(self.ended)} of {self.config.max_trials} trials done"
        self.display(done, self.config.max_trials * self.epochs, f"epochs, {trials}{best}; {text}")


def _losses(line: dict[str, Any]) -> str:
    """The loss, and the terms that the run's method has."""
    terms = [(name.removeprefix("loss_"), value) for name, value in line.items() if name.startswith("loss")]
    return ", ".join(f"{short} {value:.4f}" for short, value in terms if value is not None)


def _pace(line: dict[str, Any]) -> str:
    """Images a second over all workers, and the share of the time that went by waiting for data."""
    return f"{line['images_per_s']:.0f} images/s, {line['data_wait_share']:.1%} waiting for data"


def _score(metrics: dict[str, Any], name: str) -> str:
    """Three decimals, or a dash where no finding had both outcomes."""
    return "–" if metrics.get(name) is None else f"{metrics[name]:.3f}"
