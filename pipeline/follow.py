"""The driver's side of a run: what the workers tell reaches the listeners, and faults are told with what they cost."""

import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any, Protocol

import ray
from ray.util.queue import Empty, Queue

from mpc.errors import UserError
from pipeline import storage
from pipeline.card import DatasetCard
from pipeline.config import RunConfig
from pipeline.host import Metrics
from pipeline.record import FAULTS_FILE, read_lines, write_lines
from pipeline.wish import Wish

log = logging.getLogger(__name__)

PATIENCE_SECONDS = 30.0
"""After so long without workers the driver says what they wait for."""


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
        """`FINISHED`, `FAILED`, or `KILLED`: told to end before its end."""
        ...


def queue_beside_driver() -> Queue:
    """A queue whose actor lies on the driver's node: it is lost with the driver alone."""
    here = {ray._raylet.RAY_NODE_ID_KEY: ray.get_runtime_context().get_node_id()}
    return Queue(actor_options={"num_cpus": 0, "label_selector": here})


class Follower:
    """Takes the news of a run.

    Args:
        out: the run's folder; faults.jsonl is written there.
        steps: of the whole run.
        listeners: who else follows.
        short: says in one line what the workers wait for, or nothing.
    """

    def __init__(self, out: str, steps: int, listeners: Sequence[Listener], short: Callable[[], str | None]) -> None:
        self.faults, self.steps, self.listeners, self.short = storage.join(out, FAULTS_FILE), steps, listeners, short
        self.reached, self.reached_at = 0, 0.0
        self.causes: list[str] = []
        self.fault: dict[str, Any] | None = None
        self.running = False
        self.waiting_since = time.monotonic()

    def take(self, kind: str, line: Metrics) -> None:
        """Handles one message."""
        handle: Callable[[Metrics], None] = getattr(self, f"_on_{kind}")
        handle(line)

    def idle(self) -> None:
        """Says once what keeps the workers from starting, if it takes long."""
        if self.running or time.monotonic() - self.waiting_since < PATIENCE_SECONDS:
            return
        self.waiting_since = float("inf")
        if reason := self.short():
            log.warning("%s; the run goes on when that changes", reason)

    def _on_log(self, line: Metrics) -> None:
        for listener in self.listeners:
            listener.on_log(line)

    def _on_epoch(self, metrics: Metrics) -> None:
        for listener in self.listeners:
            listener.on_epoch(metrics)

    def _on_leaving(self, line: Metrics) -> None:
        ranks = ", ".join(map(str, line["ranks"]))
        self.causes.append(f"the node of worker {ranks} was announced to leave")
        log.warning("the node of worker %s will leave; a checkpoint is written first", ranks)

    def _on_fault(self, line: Metrics) -> None:
        """A worker failed; the controller tells it as often as it looks."""
        if line["cause"] in self.causes:
            return
        self.causes.append(line["cause"])
        self.running, self.waiting_since = False, time.monotonic()
        log.warning("at about step %d %s", self.reached, line["cause"])

    def _on_begun(self, line: Metrics) -> None:
        """The workers have started, for the first time or again."""
        step, workers = line["step"], line["workers"]
        self.running = True
        if self.reached_at:
            lost = max(0, self.reached - step)
            self.fault = {
                "at": datetime.now(UTC).isoformat(timespec="seconds"),
                "causes": self.causes or ["the number of workers was changed"],
                "reached": self.reached,
                "continued": step,
                "lost": lost,
                "workers": workers,
            }
        if self.reached_at or step:
            log.warning("the run goes on from step %d of %d with %s", step, self.steps, _counted(workers, "worker"))
        self.causes = []

    def _on_reached(self, line: Metrics) -> None:
        """A step is done; the first one after a fault completes its record."""
        now = time.monotonic()
        if self.fault is not None:
            fault, self.fault = {**self.fault, "seconds": round(now - self.reached_at, 1)}, None
            again = f"{_counted(fault['lost'], 'step')} trained again" if fault["lost"] else "no step is lost"
            log.warning("training again after %.1f s; %s", fault["seconds"], again)
            self._record(fault)
        self.reached, self.reached_at = line["step"], now

    def _record(self, fault: dict[str, Any]) -> None:
        try:
            write_lines(self.faults, [*read_lines(self.faults), fault])
        except UserError as error:  # the run is worth more than its record
            log.warning("this fault is not recorded: %s", error)


def _counted(number: int, thing: str) -> str:
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"


@contextmanager
def following(follower: Follower, news: Queue, wish: Wish) -> Iterator[None]:
    """Hands the news to the follower from a thread of the driver, and SIGTERM to the workers as a wish to end."""
    done, asked = threading.Event(), threading.Event()

    def follow() -> None:
        while not (done.is_set() and news.empty()):
            if asked.is_set():
                asked.clear()
                wish.make()
            try:
                follower.take(*news.get(timeout=0.2))
            except Empty:
                follower.idle()

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        with _on_sigterm(asked):
            yield
    finally:
        done.set()
        thread.join()


@contextmanager
def _on_sigterm(asked: threading.Event) -> Iterator[None]:
    """The first SIGTERM sets `asked`, a second one does what it did before; signals reach the main thread alone."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)

    def ask(number: int, frame: object) -> None:
        signal.signal(number, before)
        asked.set()

    signal.signal(signal.SIGTERM, ask)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
