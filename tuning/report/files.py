"""All that a report is made from, read from files and checked to belong together."""

import io
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray
from scipy.special import expit, logit

from mpc.checkpoint import read_info
from mpc.config import CheckpointInfo
from mpc.errors import MissingError, UserError
from mpc.metrics import score
from pipeline import storage
from pipeline.card import DatasetCard, read_card
from pipeline.config import RunConfig
from pipeline.evaluate import METRICS_FILE, PREDICTIONS_FILE
from pipeline.inference import REGISTERED_FILE, thresholds
from pipeline.manifest import matrix
from pipeline.plain_types import refuse_extension_types
from pipeline.record import MetricsLog

SEARCH_FILE, TRIALS = "search.json", "trials"
FAR = 98  # per cent of all predictions lie nearer to their threshold than the end of a bar
ROUNDING = 1e-6
"""Probabilities are computed anew from float32 logits: scores may differ by this."""


@dataclass(frozen=True)
class Scores:
    """The rows of predictions.parquet, in the order of the split, and the thresholds of the checkpoint."""

    image_id: list[str]
    logits: NDArray[np.float64]
    """[N, K]."""
    labels: NDArray[np.int8]
    known: NDArray[np.bool_]
    thresholds: NDArray[np.float64]
    """[K], probabilities."""
    default: tuple[bool, ...]
    """Whether a threshold is only the default of one half."""

    @cached_property
    def probabilities(self) -> NDArray[np.float64]:
        """[N, K] in (0, 1)."""
        return np.asarray(expit(self.logits))

    @cached_property
    def called(self) -> NDArray[np.bool_]:
        """[N, K]: the probability reaches the threshold."""
        return np.asarray(self.probabilities >= self.thresholds)

    @cached_property
    def margins(self) -> NDArray[np.float64]:
        """[N, K]: how far a prediction lies above its threshold, in log-odds."""
        return np.asarray(self.logits - logit(np.clip(self.thresholds, 1e-9, 1 - 1e-9)))

    @cached_property
    def margin_scale(self) -> float:
        """Log-odds from a threshold within which nearly all predictions lie; > 0."""
        return float(np.percentile(np.abs(self.margins), FAR)) + 1e-9 if self.margins.size else 1.0


@dataclass(frozen=True)
class Inputs:
    """What the sections are written from."""

    places: dict[str, str]
    """`evaluation`, `data`, `checkpoint` and perhaps `search` as the user named them."""
    metrics: dict[str, Any]
    """metrics.json."""
    card: DatasetCard
    info: CheckpointInfo
    run: RunConfig
    registered: str | None
    """NAME/VERSION of a checkpoint that came from the registry."""
    scores: Scores
    search: dict[str, Any] | None
    """search.json."""
    histories: dict[str, list[dict[str, Any]]]
    """Epochs of each trial."""
    history: list[dict[str, Any]]
    """Epochs of the search's best trial, or without a search those of the run; empty where they are not at hand."""

    @property
    def same_data(self) -> bool:
        """Whether the model was trained on the data set that it was scored on."""
        return self.info.data_digest == self.card.digest


def read_inputs(evaluation: str, data: str, checkpoint: Path, search: str | None) -> Inputs:
    """Reads everything.

    Raises:
        MissingError: a file is absent.
        UserError: files that do not belong together, or that this version cannot read.
    """
    card, info = read_card(data), read_info(checkpoint)
    metrics = _json(storage.join(evaluation, METRICS_FILE))
    if metrics.get("data_digest") != card.digest:
        raise UserError(f"{evaluation} was scored on another data set than {data}; evaluate again, or name its own")
    if (metrics["checkpoint"]["step"], metrics["checkpoint"]["data_digest"]) != (info.step, info.data_digest):
        raise UserError(f"{evaluation} was scored with another checkpoint than {checkpoint}; evaluate again")
    scores = _scores(evaluation, metrics, card, info)
    record = _json(storage.join(search, SEARCH_FILE)) if search else None
    histories = {}
    for trial in record["trials"] if record and search else []:
        histories[trial["trial_id"]] = MetricsLog(storage.join(search or "", TRIALS, trial["trial_id"])).read()
    registered = checkpoint / REGISTERED_FILE
    places = {"evaluation": evaluation, "data": data, "checkpoint": str(checkpoint), "search": search}
    return Inputs(
        places={name: place for name, place in places.items() if place},
        metrics=metrics,
        card=card,
        info=info,
        run=RunConfig.model_validate(info.config),
        registered=registered.read_text(encoding="utf-8").strip() if registered.is_file() else None,
        scores=scores,
        search=record,
        histories=histories,
        history=histories[record["best"]] if record else MetricsLog(str(checkpoint.parent)).read(),
    )


def search_beside(checkpoint: str) -> str | None:
    """The search whose best/ a checkpoint is: its folder, or None where no search.json lies beside it."""
    path, mark, options = checkpoint.partition("?") if storage.is_remote(checkpoint) else (checkpoint, "", "")
    parent = path.rstrip("/").rpartition("/")[0] or "."
    folder = parent + mark + options
    return folder if storage.exists(storage.join(folder, SEARCH_FILE)) else None


def _scores(evaluation: str, metrics: dict[str, Any], card: DatasetCard, info: CheckpointInfo) -> Scores:
    """The predictions, once they give the numbers of metrics.json."""
    uri = storage.join(evaluation, PREDICTIONS_FILE)
    content = io.BytesIO(storage.read_bytes(uri))
    refuse_extension_types(pq.read_schema(content), uri)
    table = pq.read_table(content)
    findings = json.loads((table.schema.metadata or {}).get(b"findings", b"[]"))
    if tuple(findings) != card.findings or info.findings != card.findings:
        raise UserError(f"{uri} holds other findings than the data set and the checkpoint; evaluate again")
    values, default = thresholds(info)
    scores = Scores(
        table["image_id"].to_pylist(),
        matrix(table["logits"]).astype(np.float64),
        matrix(table["labels"]),
        matrix(table["known"]).astype(bool),
        values,
        default,
    )
    found = score(scores.probabilities, scores.labels, scores.known, card.findings)["findings"]
    if len(table) != metrics["n_images"] or any(_differ(found[name], metrics["findings"][name]) for name in found):
        raise UserError(f"{uri} does not give the numbers of {METRICS_FILE} beside it; evaluate again")
    return scores


def _differ(one: dict[str, Any], other: dict[str, Any]) -> bool:
    for name, value in one.items():
        there = other.get(name)
        if (value is None) != (there is None) or (value is not None and abs(value - there) > ROUNDING):
            return True
    return False


def _json(uri: str) -> dict[str, Any]:
    try:
        content = json.loads(storage.read_bytes(uri))
    except MissingError:
        raise MissingError(f"{uri} is absent; the report is made from it") from None
    except ValueError as error:
        raise UserError(f"{uri}: not JSON ({error}); make it anew") from error
    if not isinstance(content, dict) or content.get("schema_version") != 1:
        raise UserError(f"{uri}: schema_version is not 1; use the version of this software that wrote it")
    return content
