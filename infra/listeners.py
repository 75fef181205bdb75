"""A training run on the screen: `pipeline.train.Listener` for people."""

from typing import Any

from infra.console import Display
from pipeline.card import DatasetCard
from pipeline.config import RunConfig

LOSSES = {"loss": "loss", "loss_ipc": "ipc", "loss_fpc": "fpc", "loss_btc": "btc"}


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
        """Losses and pace inside an epoch."""
        self.display(int(line["step"]), self.steps, f"{_losses(line)}, {line['images_per_s']:.0f} images/s")

    def on_epoch(self, metrics: dict[str, Any]) -> None:
        """One line: losses and validation scores."""
        scores = f"macro AUROC {_score(metrics, 'val_macro_auroc')}, AP {_score(metrics, 'val_macro_ap')}"
        self.display.line(f"epoch {metrics['epoch']:g}/{self.epochs}: {_losses(metrics)}, validation {scores}")
        self.display(int(metrics["step"]), self.steps, f"{metrics['images_per_s']:.0f} images/s")

    def on_end(self, status: str, best_checkpoint: str | None) -> None:
        """The verb itself says how a run ended."""


def _losses(line: dict[str, Any]) -> str:
    """The terms of the loss that this run has."""
    return ", ".join(f"{short} {line[name]:.4f}" for name, short in LOSSES.items() if line.get(name) is not None)


def _score(metrics: dict[str, Any], name: str) -> str:
    """Three decimals, or a dash where no finding had both outcomes."""
    return "–" if metrics.get(name) is None else f"{metrics[name]:.3f}"
