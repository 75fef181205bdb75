"""What a run is called and what may be said of it: pure values, no server."""

import math
from collections.abc import Mapping
from enum import StrEnum
from typing import Any
from urllib.parse import urlsplit

from pydantic import Field

from mpc.config import Config
from pipeline.dotted import flat
from pipeline.meter import RATIOS

METRICS = frozenset({"lr", "ramp", "loss", "images_per_s", "data_wait_share", "seconds", "cost", *RATIOS})
PREFIXES = ("loss_", "val_", "system/")


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


def ours(name: str) -> bool:
    """Whether a metric is one of an epoch of ours; Ray Tune adds many to a result (pid, timestamp, config/...)."""
    return name in METRICS or name.startswith(PREFIXES)


def finite(metrics: Mapping[str, object]) -> dict[str, float]:
    """The finite numbers among `metrics`."""
    return {
        name: float(value)
        for name, value in metrics.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    }


def epoch_metrics(line: Mapping[str, object]) -> dict[str, float]:
    """What goes to MLflow of a line of metrics.jsonl or a result of Ray Tune."""
    return {name: value for name, value in finite(line).items() if ours(name)}
