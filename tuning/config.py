"""The configuration of a search and of tracking."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from mpc.config import Config, Count, NonNegative, Positive, Share

Fraction = Annotated[float, Field(gt=0.0, le=0.5)]


class PbtConfig(Config):
    """Population based training: at every `interval` the worst trials go on from the best ones, with other settings."""

    interval: Count = 1
    """Epochs between two comparisons."""
    quantile: Fraction = 0.25
    """Share of the trials that are replaced, and share of those that replace them."""
    resample: Share = 0.25
    """Probability that a setting is drawn anew; else it is multiplied by 0.8 or 1.2, or takes the next choice."""


class SearchConfig(Config):
    """A search over the values of a training run (Ray Tune)."""

    searcher: Literal["random", "tpe", "pareto", "grid"] = "tpe"
    """`random`; `tpe`: Optuna's tree-structured Parzen estimator over all settings together; `pareto`: the same for two
    aims, the metric and a low cost; `grid`: every combination, of choices and of settings with steps."""
    scheduler: Literal["none", "asha", "median", "hyperband", "pbt"] = "asha"
    """`asha` stops trials that are behind after `grace_epochs`, `median` those whose best lies below the median of the
    others' means, `hyperband` halves groups of trials, `pbt` changes settings during training; `none` runs every trial
    to its end."""
    max_trials: Count = 20
    """Trials at most; with `pbt`, the size of the population."""
    max_hours: Positive | None = None
    """Hours after which no further trial starts and running ones stop, over all sessions; None sets no limit."""
    max_concurrent: Count | None = None
    """Trials at a time; None takes what the CPUs (and GPUs) carry beside the data tasks."""
    grace_epochs: Count = 3
    """Epochs that every trial may train before it is compared (asha, median). While the learning rate warms up and the
    average of the weights begins, a trial's value says next to nothing of its end: docs/tuning.md has the figures."""
    reduction_factor: Annotated[float, Field(gt=1.0)] = 3.0
    """ASHA and HyperBand keep one trial in this many at each rung."""
    pbt: PbtConfig = PbtConfig()
    metric: str = "val_macro_auroc"
    """Key of `metrics.jsonl` that is searched for: `val_macro_auroc`, `val_macro_ap`, or with mode=min `loss` or its
    supervised term `loss_sup`; other terms are not there in every epoch of every trial."""
    mode: Literal["max", "min"] = "max"
    cost: Literal["seconds", "mflops"] = "seconds"
    """What `pareto` weighs against the metric: mean seconds of an epoch, as measured, or the millions of
    floating-point operations of one image's forward pass, which are the same on every machine."""
    warm_start: tuple[str, ...] = ()
    """Earlier searches in MLflow, by run id or by name, whose trials this one begins with."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the searcher; reproducible only with one trial at a time."""
    keep_trials: Count = 3
    """Best trials whose checkpoints stay on disk."""
    cpus_for_data: NonNegative = 1.0
    """CPUs that trials leave to reading and augmenting by Ray Data; 0 will do with data.backend=torch."""

    @property
    def sign(self) -> float:
        """What makes more of the metric better: 1 or -1."""
        return 1.0 if self.mode == "max" else -1.0

    @model_validator(mode="after")
    def metric_is_measured(self) -> "SearchConfig":
        """A search by what an epoch may lack would end there, and one in the wrong direction for the worst."""
        modes = {"val_macro_auroc": "max", "val_macro_ap": "max", "loss": "min", "loss_sup": "min"}
        mode = modes.get(self.metric)
        if mode is None:
            raise ValueError(f"not every epoch reports metric {self.metric}; set it to one of {', '.join(modes)}")
        if mode != self.mode:
            raise ValueError(f"mode {self.mode} would take the worst {self.metric} for the best; set mode={mode}")
        return self

    @model_validator(mode="after")
    def fits_together(self) -> "SearchConfig":
        """Not every searcher works with every scheduler."""
        if self.scheduler == "pbt" and self.searcher != "random":
            raise ValueError(f"scheduler pbt begins at random, {self.searcher} would do nothing; set searcher=random")
        if self.scheduler == "pbt" and self.max_trials < 2:
            raise ValueError("scheduler pbt compares trials; set max_trials to 2 or more")
        if self.searcher == "pareto" and self.scheduler != "none":
            raise ValueError(
                f"searcher pareto weighs two aims and scheduler {self.scheduler} would stop trials by one; "
                f"set scheduler=none"
            )
        if self.searcher == "grid" and self.warm_start:
            raise ValueError("searcher grid tries every point anyway; leave warm_start out")
        return self


class TrackingConfig(Config):
    """Where runs are recorded and models are registered (MLflow)."""

    experiment: str = "mpc-cxr"
    uri: str | None = None
    """Tracking server or database; None takes `MLFLOW_TRACKING_URI`, else `mlflow.db` in the run's folder."""
    model_name: str = "mpc-cxr"
    """Name in the registry under which the demo registers its best trial."""
