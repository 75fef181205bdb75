"""One training run as a Ray Train job: any number of workers, continued after a fault or with `resume`."""

import logging
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import ray
import ray.train
from ray.train import Checkpoint, CheckpointConfig, FailureConfig, ScalingConfig, UserCallback
from ray.train.torch import TorchTrainer, get_device
from ray.util.queue import Empty, Queue

from mpc.build import build_method
from mpc.errors import UserError
from pipeline import runtime, storage
from pipeline.card import DatasetCard, read_card
from pipeline.checkpoints import opened, publish
from pipeline.config import RunConfig
from pipeline.host import Metrics
from pipeline.loop import Loop
from pipeline.plan import make_plan
from pipeline.record import MetricsLog, claim
from pipeline.scoring import require_validation
from pipeline.setup import make_model

log = logging.getLogger(__name__)

STORAGE_NAME = "train"


class Listener(Protocol):
    """Someone who follows a run from the driver: a tracker, a progress display."""

    def on_start(self, run: RunConfig, card: DatasetCard) -> None:
        """Before the first step."""
        ...

    def on_log(self, line: Metrics) -> None:
        """Every `train.log_every` steps: step, loss terms, images/s, share of data wait, seconds left."""
        ...

    def on_epoch(self, metrics: Metrics) -> None:
        """After an epoch's checkpoint is stored."""
        ...

    def on_end(self, status: str, best_checkpoint: str | None) -> None:
        """`FINISHED` or `FAILED`."""
        ...


@dataclass(frozen=True)
class TrainResult:
    """What a finished run leaves."""

    best_checkpoint: str
    """URI of the checkpoint with the best validation metric."""
    metrics: Metrics
    """Metrics of the best checkpoint's epoch."""
    history: list[Metrics]
    """Metrics of every epoch, in order."""


class TrainHost:
    """A worker of Ray Train as host of the loop."""

    def __init__(self, queue: Queue) -> None:
        context = ray.train.get_context()
        self.rank, self.world_size = context.get_world_rank(), context.get_world_size()
        self.device = get_device()
        self.queue = queue

    @contextmanager
    def last_checkpoint(self) -> Iterator[Path | None]:
        """Downloads the checkpoint that Ray Train continues from."""
        with opened(ray.train.get_checkpoint()) as folder:
            yield folder

    def report(self, metrics: Metrics, checkpoint: Path) -> None:
        """Uploads the checkpoint from rank 0; a barrier for all ranks."""
        saved = Checkpoint.from_directory(checkpoint) if self.rank == 0 else None
        ray.train.report(metrics, checkpoint=saved, checkpoint_dir_name=checkpoint.name)

    def log(self, line: Metrics) -> None:
        """Sends a line to the driver without waiting for it."""
        self.queue.actor.put_nowait.remote(("log", line))


class _Recorder(UserCallback):  # type: ignore[misc]
    """Writes metrics.jsonl once an epoch's checkpoint is stored; runs beside Ray Train's controller."""

    def __init__(self, out: str, queue: Queue) -> None:
        self.log = MetricsLog(out)
        self.queue = queue

    def after_report(self, run_context: Any, metrics: list[Metrics], checkpoint: Checkpoint | None) -> None:
        epoch = metrics[0]
        if "val_macro_auroc" in epoch:  # checkpoints inside an epoch carry their position alone
            self.log.add(epoch)
            self.queue.actor.put_nowait.remote(("epoch", epoch))

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        rank, error = next(iter(sorted(worker_exceptions.items())))
        self.queue.actor.put_nowait.remote(("fault", {"rank": rank, "error": repr(error)[:500]}))


def train(
    run: RunConfig, data: str, out: str, *, resume: bool = False, listeners: Sequence[Listener] = ()
) -> TrainResult:
    """Trains one run and leaves run.json, metrics.jsonl, checkpoints under train/ and the best one as best/.

    Args:
        run: the resolved configuration.
        data: URI of a prepared data set.
        out: folder or s3:// prefix of this run; its identity.
        resume: continue what lies there, from the last checkpoint, with the same configuration.
        listeners: who follows.

    Raises:
        UserError: settings, data or weights that do not fit; a run in `out` without `resume`; a loss that diverged.
    """
    data, out = storage.absolute(data), storage.absolute(out)
    card = read_card(data)
    require_validation(card)
    make_plan(card, seed=run.train.seed, batch_size=run.train.batch_size)
    build_method(run.train.method, run, make_model(run, card))
    runtime.start()
    preflight(run)
    claim(out, {"config": run.model_dump(mode="json"), "data_digest": card.digest}, resume=resume)
    queue = Queue(actor_options={"num_cpus": 0})
    for listener in listeners:
        listener.on_start(run, card)
    try:
        with _following(queue, listeners):
            result = _trainer(run, data, card, out, queue).fit()
    except Exception as error:
        for listener in listeners:
            listener.on_end("FAILED", None)
        raise _explained(error) from error
    finally:
        queue.shutdown(force=True)
    best = _publish(run, result, out)
    for listener in listeners:
        listener.on_end("FINISHED", best)
    history = MetricsLog(out).read()
    key = f"val_{run.train.metric}"
    return TrainResult(best, max(history, key=lambda line: line[key]), history)


def preflight(run: RunConfig) -> None:
    """Refuses what Ray would wait for without end.

    Raises:
        UserError: workers and reading tasks together ask for more than the cluster has.
    """
    resources: dict[str, float] = ray.cluster_resources()
    if run.train.num_workers * run.worker_cpus + run.cpus_beside > resources.get("CPU", 0):
        raise UserError(
            f"{run.train.num_workers} workers x {run.worker_cpus:g} CPU and {run.cpus_beside:g} CPU for Ray Data "
            f"exceed the cluster's {resources.get('CPU', 0):g} CPUs; lower train.num_workers, train.worker_cpus or "
            f"data.task_cpus"
        )
    if run.train.num_workers * run.worker_gpus > resources.get("GPU", 0):
        raise UserError(
            f"{run.train.num_workers} workers ask for {run.worker_gpus:g} GPU each, the cluster has "
            f"{resources.get('GPU', 0):g}; lower train.num_workers or train.gpus, or set train.use_gpu=false"
        )


def _work(config: dict[str, Any]) -> None:
    """What every worker runs."""
    host = TrainHost(config["queue"])
    Loop(RunConfig.model_validate(config["run"]), config["data"], read_card(config["data"]), host).fit()


def _trainer(run: RunConfig, data: str, card: DatasetCard, out: str, queue: Queue) -> TorchTrainer:
    filesystem, path = storage.resolve(out)
    resources: dict[str, float] = {"CPU": run.worker_cpus, **({"GPU": run.worker_gpus} if run.worker_gpus else {})}
    return TorchTrainer(
        _work,
        train_loop_config={"run": run.model_dump(mode="json"), "data": data, "queue": queue},
        scaling_config=ScalingConfig(
            num_workers=run.train.num_workers, use_gpu=run.train.use_gpu, resources_per_worker=resources
        ),
        run_config=ray.train.RunConfig(
            name=STORAGE_NAME,
            storage_path=path,
            storage_filesystem=filesystem if storage.is_remote(out) else None,
            failure_config=FailureConfig(max_failures=run.train.max_failures),
            checkpoint_config=CheckpointConfig(
                num_to_keep=run.train.keep,
                checkpoint_score_attribute=f"val_{run.train.metric}",
                checkpoint_score_order="max",
            ),
            callbacks=[_Recorder(out, queue)],
        ),
    )


@contextmanager
def _following(queue: Queue, listeners: Sequence[Listener]) -> Iterator[None]:
    """Hands the workers' lines to the listeners from a thread of the driver."""
    done = threading.Event()

    def follow() -> None:
        while not (done.is_set() and queue.empty()):
            try:
                kind, line = queue.get(timeout=0.2)
            except Empty:
                continue
            if kind == "fault":
                log.warning("worker %s failed: %s; continuing from the last checkpoint", line["rank"], line["error"])
                continue
            for listener in listeners:
                (listener.on_epoch if kind == "epoch" else listener.on_log)(line)

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _explained(error: Exception) -> Exception:
    """A worker's UserError out of the wrappers that Ray puts around it; anything else as it is."""
    failures = getattr(error, "worker_failures", None) or {}
    causes: list[Any] = [error, *failures.values()]
    for cause in causes:
        inner: BaseException | None = cause
        while inner is not None:
            if isinstance(inner, UserError):
                return UserError(str(inner))
            inner = getattr(inner, "cause", None) or inner.__cause__
    return error


def _publish(run: RunConfig, result: ray.train.Result, out: str) -> str:
    """Copies the best checkpoint to best/, where later verbs find it under one name."""
    key = f"val_{run.train.metric}"
    scored = [(metrics[key], checkpoint) for checkpoint, metrics in result.best_checkpoints if key in metrics]
    return publish(max(scored, key=lambda pair: pair[0])[1], out)
