"""The only place that starts Ray, with the environment that its workers need."""

import logging
import os
from typing import TYPE_CHECKING

import ray
from ray._private.services import find_gcs_addresses

from mpc.errors import UserError
from pipeline.environment import ENVIRONMENT

if TYPE_CHECKING:
    from ray.data import Dataset


def start(
    address: str | None = None, num_cpus: int | None = None, *, dashboard: bool = False, verbose: bool = False
) -> None:
    """Connects to the cluster at `address` (or `RAY_ADDRESS`), else starts one on this machine; a second call is free.

    Args:
        address: `ray://`, `host:port` or `auto`; None honours `RAY_ADDRESS`.
        num_cpus: CPUs that a local cluster offers; None takes the machine's.
        dashboard: needed where Ray Tune drives Ray Train: stopped trials free their resources through it.
        verbose: print the workers' logs too.
    """
    if ray.is_initialized():
        return
    address = address or os.environ.get("RAY_ADDRESS")
    level = logging.INFO if verbose else logging.ERROR
    for name in ("ray.data", "ray.train", "ray.tune"):
        logging.getLogger(name).setLevel(level)
    if address:  # a local cluster's workers inherit this process's environment, a remote one's do not
        ray.init(address=address, runtime_env={"env_vars": ENVIRONMENT}, logging_level=level, log_to_driver=verbose)
    else:
        ray.init(num_cpus=num_cpus, include_dashboard=dashboard, logging_level=level, log_to_driver=verbose)
        if dashboard:
            _refuse_neighbours()


def _refuse_neighbours() -> None:
    """Ray frees a stopped trial's resources through a client that looks for "the" local cluster; two would block it.

    Raises:
        UserError: another cluster runs on this machine.
    """
    found = find_gcs_addresses()
    if len(found) > 1:
        ray.shutdown()
        raise UserError(
            f"{len(found) - 1} other Ray cluster runs on this machine, and trials of several workers could not free "
            f"their resources; end it (`ray stop`), or set RAY_ADDRESS to the one to use"
        )


def configured(
    dataset: "Dataset", *, ordered: bool, cpus: float | None = None, block_bytes: int | None = None
) -> "Dataset":
    """A data set of Ray Data with settings of its own; those of the process stay as they are.

    It has no limit on the time between two blocks. Ray's limit counts the time in which nobody asks for one, during a
    validation say, and the time in which a task decodes a whole shard; neither is a fault.

    Args:
        dataset: as it will be read; nothing is derived from it any more.
        ordered: blocks come in the order of their tasks, not as they become ready.
        cpus: that its tasks may take at a time; None sets no limit.
        block_bytes: from which size a block is handed out; None takes Ray's.
    """
    from ray.data import ExecutionResources

    context = dataset.context
    context.execution_no_progress_timeout_s = -1
    context.execution_options.preserve_order = ordered
    if cpus is not None:
        context.execution_options.resource_limits = ExecutionResources(cpu=cpus)
    if block_bytes is not None:
        context.target_max_block_size = block_bytes
    return dataset


def stop() -> None:
    """Disconnects; a cluster that `start` made ends with it."""
    ray.shutdown()
