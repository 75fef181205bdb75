"""One trial of a search: the training loop as a plain Tune function, or as a Ray Train job with several workers."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from ray import tune

from pipeline import storage
from pipeline.card import DatasetCard, read_card
from pipeline.checkpoints import opened
from pipeline.config import RunConfig
from pipeline.loop import Host, Loop, Metrics
from pipeline.record import MetricsLog
from tuning.space import apply


class TuneHost(Host):
    """A trial of Ray Tune as host of the loop.

    Args:
        out: folder of this trial, for metrics.jsonl.
        use_gpu: train on the GPU that the trial was given.
    """

    rank, world_size = 0, 1

    def __init__(self, out: str, *, use_gpu: bool) -> None:
        self.device = torch.device("cuda" if use_gpu else "cpu")
        self.out, self.metrics = out, MetricsLog(out)

    @contextmanager
    def last_checkpoint(self) -> Iterator[Path | None]:
        """The trial's own checkpoint, after the search was resumed."""
        with opened(tune.get_checkpoint()) as folder:
            yield folder

    def report(self, metrics: Metrics, checkpoint: Path) -> None:
        """Writes the trial's record first: a stopped trial is killed inside `tune.report`."""
        self.metrics.add(metrics)
        tune.report(metrics, checkpoint=tune.Checkpoint.from_directory(checkpoint))

    def log(self, line: Metrics) -> None:
        """Trials show their epochs only."""

    def leave(self, name: str, content: bytes) -> str:
        """A file in the trial's folder."""
        place = storage.join(self.out, name)
        storage.write_bytes(place, content)
        return place


class _Forward:
    """Hands the epochs of a Ray Train job inside a trial to Tune."""

    def on_start(self, run: RunConfig, card: DatasetCard) -> None:
        """Nothing to do."""

    def on_log(self, line: Metrics) -> None:
        """Trials show their epochs only."""

    def on_epoch(self, metrics: Metrics) -> None:
        """Reports an epoch; the checkpoints stay with Ray Train."""
        tune.report(metrics)

    def on_end(self, status: str, best_checkpoint: str | None) -> None:
        """Nothing to do."""


def run_trial(params: dict[str, Any], *, base: dict[str, Any], data: str, out: str) -> None:
    """Trains with `params`, dotted paths and values, over the configuration `base`; `out` holds one folder a trial."""
    trial_id = tune.get_context().get_trial_id()
    run = apply(RunConfig.model_validate(base), params, f"trial {trial_id}")
    # a trial reports and saves at the ends of epochs alone: the scheduler must find its metric in every report
    run = run.model_copy(update={"train": run.train.model_copy(update={"checkpoint_every": 0})})
    folder = storage.join(out, trial_id)
    if run.train.num_workers > 1:
        from pipeline.train import train

        train(run, data, folder, resume=storage.exists(folder), listeners=[_Forward()])
        return
    Loop(run, data, read_card(data), TuneHost(folder, use_gpu=run.train.use_gpu)).fit()
