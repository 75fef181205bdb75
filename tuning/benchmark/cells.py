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
from tuning.follow import CELL
from tuning.space import apply
from tuning.trial import TuneHost


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
        metric: key of the metrics whose largest value is best.
        use_gpu: train on the GPU that the cell was given.
    """

    def __init__(self, out: str, metric: str, *, use_gpu: bool) -> None:
        super().__init__(out, use_gpu=use_gpu)
        self.out, self.metric = out, metric

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
        out: folder that holds one folder a cell.
        metric: chooses the epoch.
        test: whether the test split is opened at all.
    """
    cell = params[CELL]
    folder, data = storage.join(out, cell["name"]), cell["data"]
    settings = {path: value for path, value in cell.items() if "." in path}
    run = apply(RunConfig.model_validate(methods[cell["method"]]), settings, cell["name"])
    Loop(run, data, read_card(data), CellHost(folder, metric, use_gpu=run.train.use_gpu)).fit()
    if test and not storage.exists(storage.join(folder, METRICS_FILE)):  # else it was killed before Tune noted its end
        with _best(folder) as checkpoint:
            evaluate(checkpoint, data, "test", folder, run.train.eval_batch_size)
    storage.delete(storage.join(folder, BEST))


@contextmanager
def _best(folder: str) -> Iterator[Path]:
    filesystem, path = storage.resolve(storage.join(folder, BEST))
    with opened(tune.Checkpoint(path, filesystem)) as checkpoint:
        assert checkpoint is not None
        yield checkpoint


def _value(line: Metrics, metric: str) -> float:
    value = line.get(metric)
    return -math.inf if value is None else float(value)
