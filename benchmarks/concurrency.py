"""64 trials against one tracking server and one bucket: `python benchmarks/concurrency.py`.

A real MLflow server (sqlite, its default of 4 workers) and a real S3-compatible server (SeaweedFS) share the cores of
this machine with the clients. What a trial sends is real: metrics and checkpoint of a DenseNet-121 that
was trained for an epoch. Trials start together, then end an epoch each PERIOD seconds, evenly spread; last, all of them
send as fast as they are served: the limit.
"""

import argparse
import re
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import requests
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from conftest import free_port, s3_client, s3_running  # type: ignore[import-not-found]  # the tests' own servers
from processes import cpu_of
from servers import mlflow_running  # type: ignore[import-not-found]

from pipeline import runtime
from pipeline.card import read_card
from pipeline.checkpoints import upload
from pipeline.config import RunConfig
from pipeline.host import Host, Metrics
from pipeline.loop import Loop
from pipeline.prepare_config import PhantomConfig, PrepareConfig
from pipeline.shards import prepare
from tuning.record import RunRecord, Status, epoch_metrics
from tuning.tracking import TrackedRun, Tracker

BUCKET = "scale"


class Keeping(Host):
    """Keeps the checkpoint and the metrics of an epoch."""

    rank, world_size, device = 0, 1, torch.device("cpu")

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.metrics: Metrics = {}

    @contextmanager
    def last_checkpoint(self) -> Iterator[Path | None]:
        """There is none."""
        yield None

    def report(self, metrics: Metrics, checkpoint: Path) -> None:
        """Keeps both."""
        self.metrics = metrics
        checkpoint.rename(self.folder / checkpoint.name)

    def log(self, line: Metrics) -> None:
        """Nobody looks."""

    def leave(self, name: str, content: bytes) -> str:
        """Leaves nothing."""
        return name


def trained(folder: Path) -> tuple[Path, dict[str, float]]:
    """Checkpoint and metrics of DenseNet-121 after an epoch; images of 32 px make neither of them smaller."""
    data = str(folder / "data")
    prepare(PrepareConfig(image_size=32, row_group=64, phantom=PhantomConfig(images=120)), None, data)
    runtime.stop()  # the cores are the servers' and the clients'
    told = {"model": {"backbone": "densenet121"}, "train": {"epochs": 1}, "data": {"backend": "torch"}}
    run, host = RunConfig.model_validate(told), Keeping(folder)
    Loop(run, data, read_card(data), host).fit()
    return next(folder.glob("step-*")), epoch_metrics(host.metrics)


class Calls:
    """Every HTTP request of MLflow's client in this process: how many, how long, how large."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = defaultdict(list)
        self.bytes: Counter[str] = Counter()
        self._lock, self._request = threading.Lock(), requests.Session.request
        calls = self

        def request(session: Any, method: str, url: str, **options: Any) -> Any:
            start = time.perf_counter()
            reply = calls._request(session, method, url, **options)
            place = re.sub("(mlflow-artifacts/artifacts)/.*", r"\1", url.rpartition("/api/")[2].partition("?")[0])
            calls.add(f"{method} {place}", time.perf_counter() - start, reply)
            return reply

        session_class: Any = requests.Session
        session_class.request = request

    def add(self, name: str, seconds: float, reply: Any) -> None:
        """Notes a request."""
        with self._lock:
            self.seconds[name].append(seconds)
            self.bytes[name] += int(reply.request.headers.get("Content-Length", 0)) + len(reply.content)

    def taken(self) -> tuple[dict[str, list[float]], Counter[str]]:
        """What was noted since the last call."""
        with self._lock:
            found, self.seconds = self.seconds, defaultdict(list)
            sizes, self.bytes = self.bytes, Counter()
        return found, sizes


class Phase(NamedTuple):
    """What happened in a part of the simulation."""

    name: str
    seconds: float
    epochs: int
    records: list[float]
    """Seconds until an epoch's metrics were recorded."""
    uploads: list[float]
    """Seconds until a checkpoint was stored."""
    mlflow_cpu: float
    s3_cpu: float
    own_cpu: float


class World:
    """64 trials with what they send, and the two servers."""

    def __init__(self, uri: str, checkpoint: Path, metrics: dict[str, float], trials: int) -> None:
        self.checkpoint, self.metrics = checkpoint, metrics
        self.trackers = [Tracker(uri, "scale") for _ in range(trials)]
        self.runs: dict[int, TrackedRun] = {}
        self.epoch = [0] * trials
        self.uploads: list[float] = []
        self.records: list[float] = []
        servers = [child for child in psutil.Process().children() if child.is_running()]
        self.s3 = next(child for child in servers if "weed" in child.name())
        self.mlflow = next(child for child in servers if "mlflow" in " ".join(child.cmdline()))

    def start(self, number: int) -> None:
        """Opens a trial's run with its parameters."""
        tracker = self.trackers[number]
        run = tracker.start_run(RunRecord(key=f"trial-{number}", name=f"trial-{number}", experiment="scale"))
        tracker.log_config(run, RunConfig().model_dump(mode="json"))
        tracker.log_dataset(run, "phantom", "0" * 64)
        assert tracker.run_id(run) is not None
        self.runs[number] = run

    def record(self, number: int) -> None:
        """An epoch's metrics."""
        self.epoch[number] += 1
        start = time.perf_counter()
        tracker = self.trackers[number]
        tracker.log_epoch(self.runs[number], self.metrics, self.epoch[number])
        assert tracker.flush() == 0
        self.records.append(time.perf_counter() - start)

    def store(self, number: int) -> None:
        """An epoch's checkpoint, in place of the one before."""
        start = time.perf_counter()
        upload(self.checkpoint, f"s3://{BUCKET}/trial-{number}/checkpoint")
        self.uploads.append(time.perf_counter() - start)

    def phase(self, name: str, work: Callable[[int], None], times: int = 1, pause: float = 0.0) -> Phase:
        """Every trial does `work`, in a thread of its own, `times` times; it begins `pause` seconds after another."""
        self.uploads, self.records = [], []
        before = [cpu_of(process) for process in (self.mlflow, self.s3)]
        own, start = time.process_time(), time.perf_counter()

        def trial(number: int) -> None:
            time.sleep(number * pause)
            for _ in range(times):
                work(number)

        with ThreadPoolExecutor(len(self.trackers)) as pool:
            list(pool.map(trial, range(len(self.trackers))))
        seconds = time.perf_counter() - start
        used = [cpu_of(process) - earlier for process, earlier in zip((self.mlflow, self.s3), before, strict=True)]
        shares = [value / seconds for value in (*used, time.process_time() - own)]
        return Phase(name, seconds, times * len(self.trackers), self.records, self.uploads, *shares)


def percentiles(values: list[float]) -> str:
    """Median, 95th and 99th percentile and maximum, in milliseconds."""
    if len(values) < 2:
        return "–"
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    return " / ".join(f"{1000 * value:,.0f}" for value in (cuts[49], cuts[94], cuts[98], max(values)))


def show(phase: Phase) -> None:
    """One row."""
    cpu = f"{phase.mlflow_cpu:.2f} / {phase.s3_cpu:.2f} / {phase.own_cpu:.2f}"
    cells = [phase.name, f"{phase.epochs / phase.seconds:.2f}", percentiles(phase.records), percentiles(phase.uploads)]
    print(f"| {' | '.join([*cells, cpu])} |", flush=True)


def show_calls(title: str, calls: Calls, share: int) -> None:
    """Requests of MLflow by kind, for each of `share` events."""
    seconds, sizes = calls.taken()
    total = sum(map(len, seconds.values()))
    print(f"\n{title}: {total / share:.1f} requests, {sum(sizes.values()) / share / 1024:.1f} KiB both ways")
    for name, found in sorted(seconds.items()):
        print(f"  {len(found) / share:.2f} x {name}: {percentiles(found)} ms")


def simulate(uri: str, checkpoint: Path, metrics: dict[str, float], trials: int, period: float) -> None:
    """The phases, in turn."""
    world, calls = World(uri, checkpoint, metrics, trials), Calls()
    size = sum(file.stat().st_size for file in checkpoint.iterdir())
    print(f"a checkpoint has {size:,} bytes, an epoch {len(metrics)} metrics")
    phases = [world.phase("all trials start", world.start)]
    show_calls("start of a trial", calls, trials)

    def epoch(number: int) -> None:
        world.record(number)
        world.store(number)

    phases.append(world.phase(f"an epoch in {period:g} s", epoch, pause=period / trials))
    show_calls("end of an epoch", calls, trials)
    phases.append(world.phase("metrics, as fast as possible", world.record, times=8))
    phases.append(world.phase("checkpoints, as fast as possible", world.store))
    for number in range(trials):
        world.trackers[number].end_run(world.runs[number], Status.FINISHED)
        assert world.trackers[number].close() == 0
    columns = ["", "epochs/s", "metrics, ms: p50 / p95 / p99 / max", "checkpoint, ms: the same"]
    print(f"\n| {' | '.join([*columns, 'CPUs: MLflow / S3 / clients'])} |\n|{'---|' * 5}")
    for phase in phases:
        show(phase)
    rate = size * trials / phases[-1].seconds / 2**20
    print(f"\nthe bucket takes {rate:,.0f} MiB/s; {trials} trials send {size * trials / period / 2**20:,.0f} MiB/s")


def main() -> None:
    """Starts the servers and runs the simulation."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=64)
    parser.add_argument("--period", type=float, default=60.0, help="seconds between two epochs of a trial")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place, ExitStack() as stack:
        folder = Path(place)
        checkpoint, metrics = trained(folder)
        for name in ("s3", "mlflow"):
            (folder / name).mkdir()
        endpoint = stack.enter_context(s3_running(folder / "s3"))
        s3_client(endpoint).create_bucket(Bucket=BUCKET)
        uri = f"http://127.0.0.1:{free_port()}"
        server = ["server", "--host", "127.0.0.1", "--port", uri.rpartition(":")[2]]
        server += [
            "--backend-store-uri",
            f"sqlite:///{folder}/mlflow/db",
            "--artifacts-destination",
            f"s3://{BUCKET}/mlflow",
        ]
        stack.enter_context(mlflow_running(server, f"{uri}/health", folder / "mlflow"))
        simulate(uri, checkpoint, metrics, options.trials, options.period)


if __name__ == "__main__":
    main()
