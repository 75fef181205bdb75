"""One cell of a benchmark: a method with its settings, on one data set, with one seed; trained and, at last, tested."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from ray import tune

from pipeline import storage
from pipeline.card import read_card
from pipeline.checkpoints import BEST, opened, publish
from pipeline.config import RunConfig
from pipeline.evaluate import METRICS_FILE, evaluate
from pipeline.host import Metrics
from pipeline.loop import Loop
from tuning.follow import CELL, STATE
from tuning.space import apply
from tuning.trial import TuneHost

CELLS = "cells"
"""Folder of a stage with one folder a cell."""


class Cell(NamedTuple):
    """What one trial of the grid trains."""

    method: str
    seed: int
    fold: int
    trial: int | None
    """Which of the settings that the method tries while tuning; None in the table's own stage."""
    settings: dict[str, Any]
    """Dotted paths and values over the method's configuration."""
    data: str
    """URI of the prepared data set."""

    @property
    def name(self) -> str:
        """Unique within its stage: also the name of its folder."""
        tried = "" if self.trial is None else f"-try{self.trial}"
        return f"{self.method}{tried}-seed{self.seed}-fold{self.fold}"

    def params(self) -> dict[str, Any]:
        """The cell as Ray Tune carries it; keys with a dot are settings."""
        seeds = {"data.draw_seed": self.seed, "train.seed": self.seed}
        return {"name": self.name, "method": self.method, "data": self.data, **seeds, **self.settings}


class CellHost(TuneHost):
    """A cell's host keeps the best epoch beside the record, so that the cell itself can test it.

    Args:
        out: folder of the cell.
        state: folder of the cell with Tune.
        metric: key of the metrics whose largest value is best.
        use_gpu: train on the GPU that the cell was given.
    """

    def __init__(self, out: str, state: str, metric: str, *, use_gpu: bool) -> None:
        super().__init__(out, state, use_gpu=use_gpu)
        self.metric = metric

    def report(self, metrics: Metrics, checkpoint: Path) -> None:
        """Keeps the checkpoint where no earlier epoch was as good."""
        earlier = [_value(line, self.metric) for line in self.metrics.read() if line["epoch"] < metrics["epoch"]]
        if _value(metrics, self.metric) > max(earlier, default=-math.inf) or not earlier:
            publish(tune.Checkpoint.from_directory(checkpoint), self.out)
        super().report(metrics, checkpoint)


def run_cell(
    params: dict[str, dict[str, Any]], *, methods: Mapping[str, Any], out: str, metric: str, test: bool
) -> None:
    """Trains a cell; with `test`, scores the test split with its best epoch into the cell's folder.

    Args:
        params: `Cell.params` under the key `cell`.
        methods: configuration of every method, as JSON.
        out: folder of the stage.
        metric: chooses the epoch.
        test: whether the test split is opened at all.
    """
    cell = params[CELL]
    (folder, state), data = (storage.join(out, part, cell["name"]) for part in (CELLS, STATE)), cell["data"]
    settings = {path: value for path, value in cell.items() if "." in path}
    run = apply(RunConfig.model_validate(methods[cell["method"]]), settings, cell["name"])
    host, best = CellHost(folder, state, metric, use_gpu=run.train.use_gpu), storage.join(folder, BEST)
    history = host.metrics.read()
    if history and history[-1]["epoch"] >= run.train.epochs and not storage.exists(best):
        tune.report(history[-1])  # it was through when its driver was killed, and Tune had not noted it
        return
    Loop(run, data, read_card(data), host).fit()
    host.end()
    if test and not storage.exists(storage.join(folder, METRICS_FILE)):  # else it was killed in the last lines here
        with _opened(best) as checkpoint:
            evaluate(checkpoint, data, "test", folder, run.train.eval_batch_size)
    storage.delete(best)


@contextmanager
def _opened(best: str) -> Iterator[Path]:
    filesystem, path = storage.resolve(best)
    with opened(tune.Checkpoint(path, filesystem)) as checkpoint:
        assert checkpoint is not None
        yield checkpoint


def _value(line: Metrics, metric: str) -> float:
    value = line.get(metric)
    return -math.inf if value is None else float(value)
