"""A whole cluster on one machine: head, workers, bucket, MLflow; a search that loses a worker, and what it leaves."""

import io
import json
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from clusters import AGENT_PORTS, Head, Tunnel, alive, node_options, ray_head
from conftest import S3_PORT, SECRET_KEY, free_port, free_ports, s3_client
from hosts import Host, Machines, machines
from mlflow.tracking import MlflowClient
from servers import mlflow_running

from pipeline import storage

pytestmark = pytest.mark.slow
MAIN = [sys.executable, "-u", "-c", "from infra.cli import main; main()"]
DEADLINE = 400.0  # seconds for any one thing to happen
QUICK = {"health_check_initial_delay_ms": 1000, "health_check_period_ms": 500, "health_check_timeout_ms": 3000}
"""Ray gives a node up after 5 looks without an answer; the network of a killed one does not even refuse."""
EPOCHS = 12
SETTINGS = {
    "model": {"backbone": "test_efficientnet_gn"},
    "loss": {"lambda_btc": 0.0, "lambda_fpc": 0.0, "warmup_epochs": 0.2, "ramp_epochs": 0.2},
    "data": {"tasks": 1, "task_cpus": 0.25},
    "train": {"epochs": EPOCHS, "batch_size": 32, "worker_cpus": 0.75},
    "search": {"searcher": "random", "scheduler": "none", "max_trials": 3, "cpus_for_data": 0.5}
    | {"metric": "loss_sup", "mode": "min"},
    "prepare": {"image_size": 32, "row_group": 64, "phantom": {"images": 500}},
    "tracking": {"experiment": "proof"},
    "gate": {"minimum": 0.0},  # twelve epochs of 500 images: not every finding is above chance
    "evaluate": {"resamples": 100},
}


class World(NamedTuple):
    """All that runs, and the folder of what a client leaves behind."""

    machines: Machines
    head: Head
    workers: list[Host]
    bucket: str
    tracking: str
    folder: Path


@pytest.fixture(scope="module")
def world(s3_server: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """Head and two workers of a CPU each, with a token; the bucket and MLflow are reached through the same network."""
    folder = tmp_path_factory.mktemp("proof")
    s3_client(s3_server).create_bucket(Bucket="proof")
    (folder / "settings.yaml").write_text(yaml.safe_dump(SETTINGS))
    with machines() as net, ExitStack() as stack, ThreadPoolExecutor(1) as other:
        bucket = Tunnel(S3_PORT, net.address)  # the test's own S3 server listens on loopback alone
        stack.callback(bucket.cut)
        tracking = f"http://{net.address}:{free_port()}"
        server = ["server", "--host", net.address, "--port", tracking.rpartition(":")[2], "--workers", "1"]
        server += ["--backend-store-uri", f"sqlite:///{folder}/db", "--artifacts-destination", "s3://proof/mlflow"]
        (folder / "mlflow").mkdir()
        mlflow = mlflow_running(server, f"{tracking}/health", folder / "mlflow")
        started = other.submit(stack.enter_context, mlflow)
        options = ["--system-config", json.dumps(QUICK)]
        head = stack.enter_context(ray_head(cpus=0, host=net.address, options=options))
        own = {"AWS_ENDPOINT_URL": f"http://{net.address}:{bucket.port}", "MLFLOW_TRACKING_URI": tracking}
        head = head._replace(environment=head.environment | own)
        started.result()
        workers = [join(net, head), join(net, head)]
        yield World(net, head, workers, "s3://proof", tracking, folder)


def join(net: Machines, head: Head) -> Host:
    """A machine of one CPU that has joined the cluster; Ray ends one that takes half a minute, and it tries again."""
    others = 1 + sum(host.process.poll() is None for host in net.hosts)
    end = time.monotonic() + DEADLINE
    (head.folder / "ray").mkdir(exist_ok=True)
    environment = {name: value for name, value in head.environment.items() if name != "RAY_ADDRESS"}
    worker = None
    while alive(head) <= others:
        if worker is None or worker.process.poll() is not None:
            command = ["ray", "start", f"--address={head.gcs}"]
            command += node_options(net.next_address(), 1, head.folder, free_ports(len(AGENT_PORTS)))
            log = head.folder / f"{net.next_address()}.txt"
            worker = net.start(command, environment, log, head.folder / "ray")
        assert time.monotonic() < end, log.read_text()[-2000:]
        time.sleep(0.2)
    assert worker is not None
    return worker


def client(world: World, *arguments: str) -> "subprocess.Popen[str]":
    """`mpc-cxr` as a process on this machine."""
    print(f"$ mpc-cxr {' '.join(arguments)}", flush=True)
    with (world.folder / "client.txt").open("w") as out:
        return subprocess.Popen([*MAIN, *arguments], env=world.head.environment, stdout=out, stderr=out, text=True)


def finished(world: World, process: "subprocess.Popen[str]") -> str:
    """What the client said, once it has ended well."""
    code = process.wait(DEADLINE)
    said = (world.folder / "client.txt").read_text()
    print(said, flush=True)
    assert code == 0, said
    return said


def wait_until(reached: Callable[[], bool], what: str, process: "subprocess.Popen[str]", world: World) -> None:
    """Returns once `reached` holds; fails with what the process said when it ends before, or after too long."""
    end = time.monotonic() + DEADLINE
    while not reached():
        if process.poll() is not None or time.monotonic() > end:
            pytest.fail(f"{what}: did not happen\n{(world.folder / 'client.txt').read_text()}")
        time.sleep(0.1)


def epochs_of(trials: str) -> dict[str, int]:
    """Trial -> epochs that it has recorded in the bucket."""
    found = storage.list_files(trials) if storage.exists(trials) else []
    logs = [uri for uri in found if storage.name(uri) == "metrics.jsonl"]
    return {uri.split("/")[-2]: len(storage.read_bytes(uri).splitlines()) for uri in logs}


class Told(NamedTuple):
    """What came of it."""

    search: dict[str, Any]
    before: dict[str, int]
    """Epochs of the trials when the machine was killed."""
    said: str
    """By all clients."""


@pytest.fixture(scope="module")
def told(world: World) -> Told:
    """A data set, a search that loses one of its two machines, a champion, and its findings: each by its own verb."""
    begin = time.monotonic()

    def clock(text: str) -> None:
        print(f"[{time.monotonic() - begin:5.1f} s] {text}", flush=True)

    clock(f"the workers are {world.machines.kind}")
    settings = ["--config", str(world.folder / "settings.yaml")]
    (world.folder / "space.yaml").write_text("optim.lr: {loguniform: [0.001, 0.01]}\n")
    data, search = f"{world.bucket}/data", f"{world.bucket}/search"
    said = finished(world, client(world, "submit", "prepare", "--out", data, *settings, "--follow"))
    clock("prepared")
    space = ["--space", str(world.folder / "space.yaml")]
    tune = client(world, "submit", "tune", "--data", data, "--out", search, *space, *settings, "--follow")
    trials = f"{search}/trials"
    at_work = lambda: sum(0 < epochs < EPOCHS for epochs in epochs_of(trials).values())  # noqa: E731
    wait_until(lambda: at_work() == 2, "a trial on each worker", tune, world)
    world.workers[1].kill()
    before = epochs_of(trials)
    clock(f"one worker of two is killed; epochs so far {before}")
    assert not storage.exists(f"{search}/search.json")
    said += finished(world, tune)
    clock("the search has ended")
    said += finished(world, client(world, "register", "--checkpoint", f"{search}/best", "--model", "proof", *settings))
    said += finished(world, client(world, "promote", "--model", "models:/proof/1", "--data", data, *settings))
    clock("registered and promoted")
    for number in range(3):
        encoded, png = cv2.imencode(".png", np.random.default_rng(number).integers(0, 256, (48, 40), dtype=np.uint8))
        assert encoded
        storage.write_bytes(f"{world.bucket}/images/{number}.png", png.tobytes())
    images = ["--images", f"{world.bucket}/images", "--out", f"{world.bucket}/findings"]
    said += finished(
        world, client(world, "submit", "predict", "--model", "models:/proof@champion", *images, "--follow")
    )
    clock("predicted")
    return Told(json.loads(storage.read_bytes(f"{search}/search.json")), before, said)


def test_a_search_goes_on_without_a_machine(told: Told) -> None:
    ended = {trial["trial_id"]: trial for trial in told.search["trials"]}
    assert len(ended) == 3
    assert set(told.before) <= set(ended)
    assert sum(epochs < EPOCHS for epochs in told.before.values()) == 2, (
        "both trials were at work when the machine was killed"
    )
    assert sum(trial["status"] == "finished" and trial["epochs"] == EPOCHS for trial in ended.values()) >= 2
    for trial in ended.values():  # the one on that machine, unless it went on elsewhere
        assert trial["status"] == "finished" or (trial["status"] == "failed" and trial["error"]), trial
        assert trial["status"] == "finished" or trial["trial_id"] in told.before
    assert ended[told.search["best"]]["status"] == "finished"


def test_mlflow_holds_every_trial(told: Told, world: World) -> None:
    store = MlflowClient(tracking_uri=world.tracking)
    runs = store.search_runs([store.get_experiment_by_name("proof").experiment_id])
    by_trial = {run.data.tags["trial_id"]: run for run in runs if "trial_id" in run.data.tags}
    assert set(by_trial) == {trial["trial_id"] for trial in told.search["trials"]}
    for trial in told.search["trials"]:
        run = by_trial[trial["trial_id"]]
        assert run.info.status == ("FINISHED" if trial["status"] == "finished" else "FAILED")
        steps = [metric.step for metric in store.get_metric_history(run.info.run_id, "loss_sup")]
        assert steps == list(range(1, len(steps) + 1))
        assert len(steps) == trial["epochs"] or trial["status"] == "failed"
    assert {run.info.status for run in runs if run.data.tags.get("mlflow.parentRunId") is None} == {"FINISHED"}


def test_the_champion_found_every_image(told: Told, world: World) -> None:
    (found,) = [uri for uri in storage.list_files(f"{world.bucket}/findings") if uri.endswith("findings.parquet")]
    rows = pq.read_table(io.BytesIO(storage.read_bytes(found))).to_pylist()
    assert {storage.name(row["source"]) for row in rows} == {"0.png", "1.png", "2.png"}
    assert len(rows) == 3 * 14
    assert all(0 < row["probability"] < 1 and row["error"] is None for row in rows)
    assert {row["model_version"] for row in rows} == {"proof/1"}


def test_the_dashboard_answers_to_the_head_alone(world: World) -> None:
    port = int(world.head.address.rpartition(":")[2])
    if not world.machines.bridge:
        pytest.skip(f"one loopback interface for all: {world.machines.kind}")
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((world.machines.address, port), timeout=10)


def test_no_secret_is_left_anywhere(told: Told, world: World) -> None:
    token = Path(world.head.environment["RAY_AUTH_TOKEN_PATH"])
    secrets = [token.read_bytes(), SECRET_KEY.encode()]
    files = [file for file in (*world.folder.rglob("*"), *world.head.folder.rglob("*")) if file.is_file()]
    objects = storage.list_files(world.bucket)
    assert len(files) > 50, "the database, the logs of clients, server and cluster"
    assert any("/mlflow/" in uri for uri in objects)
    looked_at = [(str(file), file.read_bytes()) for file in files if file != token and file.exists()]
    looked_at += [(uri, storage.read_bytes(uri)) for uri in objects] + [("clients", told.said.encode())]
    assert not [where for where, content in looked_at for secret in secrets if secret in content]
