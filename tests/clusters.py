"""A real Ray head of its own, with a token, for tests that reach it as a stranger would: over HTTP."""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest
from conftest import free_ports

AGENT_PORTS = (
    "dashboard-agent-listen-port",
    "dashboard-agent-grpc-port",
    "runtime-env-agent-port",
    "metrics-export-port",
)
BINARIES = str(Path(sys.executable).parent)


class Head(NamedTuple):
    """A running head."""

    address: str
    """Its dashboard and Jobs API."""
    gcs: str
    """HOST:PORT at which workers join."""
    environment: dict[str, str]
    """What a client needs: the address, the way to the token, binaries on the path; nothing of another cluster."""
    folder: Path
    """Its token and its sessions."""


@contextmanager
def ray_head(
    cpus: int = 1,
    *,
    host: str = "127.0.0.1",
    token: str = "a-token-for-tests-only-0123456789",
    options: Sequence[str] = (),
) -> Iterator[Head]:
    """Starts `ray start --head` with token authentication until the block ends; its dashboard is open to loopback only.

    `ray stop` would end every Ray of this machine, so the processes are ended one by one.

    Args:
        cpus: that it offers.
        host: address at which nodes reach it.
        token: of the cluster.
        options: further ones of `ray start`.
    """
    folder = Path(tempfile.mkdtemp(prefix="r"))  # short: sockets lie below it
    (folder / "token").write_text(token)
    gcs, dashboard, drivers, *agents = free_ports(3 + len(AGENT_PORTS))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {
        "PATH": f"{BINARIES}{os.pathsep}{os.environ['PATH']}",
        "HOME": str(folder),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(folder / "token"),
        # else a head below `uv run` packs its working directory, package and all, for every job until the disk is full
        "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
        "RAY_worker_niceness": "0",  # at Ray's 15, workers get nothing where other tests run beside
    }
    command = ["ray", "start", "--head", f"--port={gcs}", *options]
    command += ["--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}", f"--ray-client-server-port={drivers}"]
    command += node_options(host, cpus, folder, agents)
    address = f"http://127.0.0.1:{dashboard}"
    head = Head(address, f"{host}:{gcs}", environment | {"RAY_ADDRESS": address}, folder)
    process = start_head(command, environment, head)
    try:
        yield head
    finally:
        if process.poll() is None:
            end(process.pid)
        process.wait()
        shutil.rmtree(folder, ignore_errors=True)


def node_options(host: str, cpus: int, folder: Path, ports: Sequence[int]) -> list[str]:
    """What `ray start` is told on every node: its address and CPUs, where its sessions lie, ports of its agents."""
    own = ["--block", "--disable-usage-stats", f"--num-cpus={cpus}", f"--node-ip-address={host}"]
    own += [f"--temp-dir={folder / 'ray'}", "--min-worker-port=0", "--max-worker-port=0"]  # any that is free
    return own + [f"--{name}={port}" for name, port in zip(AGENT_PORTS, ports, strict=True)]


def start_head(command: Sequence[str], environment: dict[str, str], head: Head) -> "subprocess.Popen[bytes]":
    """`ray start`, once its own node is alive; it ends itself where that takes half a minute, and is started again."""
    log, deadline = head.folder / "log.txt", time.monotonic() + 240
    process = None
    while not alive(head):
        if process is None or process.poll() is not None:
            with log.open("w") as out:
                process = subprocess.Popen(command, env=environment, stdout=out, stderr=out, cwd=head.folder)
        if time.monotonic() > deadline:
            end(process.pid)
            pytest.fail(f"{head.address} did not answer: {log.read_text()[-2000:]}")
        time.sleep(0.2)
    assert process is not None
    return process


def alive(head: Head) -> int:
    """Nodes that the cluster counts on, as its state API tells somebody with the token; 0 where it does not answer."""
    token = Path(head.environment["RAY_AUTH_TOKEN_PATH"]).read_text()
    request = urllib.request.Request(f"{head.address}/nodes?view=summary", headers={"Authorization": f"Bearer {token}"})
    try:
        with urllib.request.urlopen(request, timeout=30) as reply:
            nodes = json.load(reply)["data"]["summary"]
    except OSError:  # refused, dropped, too slow, or an answer that it is not ready
        return 0
    return sum(node["raylet"]["state"] == "ALIVE" for node in nodes)


def end(pid: int) -> None:
    """Kills a process and all that it started, and returns once none of them runs."""
    parent = psutil.Process(pid)
    found = [*parent.children(recursive=True), parent]
    for process in found:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    deadline = time.monotonic() + 20
    while any(map(_runs, found)) and time.monotonic() < deadline:
        time.sleep(0.05)


def _runs(process: psutil.Process) -> bool:
    """Whether it still does anything: what nobody has waited for is a zombie."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


class Tunnel:
    """A TCP tunnel to `port` of this machine that can break: what `ssh -L` or `kubectl port-forward` are."""

    def __init__(self, port: int, host: str = "127.0.0.1") -> None:
        self.target, self.sockets = port, []
        self.server = socket.create_server((host, 0))
        self.port = int(self.server.getsockname()[1])
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        """Closes everything that goes through it, and its door."""
        for end_ in [self.server, *self.sockets]:
            with contextlib.suppress(OSError):
                end_.shutdown(socket.SHUT_RDWR)
            end_.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self.server.accept()
                far = socket.create_connection(("127.0.0.1", self.target))
                self.sockets += [near, far]
                for pair in ((near, far), (far, near)):
                    threading.Thread(target=_pump, args=pair, daemon=True).start()


def _pump(source: socket.socket, sink: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            sink.sendall(data)
        sink.shutdown(socket.SHUT_WR)
