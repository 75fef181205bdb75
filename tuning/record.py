"""What a run is called and what may be said of it: pure values, no server."""

import math
from collections.abc import Mapping
from enum import StrEnum
from typing import Any
from urllib.parse import urlsplit

from pydantic import Field

from mpc.config import Config
from pipeline.dotted import flat

METRICS = frozenset(
    [
        *("lr", "ramp", "loss", "loss_sup", "loss_ipc", "loss_fpc", "loss_btc", "val_macro_auroc", "val_macro_ap"),
        *("selected_share", "pseudo_positives", "mean_sum_p", "pseudo_precision", "pseudo_recall"),
        *("images_per_s", "seconds"),
    ]
)
"""The metrics of an epoch that go to MLflow; what Ray Tune adds to a result stays out."""


class Status(StrEnum):
    """How a run ended, in MLflow's words."""

    RUNNING = "RUNNING"
    FINISHED = "FINISHED"
    FAILED = "FAILED"
    KILLED = "KILLED"


class RunRecord(Config):
    """A run's identity beside its metrics.jsonl: enough to find the run again, or to replay it on another server."""

    key: str
    """Unique and stable: a run with the same key is continued, never doubled."""
    name: str
    experiment: str = "mpc-cxr"
    parent: str | None = None
    """Key of the parent run, e.g. the search of a trial."""
    tags: dict[str, str] = Field(default_factory=dict)
    config: dict[str, Any] = Field(default_factory=dict)
    """What becomes parameters; without secrets and places."""
    status: Status = Status.RUNNING


def flatten(config: Mapping[str, Any]) -> dict[str, str]:
    """`{"a": {"b": 1}}` as `{"a.b": "1"}`: values as MLflow's parameters, places cut to their last part."""
    return {key: str(value) for key, value in flat(without_places(config)).items()}


def without_places(value: Any) -> Any:
    """`value` with every path and URI cut to its last part: hosts, folders, buckets and query strings stay here."""
    if isinstance(value, Mapping):
        return {key: without_places(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_places(item) for item in value]
    if isinstance(value, str) and ("://" in value or value.startswith(("/", "~", "./", "../"))):
        return urlsplit(value).path.rstrip("/").rsplit("/", 1)[-1]
    return value


def finite(metrics: Mapping[str, object], allowed: frozenset[str] | None = None) -> dict[str, float]:
    """The finite numbers among `metrics`, or among those that are `allowed`."""
    return {
        name: float(value)
        for name, value in metrics.items()
        if (allowed is None or name in allowed)
        and isinstance(value, int | float)
        and not isinstance(value, bool)
        and math.isfinite(value)
    }
