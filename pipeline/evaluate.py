"""Scores a checkpoint on a split: every row exactly once, predictions and metrics on disk."""

import hashlib
import json
from pathlib import Path
from typing import Any

from mpc.checkpoint import INFO, read_info
from mpc.config import CheckpointInfo
from mpc.errors import MissingError, UserError
from pipeline import storage
from pipeline.card import DatasetCard, read_card
from pipeline.config import EvaluateConfig
from pipeline.inference import LoadedModel, best_device, load_model
from pipeline.pairing import Pairing, check_match, pair
from pipeline.predictions import (
    GROUPS_FILE,
    PREDICTIONS_FILE,
    Origin,
    Predictions,
    groups_of,
    read_table,
    values_of,
    write_table,
)
from pipeline.scoring import score_rows
from pipeline.summary import comparison, summary

__all__ = ["LoadedModel", "check_match", "evaluate", "load_model"]

METRICS_FILE, RIVAL_FILE = "metrics.json", "rival.parquet"


def evaluate(
    checkpoint: Path,
    data: str,
    split: str,
    out: Path | str,
    batch_size: int = 128,
    device: str | None = None,
    *,
    config: EvaluateConfig | None = None,
    rival: str | None = None,
    resume: bool = False,
) -> dict[str, Any]:
    """Scores the averaged weights of `checkpoint` on `split`; writes predictions.parquet and metrics.json.

    Thresholds and calibration come from the checkpoint, for which validation chose them: nothing is chosen on the
    images that are scored here.

    Args:
        checkpoint: local folder.
        data: URI of a prepared data set.
        split: `train`, `val` or `test`.
        out: folder or s3:// prefix.
        batch_size: images at a time; the result does not depend on it (1e-5 in a probability).
        device: None takes a GPU where there is one.
        config: intervals, groups, the map of findings.
        rival: folder of another checkpoint or of its evaluation, to compare with; None takes `config.compare`.
        resume: keep predictions that `out` holds: metrics are made anew from them, without weights or GPU.

    Returns:
        The content of metrics.json.

    Raises:
        UserError: no such split, findings, image size or pixels of data and checkpoint that differ, or predictions of
            something else in `out`.
    """
    config = config or EvaluateConfig()
    card, info = read_card(data), read_info(checkpoint)
    pairing = pair(info, card, config.finding_map, f"checkpoint {checkpoint}", data)
    job = _Job(data, card, split, str(out), batch_size, device, resume)
    found = job.predictions(checkpoint, info, pairing, PREDICTIONS_FILE)
    metrics = {
        "schema_version": 1,
        "split": split,
        "n_images": len(found.image_id),
        **summary(found, job.groups(), info, config),
        "finding_map": pairing.summary(),
        "data_digest": card.digest,
        "synthetic": card.synthetic,
        "checkpoint": {**_version(checkpoint, info), "git_commit": info.git_commit},
    }
    rival = rival or config.compare
    if rival is not None:
        metrics["comparison"] = comparison(found, job.rival(rival, config), config)
    storage.write_bytes(storage.join(str(out), METRICS_FILE), (json.dumps(metrics, indent=2) + "\n").encode())
    return metrics


class _Job:
    """What one evaluation scores and keeps.

    Args:
        data: URI of the data set.
        card: its card.
        split: of it.
        out: where files go.
        batch_size: images at a time.
        device: None takes a GPU where there is one.
        resume: keep what `out` holds.
    """

    def __init__(
        self, data: str, card: DatasetCard, split: str, out: str, batch_size: int, device: str | None, resume: bool
    ) -> None:
        self.data, self.card, self.split, self.out = data, card, split, out
        self.batch_size, self.device, self.resume = batch_size, device, resume

    def predictions(self, checkpoint: Path, info: CheckpointInfo, pairing: Pairing, name: str) -> Predictions:
        """Those that lie in `out` under `name`, else fresh ones, which are left there."""
        place = storage.join(self.out, name)
        origin: Origin = {
            "split": self.split,
            "data_digest": self.card.digest,
            "checkpoint": _version(checkpoint, info),
        }
        if self.resume and storage.exists(place):
            kept = Predictions.read(place)
            if (kept.origin, kept.findings) != (origin, pairing.findings):
                raise UserError(f"{place} was scored with another checkpoint, split or data set; choose another --out")
            return kept
        rows = self.card.rows(self.split)
        loaded = load_model(checkpoint, self.device or best_device())
        scored = score_rows(loaded.model, self.data, self.card, self.split, self.batch_size, loaded.device)
        whole = scored.gathered(rows)
        assert whole is not None, "one process holds every row"
        found = Predictions.of(pairing.of(whole), pairing.findings, origin)
        found.write(place)
        return found

    def groups(self) -> dict[str, Any]:
        """View and strata of every image; from `out` where it holds them."""
        place = storage.join(self.out, GROUPS_FILE)
        if not (self.resume and storage.exists(place)):
            write_table(groups_of(self.data, self.card, self.split), place)
        return values_of(read_table(place))

    def rival(self, place: str, config: EvaluateConfig) -> Predictions:
        """Predictions of another model on the same split: of its evaluation, or of its checkpoint, scored now."""
        kept, scored = storage.join(self.out, RIVAL_FILE), storage.join(place, PREDICTIONS_FILE)
        if self.resume and storage.exists(kept):
            return Predictions.read(kept)
        if storage.exists(scored):
            found = Predictions.read(scored)
            found.write(kept)
            return found
        try:
            info = read_info(Path(place))
        except MissingError:
            raise MissingError(
                f"evaluate.compare={config.compare}: holds neither {PREDICTIONS_FILE} nor a checkpoint; "
                f"name a checkpoint, a registered model or the --out of an evaluation"
            ) from None
        pairing = pair(info, self.card, config.finding_map, f"checkpoint {place}", self.data)
        return self.predictions(Path(place), info, pairing, RIVAL_FILE)


def _version(checkpoint: Path, info: CheckpointInfo) -> dict[str, Any]:
    """What tells one checkpoint from another, without its weights."""
    return {"step": info.step, "epoch": info.epoch, "data_digest": info.data_digest, "digest": digest_of(checkpoint)}


def digest_of(checkpoint: Path) -> str:
    """SHA-256 of checkpoint.json."""
    return hashlib.sha256((checkpoint / INFO).read_bytes()).hexdigest()
