"""One training run as a Ray Train job: any number of workers, continued after a fault or with `resume`."""

import errno
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ray
import ray.train
from ray.train import CheckpointConfig, FailureConfig, ScalingConfig, TrainingFailedError
from ray.train.torch import TorchTrainer
from ray.util.queue import Queue

from mpc.build import build_method
from mpc.errors import StoppedError, UserError
from pipeline import runtime, storage
from pipeline.card import read_card
from pipeline.checkpoints import best_of, publish
from pipeline.config import RunConfig
from pipeline.controller import Recorder, work
from pipeline.divergence import DivergedError
from pipeline.follow import Follower, Listener, following, queue_beside_driver
from pipeline.host import Metrics
from pipeline.plan import make_plan
from pipeline.preflight import preflight, shortage
from pipeline.record import MetricsLog, claim
from pipeline.scoring import require_validation
from pipeline.setup import located, make_model
from pipeline.wish import Wish
from pipeline.worker import STORAGE_NAME

RESOURCES = (
    "train.num_workers", "train.min_workers", "train.resize_s", "train.worker_cpus", "train.gpus",
    "train.max_failures", "train.keep", "train.log_every", "train.checkpoint_every", "data.backend", "data.tasks",
    "data.task_cpus",
)  # fmt: skip
"""Settings that a continued run may change: how it runs, not what it learns."""


@dataclass(frozen=True)
class TrainResult:
    """What a finished run leaves."""

    best_checkpoint: str
    """URI of the checkpoint with the best validation metric."""
    metrics: Metrics
    """Metrics of the best checkpoint's epoch."""
    history: list[Metrics]
    """Metrics of every epoch, in order."""


def train(
    run: RunConfig, data: str, out: str, *, resume: bool = False, listeners: Sequence[Listener] = ()
) -> TrainResult:
    """Trains one run and leaves run.json, metrics.jsonl, checkpoints under train/ and the best one as best/.

    Args:
        run: the resolved configuration.
        data: URI of a prepared data set.
        out: folder or s3:// prefix of this run; its identity.
        resume: continue what lies there, from the last checkpoint, with the same configuration but for resources.
        listeners: who follows.

    Raises:
        UserError: settings, data or weights that do not fit; a run in `out` without `resume`; a loss that diverged.
        StoppedError: SIGTERM came; the checkpoint of the step that it came in is stored.
    """
    run, data, out = located(run), storage.absolute(data), storage.absolute(out)
    card = read_card(data)
    require_validation(card, run.data.val_labels)
    plan = make_plan(card, seed=run.train.seed, batch_size=run.train.batch_size)
    method = build_method(run.train.method, run, make_model(run, card))
    if method.one_process and run.train.num_workers > 1:
        raise UserError(
            f"method {run.train.method} keeps a table over all rows in one process; set train.num_workers=1"
        )
    runtime.start()
    preflight(run)
    identity = {"config": run.model_dump(mode="json"), "data_digest": card.digest}
    claim(out, identity, resume=resume, free=RESOURCES)
    steps = run.train.epochs * plan.steps_per_epoch
    for listener in listeners:
        listener.on_start(run, card)
    status, best = "FAILED", None
    try:
        _fit(run, data, out, Follower(out, steps, listeners, lambda: shortage(run)))
        result = _concluded(run, out)
        status, best = "FINISHED", result.best_checkpoint
    except StoppedError:
        status = "KILLED"
        raise
    except TrainingFailedError as error:
        raise _explained(error, out) from error
    finally:
        for listener in listeners:
            listener.on_end(status, best)
    return result


def _fit(run: RunConfig, data: str, out: str, follower: Follower) -> None:
    """Runs the job to its end.

    Raises:
        DivergedError: the loss left the real numbers.
        StoppedError: the workers were told to end, and did.
    """
    news, wish = queue_beside_driver(), Wish()
    try:
        with following(follower, news, wish):
            result = _trainer(run, data, out, news, wish).fit()
    finally:
        news.shutdown(force=True)
        wish.drop()
    if result.return_value is not None:
        raise DivergedError(result.return_value)
    if result.metrics["step"] < follower.steps:
        raise StoppedError(
            f"stopped at step {result.metrics['step']} of {follower.steps}, its checkpoint is stored in {out}; "
            f"--resume goes on from there"
        )


def _trainer(run: RunConfig, data: str, out: str, news: Queue, wish: Wish) -> TorchTrainer:
    filesystem, path = storage.resolve(out)
    least, most = run.train.least_workers, run.train.num_workers
    resources: dict[str, float] = {"CPU": run.worker_cpus, **({"GPU": run.worker_gpus} if run.worker_gpus else {})}
    config = {"run": run.model_dump(mode="json"), "data": data, "out": out, "news": news, "wish": wish}
    return TorchTrainer(
        work,
        train_loop_config=config,
        scaling_config=ScalingConfig(
            num_workers=most if least == most else (least, most),
            use_gpu=run.train.use_gpu,
            resources_per_worker=resources,
            elastic_resize_monitor_interval_s=run.train.resize_s,
        ),
        run_config=ray.train.RunConfig(
            name=STORAGE_NAME,
            storage_path=path,
            storage_filesystem=filesystem if storage.is_remote(out) else None,
            failure_config=FailureConfig(max_failures=run.train.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=run.train.keep),
            callbacks=[Recorder(out, news)],
        ),
    )


def _explained(error: Exception, out: str) -> Exception:
    """What a user can mend, out of the wrappers that Ray puts around it; anything else as it is."""
    failures = getattr(error, "worker_failures", None) or {}
    causes: list[Any] = [error, *failures.values()]
    for cause in causes:
        inner: BaseException | None = cause
        while inner is not None:
            if isinstance(inner, UserError):
                return UserError(str(inner))
            if isinstance(inner, OSError) and ("AWS Error" in str(inner) or inner.errno == errno.ENOSPC):
                return storage.translated(out, inner)  # of Ray's own writes
            inner = getattr(inner, "cause", None) or getattr(inner, "controller_failure", None) or inner.__cause__
    return error


def _concluded(run: RunConfig, out: str) -> TrainResult:
    """Copies the best checkpoint to best/, where later verbs find it under one name."""
    found = best_of(storage.join(out, STORAGE_NAME))
    assert found is not None, "a run that has finished has stored its epochs"
    checkpoint, info = found
    history = MetricsLog(out).read()
    metrics = next(line for line in history if line["step"] == info.step)
    return TrainResult(publish(checkpoint, out), metrics, history)
