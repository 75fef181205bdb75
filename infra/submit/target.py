"""What every kind of cluster can do with a job, and which kind the settings mean."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from infra.cluster import ClusterConfig
from infra.submit.package import Job


class Status(StrEnum):
    """How a job stands."""

    WAITING = "waiting"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    STOPPED = "stopped"

    @property
    def ended(self) -> bool:
        """Whether it will not change any more."""
        return self not in (Status.WAITING, Status.RUNNING)


@dataclass(frozen=True, slots=True)
class State:
    """A job's status, and what the cluster says about it."""

    status: Status
    detail: str = ""
    code: int | None = None
    """Exit code of the verb, where it has ended and the cluster tells."""

    @property
    def exit_code(self) -> int:
        """What following it ends with: 0 only when it succeeded; 2 where the verb found a user error."""
        if self.status is Status.SUCCEEDED:
            return 0
        return 2 if self.code == 2 else 1


class LostError(ConnectionError):
    """The cluster does not answer any more; the job may well go on."""


class Target(Protocol):
    """A place that runs jobs.

    Every method raises UserError for what the user can mend (an address, a token, a missing tool, an unknown job), and
    LostError where an answer stayed away.
    """

    def on_this_machine(self) -> bool:
        """Whether all of it runs here, so that local paths are good."""
        ...

    def plan(self, job: Job) -> str:
        """What `submit` would hand over, in the cluster's own language."""
        ...

    def submit(self, job: Job) -> None:
        """Hands the job over and returns; it needs this process no more."""
        ...

    def state(self, name: str) -> State:
        """How the job stands."""
        ...

    def logs(self, name: str, follow: bool) -> Iterator[str]:
        """Its log from the beginning, in pieces; with `follow` until it has ended."""
        ...

    def stop(self, name: str) -> None:
        """Ends the job; one that has ended stays as it is."""
        ...


def kind_of(cluster: ClusterConfig) -> str:
    """The kind of cluster: as configured, else `ray` where an address is known, else `local`."""
    known = cluster.ray.address or os.environ.get("RAY_ADDRESS")
    return cluster.kind or ("ray" if known else "local")


def target_of(cluster: ClusterConfig) -> Target:
    """The place that the settings describe; `local` has none, its verbs simply run.

    Raises:
        UserError: a tool that it needs is not installed, an address is missing.
    """
    kind = kind_of(cluster)
    os.environ.setdefault("RAY_AUTH_MODE", cluster.auth)  # Ray reads it once, when it is imported
    if kind == "ray":
        from infra.submit.ray_jobs import RayJobs

        return RayJobs(cluster)
    if kind == "kuberay":
        from infra.submit.kubernetes import Kubernetes

        return Kubernetes(cluster)
    if kind == "aws":
        from infra.submit.launcher import Launched

        return Launched(cluster)
    assert kind == "slurm"
    from infra.submit.batch import Slurm

    return Slurm(cluster)
