"""The only place that starts Ray, with the environment that its workers need."""

import logging
import os

# Ray reads these when it is imported, so they are set before; each is a fact measured on Ray 2.60.
ENVIRONMENT = {
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",  # else `uv run` packs the repository for every worker
    "NO_ALBUMENTATIONS_UPDATE": "1",  # else albumentations asks the network for a newer version on import
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_DATA_EXECUTION_NO_PROGRESS_TIMEOUT_S": "120",  # a starved pipeline is an error after 2 min, not 30
    "RAY_DATA_PARQUET_FOOTER_NUM_ACTORS": "1",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # else worker prints appear twice
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # workers without a GPU keep seeing CUDA_VISIBLE_DEVICES
    "RAY_TQDM_PATCH_PRINT": "0",
    "PYTHONWARNINGS": "ignore::FutureWarning",
}
for _name, _value in ENVIRONMENT.items():
    os.environ.setdefault(_name, _value)

import ray  # noqa: E402


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


def stop() -> None:
    """Disconnects; a cluster that `start` made ends with it."""
    ray.shutdown()
