"""What runs in each worker of Ray Train: the loop, and its host, which stores checkpoints and passes news on."""

import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Any

import ray.train
import ray.train.collective
from ray.train import Checkpoint, CheckpointUploadMode
from ray.train.torch import get_device
from ray.util.queue import Queue

from pipeline import storage
from pipeline.card import read_card
from pipeline.checkpoints import STEP_NAME, opened, remember_best, sweep, upload
from pipeline.config import RunConfig
from pipeline.divergence import DivergedError
from pipeline.host import Host, Metrics, Notice
from pipeline.loop import Loop
from pipeline.record import MetricsLog, is_epoch
from pipeline.wish import Wish

STORAGE_NAME = "train"
"""Folder below a run that Ray Train keeps its checkpoints in."""
TELL_SECONDS, LOOK_SECONDS = 0.2, 5.0


class TrainHost(Host):
    """A worker of Ray Train as host of the loop.

    Args:
        run: the resolved configuration.
        out: the run's folder.
        news: to the driver.
        wish: of the driver, that the run should end.
    """

    def __init__(self, run: RunConfig, out: str, news: Queue, wish: Wish) -> None:
        context = ray.train.get_context()
        self.rank, self.world_size = context.get_world_rank(), context.get_world_size()
        self.device = get_device()
        self.run, self.out, self.place = run, out, storage.join(out, STORAGE_NAME)
        self.news, self.wish = news, wish
        self.uploading = threading.Semaphore()
        self.look_at = 0
        self.leaving: set[str] = set()
        self.told = self.looked = (0, 0.0)

    @contextmanager
    def last_checkpoint(self) -> Iterator[Path | None]:
        """Downloads the checkpoint that Ray Train continues from; what a kill left half written is deleted."""
        if self.rank == 0:
            self.scratch = emptied(f"mpc-cxr-{blake2b(self.out.encode(), digest_size=8).hexdigest()}")
            stored = ray.train.get_all_reported_checkpoints()
            sweep(self.place, STEP_NAME, {Path(entry.checkpoint.path).name for entry in stored})
        with opened(ray.train.get_checkpoint()) as folder:
            yield folder

    def begun(self, step: int, metrics: Metrics) -> None:
        """Tells the driver where the run goes on; an epoch that a kill kept from the record gets its line."""
        self.look_at, self.looked = step + 1, (step, time.monotonic())
        if self.rank == 0:
            if is_epoch(metrics):
                MetricsLog(self.out).add_missing(metrics)
            self._tell("begun", {"step": step, "workers": self.world_size})

    def report(self, metrics: Metrics, checkpoint: Path) -> None:
        """Hands the checkpoint over to a thread that stores it; waits only while the one before is not stored yet."""
        saved = None
        if self.scratch is not None:  # on rank 0
            self.uploading.acquire()
            saved = Checkpoint.from_directory(checkpoint.rename(self.scratch / checkpoint.name))
        ray.train.report(
            metrics,
            checkpoint=saved,
            checkpoint_dir_name=checkpoint.name,
            checkpoint_upload_mode=CheckpointUploadMode.ASYNC,
            checkpoint_upload_fn=partial(self._store, whole_epoch=is_epoch(metrics)),
            delete_local_checkpoint_after_upload=False,
        )

    def _store(self, checkpoint: Checkpoint, name: str, *, whole_epoch: bool) -> Checkpoint:
        """Copies a checkpoint to the run's storage, and once more if it is the best so far.

        Where that fails Ray tries three times, then ends the worker.
        """
        upload(Path(checkpoint.path), storage.join(self.place, name))
        if whole_epoch:
            remember_best(self.place, name, f"val_{self.run.train.metric}")
        shutil.rmtree(checkpoint.path)
        self.uploading.release()
        held = ray.train.get_context().get_storage()
        return Checkpoint(held.build_checkpoint_path_from_name(name), held.storage_filesystem)

    def log(self, line: Metrics) -> None:
        """Sends a line to the driver without waiting for it; that of rank 0 stands for the run."""
        self._tell("pace", {"rank": self.rank, **line})
        if self.rank == 0:
            self._tell("log", line)

    def notice(self, step: int) -> Notice:
        """Looks about every five seconds whether the driver wants an end or a node will leave; all ranks look together.

        Rank 0 says after how many steps they look again.
        """
        now = time.monotonic()
        if self.rank == 0 and now - self.told[1] >= TELL_SECONDS:
            self.told = (step, now)
            self._tell("reached", {"step": step})
        if step < self.look_at:
            return "go"
        pace = (step - self.looked[0]) / (now - self.looked[1])
        again = step + max(1, round(pace * LOOK_SECONDS))
        self.looked = (step, now)
        ending = self.rank == 0 and self.wish.made()
        ending, self.look_at = ray.train.collective.broadcast_from_rank_zero((ending, again))
        return "stop" if ending else self._departures()

    def _departures(self) -> Notice:
        """`save` once for every node that Ray says will leave."""
        info = ray.train.get_preemption_info()
        fresh = set(info.preempted_node_ids) - self.leaving if info else set()
        self.leaving |= fresh
        if fresh and self.rank == 0:
            self._tell("leaving", {"ranks": info.preempted_ranks})
        return "save" if fresh else "go"

    def leave(self, name: str, content: bytes) -> str:
        """A file in the run's folder."""
        place = storage.join(self.out, name)
        storage.write_bytes(place, content)
        return place

    def _tell(self, kind: str, line: Metrics) -> None:
        """Sends to the driver without waiting."""
        self.news.actor.put_nowait.remote((kind, line))


def emptied(name: str) -> Path:
    """A temporary folder of this user alone, without what a killed worker left there."""
    folder = Path(tempfile.gettempdir(), name)
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(mode=0o700)
    return folder


def work(config: dict[str, Any]) -> str | None:
    """The loop of one worker, to its end; the text of a divergence, which trying again would only repeat."""
    run = RunConfig.model_validate(config["run"])
    host = TrainHost(run, config["out"], config["news"], config["wish"])
    try:
        Loop(run, config["data"], read_card(config["data"]), host).fit()
    except DivergedError as error:
        return str(error)
    return None
