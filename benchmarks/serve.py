"""How fast are findings served? `python benchmarks/serve.py --checkpoint RUN/best [--requests 200]`.

`mpc-cxr serve` and `mlflow models serve` each run as a process of their own on loopback. Clients, each with an open
connection, send the same PNG file of 1024 pixels (to MLflow as base64 in JSON) and wait for its findings. The limit is
the bare call of the model in one process: decode, network and judgement, without HTTP. Refusals count as faults.
"""

import argparse
import base64
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np

from infra.serve.service import Service
from pipeline import pixels
from pipeline.config import ExplainConfig, PredictConfig
from tuning.registry import register

BIN = Path(sys.executable).parent
CLIENTS, PORT = (1, 4, 16), 18765


class Case(NamedTuple):
    """A server and what is sent to it."""

    name: str
    command: list[str]
    ready: str
    """Path that answers 200 once the model is loaded."""
    path: str
    body: bytes
    kind: str


def cases(checkpoint: Path, store: str, image: bytes, port: int) -> Iterator[Case]:
    """Ours, and MLflow's with the same model registered."""
    options = ["--set", f"serve.port={port}", "--set", "serve.max_requests=64"]
    command = [str(BIN / "mpc-cxr"), "serve", "--checkpoint", str(checkpoint), *options]
    yield Case("mpc-cxr serve", command, "/model", "/findings", image, "application/octet-stream")
    uri = register(checkpoint, "served", store).uri
    command = [str(BIN / "mlflow"), "models", "serve", "-m", uri, "--env-manager", "local", "-p", str(port)]
    body = json.dumps({"dataframe_records": [{"image": base64.b64encode(image).decode()}]}).encode()
    yield Case("mlflow models serve", command, "/ping", "/invocations", body, "application/json")


@contextmanager
def running(case: Case, port: int, store: str) -> Iterator[None]:
    """The server, from its first answer on."""
    path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
    process = subprocess.Popen(
        case.command,
        env=os.environ | {"PATH": path, "MLFLOW_TRACKING_URI": store},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        while True:
            try:
                connection = HTTPConnection("127.0.0.1", port, timeout=5)
                connection.request("GET", case.ready)
                if connection.getresponse().status == 200:
                    break
            except OSError:
                if process.poll() is not None:
                    raise
            time.sleep(0.2)
        yield
    finally:
        os.killpg(process.pid, 15)
        process.wait(30)


def client(case: Case, port: int, requests: int) -> list[float]:
    """Seconds of each request over one connection."""
    connection, took = HTTPConnection("127.0.0.1", port, timeout=120), []
    for _ in range(requests):
        start = time.perf_counter()
        connection.request("POST", case.path, case.body, {"Content-Type": case.kind})
        reply = connection.getresponse()
        reply.read()
        took.append(time.perf_counter() - start)
        if reply.status != 200:
            raise RuntimeError(f"{case.name} answered {reply.status}")
    connection.close()
    return took


def load(case: Case, port: int, clients: int, requests: int) -> str:
    """Rate and percentiles of `requests` in all over `clients` connections."""
    with ThreadPoolExecutor(clients) as pool:
        start = time.perf_counter()
        parts = list(pool.map(lambda _: client(case, port, requests // clients), range(clients)))
        rate = clients * (requests // clients) / (time.perf_counter() - start)
    p50, p95, p99 = 1000 * np.percentile(np.concatenate(parts), (50, 95, 99))
    return f"{rate:8.1f} requests/s   p50 {p50:6.1f}   p95 {p95:6.1f}   p99 {p99:6.1f} ms"


def bare(checkpoint: Path, image: bytes, requests: int) -> float:
    """Calls of the model a second, in this process, one after the other."""
    service = Service(checkpoint, PredictConfig(), ExplainConfig())
    service.findings(image)
    start = time.perf_counter()
    for _ in range(requests):
        service.findings(image)
    return requests / (time.perf_counter() - start)


def main() -> None:
    """Prints a line a server and number of clients."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--requests", type=int, default=200)
    arguments = parser.parse_args()
    image = cv2.imencode(".png", pixels.load("phantom://dense/9/0", 1024, "pad"))[1].tobytes()
    print(f"a file of {len(image) / 2**20:.2f} MiB; {os.cpu_count()} cores, clients on the same machine")
    print(f"{'bare call':20}{'':12}{bare(arguments.checkpoint, image, arguments.requests):8.1f} calls/s")
    with tempfile.TemporaryDirectory() as folder:
        store, port = f"sqlite:///{folder}/mlflow.db", PORT
        os.chdir(folder)  # MLflow's artifacts go with it
        for case in cases(arguments.checkpoint.resolve(), store, image, port):
            with running(case, port, store):
                client(case, port, 5)
                for clients in CLIENTS:
                    print(f"{case.name:20}{clients:4d} clients{load(case, port, clients, arguments.requests)}")


if __name__ == "__main__":
    main()
