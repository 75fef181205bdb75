"""What Ray, albumentations and MLflow read from the environment on import: set here, before any of them is imported.

glibc and Ray read some of it as a process starts: those that this one starts. Importing any module of `pipeline` or
`tuning` runs this first.
"""

import os

# each is a fact measured on Ray 2.60
ENVIRONMENT = {
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",  # else `uv run` packs the repository for every worker
    "NO_ALBUMENTATIONS_UPDATE": "1",  # else albumentations asks the network for a newer version on import
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_DATA_PARQUET_FOOTER_NUM_ACTORS": "1",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # else worker prints appear twice
    # a lost node counts for half a minute more; workers planned on it are planned anew after so long, not 60 s
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "10",
    # reading tasks come in bursts: after the default of 1 s each burst would start, and import, a process anew
    "RAY_idle_worker_killing_time_threshold_ms": "60000",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # workers without a GPU keep seeing CUDA_VISIBLE_DEVICES
    "RAY_TQDM_PATCH_PRINT": "0",
    "RAY_AIR_NEW_OUTPUT": "0",  # Tune prints a banner whatever verbosity it is given; the display is ours
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # tuning.interruption has ours
    "TUNE_GLOBAL_CHECKPOINT_S": "2",  # a killed search forgets this much; by default 10 s and more
    "PYTHONWARNINGS": "ignore::FutureWarning",
    # glibc gives the memory of activations back after each step, and a worker's thread asks for it anew page by page:
    # 4.2 million page faults and 45 s in 8 epochs of a trial, against 0.2 million and 36 s (docs/decisions.md)
    "MALLOC_TRIM_THRESHOLD_": str(2 * 2**30),
    "MALLOC_MMAP_THRESHOLD_": str(32 * 2**20),
    "MALLOC_TOP_PAD_": str(64 * 2**20),
}
for _name, _value in ENVIRONMENT.items():
    os.environ.setdefault(_name, _value)
