"""What trials ask of the cluster, and how many run at a time: what would wait without end is refused or mended."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import ray
from ray import tune

from mpc.errors import UserError
from pipeline.config import RunConfig
from tuning.config import SearchConfig

HEAD = "node:__internal_head__"
"""A resource of which every Ray cluster has exactly 1, on its head; Ray's own actors ask for thousandths of it."""
DRIVER_CPU = 0.01
"""Of a trial that is a Ray Train job: its workers ask for themselves."""
POPULATIONS = ("pbt", "hyperband")
"""Schedulers that pause trials: more of them exist than run."""

Node = Mapping[str, float]
"""What one machine offers, by Ray's names: CPU, GPU."""


class Plan(NamedTuple):
    """How a search uses the cluster."""

    concurrent: int
    """Trials at a time."""
    cpus_for_data: float
    """CPUs that stay free for reading tasks."""
    notes: tuple[str, ...]
    """What was changed so that nothing waits for ever, and why."""


def cluster() -> list[Node]:
    """The machines of the cluster that this process is connected to."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def plan(run: RunConfig, config: SearchConfig, nodes: Sequence[Node]) -> Plan:
    """Trials at a time such that reading tasks always find a CPU: a search that takes every CPU would wait for ever.

    Raises:
        UserError: not even one trial fits, in the whole cluster or because no machine is large enough.
    """
    notes: list[str] = []
    kept = max(config.cpus_for_data, run.cpus_beside)
    if kept > config.cpus_for_data:
        notes.append(
            f"search.cpus_for_data raised from {config.cpus_for_data:g} to {kept:g}: with less, no reading task of "
            f"data.task_cpus={run.data.task_cpus:g} could start"
        )
    fits = _fitting(run, kept, nodes)
    if fits < 1:
        raise UserError(_refusal(run, kept, nodes))
    if config.max_concurrent and config.max_concurrent > fits:
        notes.append(f"search.max_concurrent lowered from {config.max_concurrent} to {fits}: more would wait for CPUs")
    return Plan(min(fits, config.max_concurrent or fits), kept, tuple(notes))


def _fitting(run: RunConfig, kept: float, nodes: Sequence[Node]) -> int:
    """Trials whose workers all find a machine while `kept` CPUs stay free, of which drivers leave one reading task."""
    slots = sum(_workers(run, node) for node in nodes)
    cpus = sum(node.get("CPU", 0.0) for node in nodes)
    of_workers = run.train.num_workers * run.worker_cpus
    driver = DRIVER_CPU if run.train.num_workers > 1 else 0.0
    return min(
        slots // run.train.num_workers,
        math.floor((cpus - kept) / of_workers + 1e-9),
        math.floor((cpus - run.cpus_beside) / (of_workers + driver) + 1e-9),
    )


def _workers(run: RunConfig, node: Node) -> int:
    """Workers that one machine carries; a share of a GPU lies on one GPU."""
    fits = math.floor(node.get("CPU", 0.0) / run.worker_cpus + 1e-9)
    if not run.worker_gpus:
        return fits
    gpus = node.get("GPU", 0.0)
    shares = math.floor(1 / run.worker_gpus + 1e-9) * int(gpus) if run.worker_gpus < 1 else int(gpus / run.worker_gpus)
    return min(fits, shares)


def _refusal(run: RunConfig, kept: float, nodes: Sequence[Node]) -> str:
    """Why not even one trial fits."""
    cpus, gpus = (sum(node.get(name, 0.0) for node in nodes) for name in ("CPU", "GPU"))
    a_worker = f"{run.worker_cpus:g} CPUs" + (f" and {run.worker_gpus:g} GPU" if run.worker_gpus else "")
    asked = f"a trial of {run.train.num_workers} workers with {a_worker} each beside {kept:g} CPUs for data"
    remedy = "lower train.num_workers, train.worker_cpus" + (", train.gpus" if run.worker_gpus else "")
    if nodes and not any(_workers(run, node) for node in nodes):
        largest = max(nodes, key=lambda node: (node.get("GPU", 0.0), node.get("CPU", 0.0)))
        have = f"the largest machine has {largest.get('CPU', 0.0):g} CPUs and {largest.get('GPU', 0.0):g} GPUs"
        return f"no machine carries a worker with {a_worker}: {have}; {remedy}"
    return f"{asked} exceeds the cluster's {cpus:g} CPUs and {gpus:g} GPUs; {remedy} or search.cpus_for_data"


def asked(run: RunConfig, concurrent: int) -> tune.PlacementGroupFactory:
    """What a trial asks of Ray: its worker's CPUs and GPU, or, with several workers, nothing but its driver.

    And a share of something that exists once: a searcher hands out no more trials than may run, but Tune starts at once
    what was paused, or what a resumed search had begun.

    Args:
        run: what a trial trains.
        concurrent: trials at a time.
    """
    bundle = {"CPU": DRIVER_CPU if run.train.num_workers > 1 else run.worker_cpus}
    if run.worker_gpus and run.train.num_workers == 1:
        bundle["GPU"] = run.worker_gpus
    return tune.PlacementGroupFactory([bundle, {HEAD: head_share(concurrent, jobs=run.train.num_workers > 1)}])


def head_share(concurrent: int, *, jobs: bool) -> float:
    """Of the one `HEAD` what a trial asks for: one trial more would find none, and Ray's own actors always some.

    Ray counts in ten-thousandths: from eighty trials at a time on, one more in a hundred may find its share.

    Args:
        concurrent: trials at a time.
        jobs: trials are Ray Train jobs, each with an actor of its own on the head. From 22 at a time on, these need so
            much that a few trials more than planned may start where a search is resumed.
    """
    left = min(0.1, 0.5 / (concurrent + 1))
    if jobs:
        left = max(left, min(0.3, 0.002 * (concurrent + 1)))
    return math.floor(1e4 * (1 - left) / concurrent) / 1e4
