"""A training run on a cluster whose nodes are killed, come and are announced to leave; one run goes through it all."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pytest
from ray._raylet import GcsClient
from ray.cluster_utils import Cluster
from ray.core.generated import autoscaler_pb2
from runs import EXACT, PlainHost, assert_close, tiny

from pipeline import runtime
from pipeline.card import read_card
from pipeline.config import RunConfig
from pipeline.host import Notice
from pipeline.loop import Loop

pytestmark = pytest.mark.long
DEADLINE = 240.0  # seconds for any one thing to happen
QUICK = {"health_check_initial_delay_ms": 1000, "health_check_period_ms": 500}
"""Ray gives a silent node up after 5 looks: 15 s by default, here 2.5."""
DRIVER = """
import json, sys
from mpc.errors import StoppedError
from pipeline.config import RunConfig
from pipeline.train import train

class Tell:
    def on_start(self, run, card): pass
    def on_log(self, line): print(json.dumps(line), flush=True)
    def on_epoch(self, metrics): pass
    def on_end(self, status, best_checkpoint): pass

data, out, config = sys.argv[1:]
try:
    train(RunConfig.model_validate_json(config), data, out, listeners=[Tell()])
except StoppedError as error:
    sys.exit(str(error))
"""


class Driver:
    """A run in a process of its own on the cluster, and how far it is."""

    def __init__(self, address: str, data: str, out: Path, run: RunConfig) -> None:
        self.out, self.step = out, 0
        self.pause, self.last = 0.0, time.monotonic()  # the longest pause between two steps, and when one was last done
        self.errors = (out.parent / "errors.txt").open("w+")
        self.process = subprocess.Popen(
            [sys.executable, "-c", DRIVER, data, str(out), run.model_dump_json()],
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            env=os.environ | {"RAY_ADDRESS": address},
        )
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def __enter__(self) -> "Driver":
        return self

    def __exit__(self, *exception: object) -> None:
        self.process.kill()
        self.process.wait()
        self.reader.join()
        self.process.stdout.close()
        self.errors.close()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):  # Ray tells of dead nodes there too
                self.step, now = json.loads(line)["step"], time.monotonic()
                self.pause, self.last = max(self.pause, now - self.last), now

    @property
    def faults(self) -> list[dict[str, Any]]:
        """What faults.jsonl says so far."""
        file = self.out / "faults.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def wait(self, reached: Callable[[], object], what: str) -> None:
        """Returns once `reached` holds; fails with the driver's errors."""
        end = time.monotonic() + DEADLINE
        while not reached():
            if self.process.poll() is not None or time.monotonic() > end:
                pytest.fail(f"{what}: did not happen, step {self.step}\n{self.told()[-6000:]}")
            time.sleep(0.05)

    def wait_for_step(self, step: int) -> None:
        self.wait(lambda: self.step >= step, f"step {step}")

    def wait_for_checkpoint(self, step: int) -> None:
        """Returns once Ray Train has noted a checkpoint, from when on it counts."""
        notes = self.out / "train" / "checkpoint_manager_snapshot.json"
        self.wait(lambda: notes.exists() and f"step-{step:08d}" in notes.read_text(), f"checkpoint {step}")

    def wait_for_fault(self, number: int) -> dict[str, Any]:
        """The record of fault `number`, from 1."""
        self.wait(lambda: len(self.faults) >= number, f"fault {number}")
        return self.faults[number - 1]

    def told(self) -> str:
        """What the driver wrote to stderr."""
        self.errors.flush()
        return Path(self.errors.name).read_text()


def processes(node: Any) -> list[psutil.Process]:
    """All processes of a node, workers included."""
    found = []
    for infos in node.all_processes.values():
        for info in infos:
            try:
                own = psutil.Process(info.process.pid)
                found += [own, *own.children(recursive=True)]
            except psutil.NoSuchProcess:
                continue
    return found


def reads(node: Any) -> bool:
    """Whether a reading task of the training stream is at work on a node."""
    for process in processes(node):
        try:
            if process.cmdline()[:1] == ["ray::Read_Planned"]:
                return True
        except psutil.NoSuchProcess:
            continue
    return False


def kill(node: Any) -> None:
    """SIGKILL for every process of a node, as when its power fails."""
    for process in processes(node):
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue


def announce(cluster: Cluster, node: Any, seconds: float) -> None:
    """Tells Ray, as a cloud's agent does, that the node will be taken away."""
    reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    deadline = int((time.time() + seconds) * 1000)
    accepted, _ = GcsClient(address=cluster.address).drain_node(node.node_id, reason, "taken away", deadline)
    assert accepted


class Told(NamedTuple):
    """What the run went through."""

    readers: list[dict[str, Any]]
    """Faults that it had recorded an epoch after the node of most reading tasks was killed under them."""
    killed: dict[str, Any]
    grown: dict[str, Any]
    announced: dict[str, Any]
    errors: str
    out: Path
    run: RunConfig


@pytest.fixture(scope="module")
def told(phantom_data: str, tmp_path_factory: pytest.TempPathFactory) -> Told:
    """One run over a cluster of changing nodes."""
    out = tmp_path_factory.mktemp("nodes") / "run"
    many = {"num_workers": 2, "min_workers": 1, "worker_cpus": 1.75, "resize_s": 3, "epochs": 500, "keep": 10_000}
    often = {"batch_size": 24, "log_every": 1, "checkpoint_every": 10}
    run = tiny(**EXACT, data={"tasks": 2, "task_cpus": 0.25}, train={"method": "an", **many, **often})
    runtime.stop()  # two clusters on one machine confuse each other
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "_system_config": QUICK})
    try:
        trainer, reader = cluster.add_node(num_cpus=2), cluster.add_node(num_cpus=1)
        with Driver(cluster.address, phantom_data, out, run) as driver:
            return go_through(cluster, trainer, reader, driver, run)
    finally:
        cluster.shutdown()
        runtime.start(num_cpus=2)


def go_through(cluster: Cluster, trainer: Any, reader: Any, driver: Driver, run: RunConfig) -> Told:
    driver.wait(lambda: reads(reader), "a reading task where no worker fits")
    kill(reader)
    driver.pause, driver.last = 0.0, time.monotonic()
    driver.wait_for_checkpoint(20)
    readers = driver.faults
    print(f"killed under its reading tasks: longest pause {driver.pause:.1f} s")
    kill(trainer)
    killed = driver.wait_for_fault(1)
    driver.wait_for_step(killed["continued"] + 10)
    fresh = cluster.add_node(num_cpus=2)
    grown = driver.wait_for_fault(2)
    driver.wait_for_step(driver.step + 5)
    announce(cluster, fresh, 8)
    announced = driver.wait_for_fault(3)
    driver.process.send_signal(signal.SIGTERM)
    driver.process.wait(timeout=DEADLINE)
    print(*driver.faults, sep="\n")
    return Told(readers, killed, grown, announced, driver.told(), driver.out, run)


def test_a_killed_node_that_only_reads_costs_no_step(told: Told) -> None:
    assert told.readers == []


def test_a_run_goes_on_with_fewer_workers_when_a_node_is_killed(told: Told) -> None:
    assert re.fullmatch(r"worker \d was lost: (its node has died|it does not answer)", told.killed["causes"][0])
    assert told.killed["workers"] == 1
    assert 0 <= told.killed["lost"] == told.killed["reached"] - told.killed["continued"]
    assert told.killed["continued"] >= 20


def test_it_grows_again_with_a_new_node(told: Told) -> None:
    assert told.grown["causes"] == ["the number of workers was changed"]
    assert told.grown["workers"] == 2


def test_a_node_that_is_announced_to_leave_costs_what_came_after_the_notice(told: Told) -> None:
    assert "was announced to leave" in told.announced["causes"][0]
    assert told.announced["workers"] == 1
    assert "a checkpoint is written first" in told.errors


def test_sigterm_ends_the_run_in_good_order(told: Told) -> None:
    assert "--resume goes on from there" in told.errors.splitlines()[-1]


def test_what_it_learns_does_not_depend_on_who_was_there(told: Told, phantom_data: str, tmp_path: Path) -> None:
    last = told.grown["continued"] + 10
    compared = [folder for folder in sorted((told.out / "train").glob("step-*")) if int(folder.name[5:]) <= last]
    assert len(compared) >= last // 10

    class Until(PlainHost):
        def notice(self, step: int) -> Notice:
            return "stop" if step >= last else "go"

    run = told.run.model_copy(update={"train": told.run.train.model_copy(update={"num_workers": 1})})
    Loop(run, phantom_data, read_card(phantom_data), Until(tmp_path)).fit()
    for folder in compared:
        assert_close(folder, tmp_path / folder.name)
