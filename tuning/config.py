"""The configuration of a search and of tracking."""

from typing import Annotated, Literal

from pydantic import Field

from mpc.config import Config, Count, NonNegative, Positive


class SearchConfig(Config):
    """A search over the values of a training run (Ray Tune)."""

    searcher: Literal["random", "tpe"] = "tpe"
    """`random`, or `tpe`: Optuna's tree-structured Parzen estimator."""
    scheduler: Literal["none", "asha"] = "asha"
    """`asha` stops trials that are behind after `grace_epochs`; `none` runs every trial to its end."""
    max_trials: Count = 20
    max_hours: Positive | None = None
    """Hours after which no further trial starts and running ones stop; None sets no limit."""
    max_concurrent: Count | None = None
    """Trials at a time; None takes what the CPUs (and GPUs) carry beside the data tasks."""
    grace_epochs: Count = 1
    """Epochs that every trial may train before ASHA compares it."""
    reduction_factor: Annotated[float, Field(gt=1.0)] = 3.0
    """ASHA keeps one trial in this many at each rung."""
    metric: str = "val_macro_auroc"
    """Key of `metrics.jsonl` that is searched for."""
    mode: Literal["max", "min"] = "max"
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the searcher; reproducible only with one trial at a time."""
    keep_trials: Count = 3
    """Best trials whose checkpoints stay on disk."""
    cpus_for_data: NonNegative = 1.0
    """CPUs that trials leave to reading and augmenting by Ray Data; 0 will do with data.backend=torch."""


class TrackingConfig(Config):
    """Where runs are recorded and models are registered (MLflow)."""

    experiment: str = "mpc-cxr"
    uri: str | None = None
    """Tracking server or database; None takes `MLFLOW_TRACKING_URI`, else `mlflow.db` in the run's folder."""
    model_name: str = "mpc-cxr"
    """Name in the registry under which the demo registers its best trial."""
