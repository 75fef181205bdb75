"""AWS: Ray's own launcher makes the cluster, its SSH tunnel carries the Jobs API."""

import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from socket import create_connection, socket

from infra.aws.launcher import TOKEN, as_yaml
from infra.cluster import ClusterConfig
from infra.submit.package import Job
from infra.submit.ray_jobs import RayJobs
from infra.submit.target import State
from mpc.errors import MissingError, UserError

RAY = [sys.executable, "-m", "ray.scripts.scripts"]
TUNNEL_SECONDS = 90.0


class Launched:
    """The cluster of the settings; `submit` starts it where it does not run, idle workers go by themselves."""

    def __init__(self, cluster: ClusterConfig) -> None:
        self.cluster = cluster
        if not Path(TOKEN).expanduser().is_file():
            raise MissingError(
                f"{TOKEN}: is absent, and the nodes get their token from it; `ray get-auth-token --generate`"
            )

    def on_this_machine(self) -> bool:
        """The nodes are far away."""
        return False

    def plan(self, job: Job) -> str:
        """The launcher's file, and the command that makes the cluster."""
        return f"# ray up FILE --yes; then {job.entrypoint} through `ray dashboard FILE`\n{as_yaml(self.cluster)}"

    def submit(self, job: Job) -> None:
        """Starts or updates the cluster, which leaves running jobs alone, and hands the job to it."""
        if not Path(TOKEN).expanduser().is_file():
            raise MissingError(
                f"{TOKEN}: is absent, and the nodes get it from here; run `ray get-auth-token --generate`"
            )
        with self._file() as file:
            command = [*RAY, "up", file, "--yes", "--no-restart", "--no-config-cache"]
            if subprocess.run(command, check=False).returncode:  # minutes, told by Ray itself
                raise UserError("ray up: has not made the cluster; see its last lines above")
        with self._tunnel() as jobs:
            jobs.submit(job)

    def state(self, name: str) -> State:
        """What the Jobs API says."""
        with self._tunnel() as jobs:
            return jobs.state(name)

    def logs(self, name: str, follow: bool) -> Iterator[str]:
        """The log of the verb, for as long as the tunnel holds."""
        with self._tunnel() as jobs:
            yield from jobs.logs(name, follow)

    def stop(self, name: str) -> None:
        """Ends the job; the cluster stays until `ray down`."""
        with self._tunnel() as jobs:
            jobs.stop(name)

    @contextmanager
    def _file(self) -> Iterator[str]:
        """The launcher's file for one command; Ray knows its clusters by name, not by file."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "cluster.yaml"
            path.write_text(as_yaml(self.cluster), encoding="utf-8")
            yield str(path)

    @contextmanager
    def _tunnel(self) -> Iterator[RayJobs]:
        """The Jobs API through `ray dashboard`, an SSH tunnel to the head's loopback interface."""
        port = _free_port()
        with self._file() as file:
            command = [*RAY, "dashboard", file, f"--port={port}", "--no-config-cache"]
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
            try:
                _wait_for(port, process)
                ray = self.cluster.ray.model_copy(update={"address": f"http://127.0.0.1:{port}"})
                yield RayJobs(self.cluster.model_copy(update={"ray": ray}))
            finally:
                process.terminate()
                process.wait()


def _wait_for(port: int, process: "subprocess.Popen[str]") -> None:
    """Returns once the tunnel takes connections.

    Raises:
        UserError: it ended, or stayed closed for a minute and a half.
    """
    deadline = time.monotonic() + TUNNEL_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        try:
            create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            time.sleep(0.5)
        else:
            return
    process.terminate()
    said = process.stderr.read().strip().splitlines() if process.stderr else []
    raise UserError(
        f"ray dashboard: no tunnel to the head ({said[-1] if said else 'no answer'}); does the cluster run?"
    )


def _free_port() -> int:
    """A local port that nobody listens on."""
    with socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
