"""What Ray Train's controller, a process of its own, unpickles: without the network, whose import takes seconds."""

import re
from typing import Any

from ray.exceptions import RayActorError
from ray.train import Checkpoint, UserCallback
from ray.util.queue import Queue

from pipeline.record import MetricsLog, is_epoch


def work(config: dict[str, Any]) -> str | None:
    """What every worker runs (`pipeline.worker.work`); the controller, which only passes it on, imports none of it."""
    from pipeline import worker

    return worker.work(config)


class Recorder(UserCallback):  # type: ignore[misc]
    """Writes metrics.jsonl once an epoch's checkpoint is stored.

    Args:
        out: the run's folder.
        news: to the driver.
    """

    def __init__(self, out: str, news: Queue) -> None:
        self.log = MetricsLog(out)
        self.news = news

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Checkpoint | None) -> None:
        """An epoch has ended."""
        epoch = metrics[0]
        if is_epoch(epoch):
            self.log.add(epoch)
            self.news.actor.put_nowait.remote(("epoch", epoch))

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Workers failed or were lost."""
        self.news.actor.put_nowait.remote(("fault", {"cause": cause(worker_exceptions)}))


def cause(errors: dict[int, Exception]) -> str:
    """Which worker failed, and of what, in one line; where one was lost, what the others make of it says nothing."""
    for rank, error in sorted(errors.items()):
        lost = getattr(error, "health_check_failure", None)
        if isinstance(lost, RayActorError):
            because = re.search(r"because (.+?)\.", str(lost))
            return f"worker {rank} was lost: {because[1] if because else 'it does not answer'}"
    rank, error = min(errors.items())
    return f"worker {rank} failed: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
