"""How long training stands still for a checkpoint: `python benchmarks/checkpoints.py [--out s3://BUCKET/FOLDER]`.

DenseNet-121 trains as one worker of Ray Train in three ways that take turns: without checkpoints inside the epoch, with
those of `mpc-cxr train`, which a thread uploads, and with Ray Train's own `report`, which waits for the upload.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

import ray.train
from ray.train import Checkpoint, CheckpointConfig
from ray.train.torch import TorchTrainer

from pipeline import runtime, storage
from pipeline.card import read_card
from pipeline.config import RunConfig
from pipeline.follow import queue_beside_driver
from pipeline.host import Metrics
from pipeline.loop import Loop
from pipeline.prepare_config import PhantomConfig, PrepareConfig
from pipeline.shards import prepare
from pipeline.wish import Wish
from pipeline.worker import STORAGE_NAME, TrainHost


class Timed(Loop):
    """The loop with a watch on its checkpoints, those at the ends of epochs left out."""

    def fit(self) -> Metrics:
        """Also notes the seconds of the whole run, from the first batch on."""
        self.stood: list[float] = []
        self.began = 0.0
        metrics = super().fit()
        return {**metrics, "stood": self.stood, "ran": time.perf_counter() - self.began}

    def train_step(self, batch: Any) -> None:
        """Starts the watch of the run."""
        self.began = self.began or time.perf_counter()
        super().train_step(batch)

    def _report(self, metrics: Metrics, thresholds: dict[str, float]) -> None:
        start = time.perf_counter()
        super()._report(metrics, thresholds)
        if self.step % self.plan.steps_per_epoch:
            self.stood.append(time.perf_counter() - start)


class Waiting(TrainHost):
    """A worker that reports as Ray Train's guide shows it: it returns once the checkpoint is stored."""

    def report(self, metrics: Metrics, checkpoint: Path) -> None:
        """Waits for the upload."""
        ray.train.report(metrics, checkpoint=Checkpoint.from_directory(checkpoint), checkpoint_dir_name=checkpoint.name)


WAYS: dict[str, tuple[type[TrainHost], int]] = {  # name: who reports, steps between two checkpoints
    "none inside the epoch": (TrainHost, 0),
    "ours, uploaded beside training": (TrainHost, 1),
    "Ray Train's report, which waits": (Waiting, 1),
}


class Measured(NamedTuple):
    """One run."""

    stood: list[float]
    """Seconds of every checkpoint inside the epoch."""
    ran: float
    """Seconds from the first step to the end."""


def work(config: dict[str, Any]) -> dict[str, Any]:
    """What the worker runs."""
    run, host = RunConfig.model_validate(config["run"]), WAYS[config["way"]][0]
    worker = host(run, config["out"], config["news"], config["wish"])
    return Timed(run, config["data"], read_card(config["data"]), worker).fit()


def measure(way: str, data: str, out: str, every: int) -> Measured:
    """One run under `out`, which it deletes."""
    run = RunConfig.model_validate(
        {
            "model": {"backbone": "densenet121", "weights": "none"},
            "data": {"tasks": 1, "task_cpus": 0.25},
            "train": {"epochs": 1, "batch_size": 4, "checkpoint_every": every * WAYS[way][1], "method": "an"},
        }
    )
    news, wish = queue_beside_driver(), Wish()
    filesystem, path = storage.resolve(out)
    config = {"way": way, "run": run.model_dump(mode="json"), "data": data, "out": out, "news": news, "wish": wish}
    trainer = TorchTrainer(
        work,
        train_loop_config=config,
        run_config=ray.train.RunConfig(
            name=STORAGE_NAME,
            storage_path=path,
            storage_filesystem=filesystem,
            checkpoint_config=CheckpointConfig(num_to_keep=1),
        ),
    )
    try:
        result = trainer.fit().return_value
    finally:
        news.shutdown(force=True)
        storage.delete(out)
    return Measured(result["stood"], result["ran"])


def table(rows: dict[str, list[Measured]], show: Callable[[str], None]) -> None:
    """Medians over all runs of a way; what it adds is the run's time without the one of the first way."""
    bare = statistics.median(run.ran for run in rows[next(iter(WAYS))])
    show(f"{'checkpoints':34}{'stands still, s each':>22}{'adds to the run, s each':>26}")
    for way, runs in rows.items():
        stood = [seconds for run in runs for seconds in run.stood]
        ran = statistics.median(run.ran for run in runs)
        if stood:
            show(f"{way:34}{statistics.median(stood):22.2f}{(ran - bare) / len(runs[0].stood):26.2f}")
    show(f"the run without them took {bare:.1f} s")


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", help="folder or s3:// prefix of the checkpoints; a temporary folder by default")
    parser.add_argument("--images", type=int, default=320)
    parser.add_argument("--every", type=int, default=10, help="steps between two checkpoints")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    rows: dict[str, list[Measured]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as folder:
        runtime.start()
        data = str(Path(folder, "data"))
        prepare(PrepareConfig(image_size=64, phantom=PhantomConfig(images=args.images)), None, data)
        for _ in range(args.rounds):
            for way in WAYS:
                out = storage.join(args.out or folder, f"run-{uuid4().hex[:8]}")
                rows[way].append(measure(way, data, out, args.every))
        runtime.stop()
    table(rows, print)


if __name__ == "__main__":
    main()
