"""Kubernetes through a KubeRay RayJob, by kubectl: it knows every way to log in, and asks for strict validation."""

import json
import subprocess
import time
from collections.abc import Iterator
from typing import Any

from infra.cluster import ClusterConfig
from infra.kuberay.render import as_yaml, job_objects
from infra.submit import tools
from infra.submit.package import Job
from infra.submit.target import LostError, State, Status

Tree = dict[str, Any]
POLL_SECONDS = 3.0
STATUS = {"SUCCEEDED": Status.SUCCEEDED, "FAILED": Status.FAILED, "STOPPED": Status.STOPPED}
DEPLOYMENT = {"Complete": Status.SUCCEEDED, "Failed": Status.FAILED, "Suspended": Status.STOPPED}
"""Ends of a RayJob that never came to run its verb; `Complete` alone says nothing of the verb, jobStatus does."""


class Kubernetes:
    """The current context of kubectl, or the one that is configured."""

    def __init__(self, cluster: ClusterConfig) -> None:
        self.cluster = cluster
        context = cluster.kuberay.context
        self.kubectl = ["kubectl", *(["--context", context] if context else []), "-n", cluster.kuberay.namespace]

    def on_this_machine(self) -> bool:
        """Pods see no file of this machine."""
        return False

    def plan(self, job: Job) -> str:
        """The objects as YAML."""
        return as_yaml(job_objects(self.cluster, job))

    def submit(self, job: Job) -> None:
        """Makes the RayJob, then what goes with it: they belong to the job, so that Kubernetes deletes them with it."""
        *others, ray_job = job_objects(self.cluster, job)
        made = json.loads(self._create(ray_job))
        owner = {
            "apiVersion": made["apiVersion"],
            "kind": made["kind"],
            "name": job.name,
            "uid": made["metadata"]["uid"],
        }
        for item in others:
            item["metadata"]["ownerReferences"] = [owner]
            self._create(item)

    def state(self, name: str) -> State:
        """What the operator has written into the RayJob."""
        status = json.loads(tools.call([*self.kubectl, "get", "rayjob", name, "-o", "json"])).get("status", {})
        return state_of(status)

    def logs(self, name: str, follow: bool) -> Iterator[str]:
        """The log of the pod that submitted the verb, once the cluster is there."""
        shown = ""
        while follow:
            status = json.loads(tools.call([*self.kubectl, "get", "rayjob", name, "-o", "json"])).get("status", {})
            now = status.get("jobDeploymentStatus") or "New"
            if now != shown:
                shown = now
                yield f"RayJob {name}: {now}\n"
            if now not in ("New", "Initializing", "Retrying", "Waiting"):
                break
            time.sleep(POLL_SECONDS)
        yield from self._pod_log(name, follow)

    def stop(self, name: str) -> None:
        """Suspends the RayJob: its cluster goes, its record stays."""
        change = json.dumps({"spec": {"suspend": True}})
        tools.call([*self.kubectl, "patch", "rayjob", name, "--type=merge", "-p", change])

    def _create(self, item: Tree) -> str:
        """Creates one object; a field that the server does not know is an error there too."""
        return tools.call([*self.kubectl, "create", "--validate=strict", "-o", "json", "-f", "-"], json.dumps(item))

    def _pod_log(self, name: str, follow: bool) -> Iterator[str]:
        """Lines of the submitter; `kubectl logs` ends with the pod."""
        command = [*self.kubectl, "logs", f"job/{name}", *(["--follow"] if follow else [])]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            assert process.stderr is not None
            try:
                yield from process.stdout
                said = process.stderr.read().strip()
            finally:
                process.terminate()
        if process.wait() > 0:
            raise LostError(f"kubectl logs: {said.splitlines()[-1] if said else 'ended early'}")


def state_of(status: Tree) -> State:
    """A RayJob's status in our words: the verb's own end first, then that of its cluster.

    Args:
        status: the field `status` of a RayJob; empty before the operator has seen it.
    """
    job, deployment = status.get("jobStatus") or "", status.get("jobDeploymentStatus") or ""
    detail = ": ".join(part for part in (status.get("reason"), status.get("message")) if part) or deployment
    found = STATUS.get(job) or (DEPLOYMENT.get(deployment) if deployment != "Complete" else None)
    if deployment in ("Suspended", "Suspending"):
        found = Status.STOPPED
    if deployment == "Retrying":  # the verb failed, and starts again on another cluster
        found = Status.WAITING
    if found is None:
        found = Status.RUNNING if job == "RUNNING" else Status.WAITING
    return State(found, " ".join(detail.split()))
