"""A Ray cluster that runs, through its Jobs API."""

import asyncio
import logging
import os
import socket
import tempfile
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import requests
import yaml
from ray.exceptions import AuthenticationError
from ray.job_submission import JobStatus, JobSubmissionClient

from infra.cluster import ClusterConfig
from infra.submit.package import Job
from infra.submit.target import LostError, State, Status
from mpc.errors import MissingError, UserError

STATUS = {
    JobStatus.PENDING: Status.WAITING,
    JobStatus.RUNNING: Status.RUNNING,
    JobStatus.SUCCEEDED: Status.SUCCEEDED,
    JobStatus.FAILED: Status.FAILED,
    JobStatus.STOPPED: Status.STOPPED,
}
CHATTY = (
    "ray.dashboard.modules.dashboard_sdk",
    "ray.dashboard.modules.job.sdk",
    "ray._private.authentication.http_token_authentication",
)
"""Loggers of Ray's client, which set their own level."""
LOOPBACK = ("localhost", "127.0.0.1", "::1", "[::1]", "auto")
NO_TOKEN = (
    "no token for the cluster; set RAY_AUTH_TOKEN_PATH to the file that holds it, or RAY_AUTH_TOKEN, or write it to "
    "~/.ray/auth_token; for a cluster on this machine that runs without one set cluster.auth=disabled"
)


class RayJobs:
    """The Jobs API at `cluster.ray.address`, or RAY_ADDRESS.

    Raises:
        UserError: no address, no token, a wrong one, nobody there.
    """

    def __init__(self, cluster: ClusterConfig) -> None:
        self.cluster = cluster
        self.address = cluster.ray.address or os.environ.get("RAY_ADDRESS") or ""
        if not self.address:
            raise UserError("kind ray needs an address; set cluster.ray.address=http://HOST:8265 or RAY_ADDRESS")
        if cluster.auth == "disabled" and not is_loopback(self.address):
            raise UserError(f"{self.address}: cluster.auth=disabled is for this machine alone; leave it at token")
        if logging.getLogger().level > logging.INFO:
            for name in CHATTY:
                logging.getLogger(name).setLevel(logging.ERROR)
        try:
            with _explained(self.address):
                self.client = _client(self.address, cluster.ray.ca_file)
        except LostError as error:
            raise UserError(f"{error}; start the cluster, open its tunnel, or mend cluster.ray.address") from None

    def on_this_machine(self) -> bool:
        """Whether the cluster is one node and that node is this machine: a tunnel makes any address look local."""
        names = [node["nodeManagerHostname"] for node in self.nodes()]
        return names == [socket.gethostname()]

    def nodes(self) -> list[dict[str, Any]]:
        """The nodes that are alive, as Ray knows them from when they join; what they tell of themselves comes later."""
        with _explained(self.address):
            reply = self.client._do_request("GET", "/nodes?view=summary")  # the client has no method for it
            reply.raise_for_status()
        found = [node["raylet"] for node in reply.json()["data"]["summary"]]
        return [node for node in found if node["state"] == "ALIVE"]

    def plan(self, job: Job) -> str:
        """The request to the Jobs API."""
        request = {"submission_id": job.name, "entrypoint": job.entrypoint, "metadata": job.metadata}
        environment = {"working_dir": f"{job.name}.zip", "env_vars": dict(job.environment)}
        return str(yaml.safe_dump(request | {"runtime_env": environment}, sort_keys=False))

    def submit(self, job: Job) -> None:
        """Uploads the package and starts the job."""
        with tempfile.TemporaryDirectory() as folder, _explained(self.address):
            package = Path(folder) / f"{job.name}.zip"
            package.write_bytes(job.package)
            self.client.submit_job(
                entrypoint=job.entrypoint,
                submission_id=job.name,
                runtime_env={"working_dir": str(package), "env_vars": dict(job.environment)},
                metadata=job.metadata,
            )

    def state(self, name: str) -> State:
        """What the Jobs API says; the exit code of the verb among it."""
        with _explained(self.address, name):
            info = self.client.get_job_info(name)
        said = (info.message or "").partition(", last available logs")[0]  # they are shown by `logs`
        return State(STATUS[info.status], _first_line(said), info.driver_exit_code)

    def logs(self, name: str, follow: bool) -> Iterator[str]:
        """The log of the verb."""
        self.state(name)  # a job that does not exist has a log without an end
        with _explained(self.address, name):
            if not follow:
                yield self.client.get_job_logs(name)
                return
            yield from _iterate(self.client.tail_job_logs(name))

    def stop(self, name: str) -> None:
        """Asks for the end of the job: it gets a moment to close its files, then it is killed."""
        with _explained(self.address, name):
            self.client.stop_job(name)


def is_loopback(address: str) -> bool:
    """Whether an address lies on this machine's loopback interface."""
    host = urlsplit(address if "://" in address else f"//{address}").hostname or address
    return host in LOOPBACK or host.startswith("127.")


def _client(address: str, ca_file: str | None) -> JobSubmissionClient:
    """A client for `address`, whatever RAY_ADDRESS says: Ray's own would prefer the variable."""
    kept = os.environ.pop("RAY_ADDRESS", None)
    try:
        return JobSubmissionClient(address, verify=ca_file or True)
    finally:
        if kept is not None:
            os.environ["RAY_ADDRESS"] = kept


def _iterate(chunks: AsyncGenerator[str]) -> Iterator[str]:
    """An asynchronous generator as a plain one; left early, it closes its connection."""
    with asyncio.Runner() as runner:
        try:
            while (chunk := runner.run(_next(chunks))) is not None:
                yield chunk
        finally:
            runner.run(chunks.aclose())


async def _next(chunks: AsyncGenerator[str]) -> str | None:
    """The next piece, or None at the end."""
    return await anext(chunks, None)


@contextmanager
def _explained(address: str, name: str = "") -> Iterator[None]:
    """Turns what Ray's client raises into one line."""
    try:
        yield
    except AuthenticationError as error:
        wrong = f"{address}: refuses the token; use the one that the cluster was started with"
        raise UserError(wrong if "Authentication failed" in str(error) else f"{address}: {NO_TOKEN}") from None
    except (ConnectionError, requests.RequestException, aiohttp.ClientError) as error:
        raise LostError(f"{address} does not answer ({_first_line(str(error))})") from error
    except RuntimeError as error:
        text = str(error)
        if "status code 404" in text:
            raise MissingError(f"job {name}: is not known at {address}; mend its name, as submit printed it") from None
        if "WebSocket" in text:
            raise LostError(f"{address} has closed the connection") from error
        raise UserError(f"{address}: {_first_line(_raised(text))}; see the cluster's own log") from error


def _raised(text: str) -> str:
    """What a traceback of the cluster ends with, which says what is wrong; any other text as it is."""
    lines = text.splitlines()
    frames = [number for number, line in enumerate(lines, 1) if line.startswith("  ")]
    return "\n".join(lines[frames[-1] :]).rstrip(".\n") if frames else text


def _first_line(text: str | None) -> str:
    """One line of at most 300 characters."""
    return " ".join((text or "").split())[:300]
