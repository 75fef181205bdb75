"""MLflow's own servers, as real processes."""

import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def mlflow_running(
    arguments: list[str], address: str, folder: Path, **environment: str
) -> Iterator[subprocess.Popen[bytes]]:
    """Runs `mlflow` with `arguments` until the block ends, once `address` answers."""
    binaries = str(Path(sys.executable).parent)
    path = f"{binaries}{os.pathsep}{os.environ['PATH']}"
    variables = {**os.environ, "PATH": path, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", **environment}
    with (folder / "log.txt").open("w") as log:
        command = [f"{binaries}/mlflow", *arguments]
        process = subprocess.Popen(command, stdout=log, stderr=log, env=variables, cwd=folder, start_new_session=True)
    try:
        deadline = time.monotonic() + 240
        while not answers(address):
            if process.poll() is not None or time.monotonic() > deadline:
                pytest.fail((folder / "log.txt").read_text()[-2000:])
            time.sleep(0.3)
        yield process
    finally:
        if process.poll() is None:  # a test may have killed it
            os.killpg(process.pid, signal.SIGTERM)  # its own group: the server's workers too
            process.wait(30)


def answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(address, timeout=2) as reply:
            return bool(reply.status == 200)
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False
