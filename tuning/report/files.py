"""All that a report is made from, read from files and checked to belong together."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpc.checkpoint import read_info
from mpc.config import CheckpointInfo
from mpc.errors import MissingError, UserError
from mpc.metrics import score
from pipeline import storage
from pipeline.calls import Calls
from pipeline.card import DatasetCard, read_card
from pipeline.config import RunConfig
from pipeline.evaluate import METRICS_FILE, digest_of
from pipeline.hidden import HIDDEN_FILE
from pipeline.illustrate import Maps, read_maps
from pipeline.inference import REGISTERED_FILE
from pipeline.predictions import PREDICTIONS_FILE, Predictions
from pipeline.record import MetricsLog

SEARCH_FILE, TRIALS = "search.json", "trials"
ROUNDING = 1e-6
"""Probabilities are computed anew from float32 logits: scores may differ by this."""


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
    calls: Calls
    """The predictions against the checkpoint's thresholds."""
    maps: Maps | None
    """Saliency of the cases that are shown; None where the evaluation made none."""
    hidden: Calls | None
    """Training images with the positives that training did not observe; None where there are none to look at."""
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

    @property
    def findings(self) -> tuple[str, ...]:
        """What was scored, by the model's names."""
        return self.calls.findings


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
    scored = metrics["checkpoint"]
    same = {
        "step": info.step,
        "data_digest": info.data_digest,
        "digest": scored.get("digest") and digest_of(checkpoint),
    }
    if any(scored.get(name) != value for name, value in same.items()):
        raise UserError(f"{evaluation} was scored with another checkpoint than {checkpoint}; evaluate again")
    calls = _calls(evaluation, metrics, card, info)
    hidden = storage.join(evaluation, HIDDEN_FILE)
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
        calls=calls,
        maps=read_maps(evaluation, card.image_size),
        hidden=Calls.of(Predictions.read(hidden), info) if storage.exists(hidden) else None,
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


def _calls(evaluation: str, metrics: dict[str, Any], card: DatasetCard, info: CheckpointInfo) -> Calls:
    """The predictions, once they give the numbers of metrics.json."""
    uri = storage.join(evaluation, PREDICTIONS_FILE)
    found = Predictions.read(uri)
    names = metrics.get("finding_map", {}).get("scored", {name: name for name in card.findings})
    if found.findings != tuple(names) or not {*names} <= {*info.findings} or not {*names.values()} <= {*card.findings}:
        raise UserError(f"{uri} holds other findings than the data set and the checkpoint; evaluate again")
    scores = score(*found.judged)["findings"]
    whole = len(found.image_id) == metrics["n_images"]
    if not whole or any(_differ(scores[name], metrics["findings"][name]) for name in scores):
        raise UserError(f"{uri} does not give the numbers of {METRICS_FILE} beside it; evaluate again")
    return Calls.of(found, info)


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
