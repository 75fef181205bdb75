"""How long a search will take, before it begins: from trials of its own, else from a few steps timed here."""

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import NamedTuple

import torch

from mpc.method import Batch
from pipeline import storage
from pipeline.card import DatasetCard
from pipeline.config import RunConfig
from pipeline.host import Host, Metrics
from pipeline.loop import Loop
from pipeline.record import METRICS_FILE, read_lines
from tuning.config import SearchConfig
from tuning.follow import TRIALS
from tuning.schedulers import rungs

STEPS = 3
"""Steps that are timed, after one that is not."""


class Pace(NamedTuple):
    """Seconds of one epoch, and what they rest on."""

    seconds: float
    source: str


class Forecast(NamedTuple):
    """What a search will cost."""

    trials: int
    epochs_at_most: int
    """Of all trials, if none stops early."""
    epochs_expected: float
    """If ASHA keeps one trial in `reduction_factor` at each rung; with other schedulers as many as at most."""
    hours_at_most: float
    hours_expected: float


def pace(run: RunConfig, data: str, card: DatasetCard, out: str) -> Pace:
    """What an epoch takes: by the record of the search in `out`, else by steps on random images in this process."""
    trials = storage.join(out, TRIALS)
    files = storage.list_files(trials, [METRICS_FILE]) if storage.exists(trials) else []
    seconds = [line["seconds"] for file in files for line in read_lines(file)]
    if seconds:
        return Pace(sum(seconds) / len(seconds), f"the {len(seconds)} epochs that this search has already trained")
    return _timed(run, data, card)


def forecast(config: SearchConfig, run: RunConfig, trials: int, concurrent: int, epoch: Pace) -> Forecast:
    """Epochs and hours of `trials` trials, `concurrent` at a time; a budget of hours cuts both."""
    limit = config.max_hours or math.inf
    most = trials * run.train.epochs
    expected, left, done = 0.0, float(trials), 0.0
    for rung in [*rungs(config, run.train.epochs), float(run.train.epochs)]:
        expected += left * (rung - done)
        left, done = max(1.0, left / config.reduction_factor), rung
    hours = [min(limit, epochs * epoch.seconds / min(concurrent, trials) / 3600) for epochs in (most, expected)]
    return Forecast(trials, most, expected, hours[0], hours[1])


class _Here(Host):
    """A plain process as host of a loop that only takes steps."""

    rank, world_size = 0, 1

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def last_checkpoint(self) -> AbstractContextManager[Path | None]:
        """There is none."""
        return nullcontext()

    def report(self, metrics: Metrics, checkpoint: Path) -> None:
        """No epoch ends."""

    def log(self, line: Metrics) -> None:
        """Nobody looks."""

    def leave(self, name: str, content: bytes) -> str:
        """Nothing stays of such steps."""
        return name


def _timed(run: RunConfig, data: str, card: DatasetCard) -> Pace:
    """Times training steps and one pass of validation on random images."""
    device = torch.device("cuda" if run.train.use_gpu and torch.cuda.is_available() else "cpu")
    size = run.train.batch_size // run.train.num_workers
    loop = Loop(run, data, card, _Here(device))
    batch = _random_batch(loop, size, device)
    step = _seconds(lambda: loop.train_step(batch), device)
    images = torch.zeros(run.train.eval_batch_size, 1, card.image_size, card.image_size, device=device)
    scored = _seconds(lambda: loop.ema.module(images), device)
    validation = len(card.rows("val")) / (run.train.eval_batch_size * run.train.num_workers) * scored
    source = (
        f"{STEPS} steps and passes of validation timed here on {device.type}, random images; reading, views made on "
        f"CPUs and start-up come on top"
    )
    if 0 < run.worker_gpus < 1:
        source += "; trials that share a GPU slow each other, by how much is not known here"
    return Pace(loop.plan.steps_per_epoch * step + validation, source)


def _random_batch(loop: Loop, size: int, device: torch.device) -> Batch:
    """Noise with one observed finding a row, as large as a batch of training."""
    findings, side = len(loop.card.findings), loop.card.image_size
    views = loop.run.views.strong.count if loop.method.needs_strong and loop.views is None else 0
    images = torch.randint(0, 256, (size * (1 + views), 1, side, side), dtype=torch.uint8, device=device)
    labels = torch.zeros(size, findings, device=device)
    labels[:, 0] = 1.0
    known = torch.ones(size, findings, dtype=torch.bool, device=device)
    strong = images[size:] if views else None
    return Batch(images[:size], strong, labels, labels, known, torch.arange(size, device=device))


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    """The mean of `STEPS` calls after one that warms up."""
    began = 0.0
    for call in range(STEPS + 1):
        if call == 1:
            _wait(device)
            began = time.perf_counter()
        work()
    _wait(device)
    return (time.perf_counter() - began) / STEPS


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
