"""What a cluster must have before a run starts, because Ray would wait for it without end."""

from typing import Any

import ray

from mpc.errors import UserError
from pipeline.config import RunConfig


def preflight(run: RunConfig) -> None:
    """Refuses what Ray would wait for without end.

    Raises:
        UserError: workers and reading tasks together ask for more than the cluster has, or could leave none of it to
            the reading tasks.
    """
    if reason := shortage(run):
        raise UserError(f"{reason}; lower train.num_workers, train.worker_cpus or data.task_cpus")
    if run.train.min_workers is not None:
        for node in ray.nodes():
            if node["Alive"]:
                _refuse_starving(run, node["Resources"])


def shortage(run: RunConfig) -> str | None:
    """What the cluster lacks for the fewest workers that may train, in one line; None where nothing is missing."""
    have: dict[str, float] = ray.cluster_resources()
    cpus, gpus, workers = have.get("CPU", 0), have.get("GPU", 0), run.train.least_workers
    if workers * run.worker_cpus + run.cpus_beside > cpus:
        return (
            f"{workers} workers x {run.worker_cpus:g} CPU and {run.cpus_beside:g} CPU for Ray Data exceed the "
            f"cluster's {cpus:g} CPUs"
        )
    if workers * run.worker_gpus > gpus:
        return (
            f"{workers} workers ask for {run.worker_gpus:g} GPU each, the cluster has {gpus:g}; train.use_gpu=false "
            f"trains on CPUs"
        )
    return None


def _refuse_starving(run: RunConfig, node: dict[str, Any]) -> None:
    """Refuses elastic workers that could fill a node: it may be the only one left, and Ray Data must read somewhere."""
    cpus = node.get("CPU", 0)
    fit = min(run.train.num_workers, int(cpus / run.worker_cpus))
    if run.train.use_gpu:
        fit = min(fit, int(node.get("GPU", 0) / run.worker_gpus))
    if fit and fit * run.worker_cpus + run.cpus_beside > cpus:
        raise UserError(
            f"{fit} workers x {run.worker_cpus:g} CPU would fill a node of {cpus:g} CPUs and leave Ray Data none; set "
            f"train.worker_cpus so that data.task_cpus {run.cpus_beside:g} stay free on every node, or "
            f"data.backend=torch"
        )
