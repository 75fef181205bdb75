"""Scores a checkpoint on a split: every row exactly once, predictions and metrics on disk."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mpc.config import CheckpointInfo
from mpc.errors import UserError
from mpc.metrics import score
from pipeline import storage
from pipeline.card import DatasetCard, read_card
from pipeline.inference import LoadedModel, best_device, load_model
from pipeline.manifest import list_column
from pipeline.scoring import Scored, score_rows

__all__ = ["LoadedModel", "evaluate", "load_model"]

PREDICTIONS_FILE, METRICS_FILE = "predictions.parquet", "metrics.json"


def evaluate(
    checkpoint: Path, data: str, split: str, out: Path | str, batch_size: int = 128, device: str | None = None
) -> dict[str, Any]:
    """Scores the averaged weights of `checkpoint` on `split`; writes predictions.parquet and metrics.json.

    Args:
        checkpoint: local folder.
        data: URI of a prepared data set.
        split: `train`, `val` or `test`.
        out: folder or s3:// prefix.
        batch_size: images at a time; the result does not depend on it (1e-5 in a probability).
        device: None takes a GPU where there is one.

    Returns:
        The content of metrics.json.

    Raises:
        UserError: no such split, or findings, image size or pixels of data and checkpoint differ.
    """
    card = read_card(data)
    loaded = load_model(checkpoint, device or best_device())
    check_match(loaded.info, card, f"checkpoint {checkpoint}", data)
    rows = card.rows(split)
    scored = score_rows(loaded.model, data, card, split, batch_size, loaded.device).gathered(rows)
    assert scored is not None, "one process holds every row"
    metrics = summary(scored, loaded.info, card, split)
    with storage.open_output(storage.join(str(out), PREDICTIONS_FILE)) as stream:
        pq.write_table(predictions(scored, card.findings), stream, compression="zstd")
    storage.write_bytes(storage.join(str(out), METRICS_FILE), (json.dumps(metrics, indent=2) + "\n").encode())
    return metrics


def check_match(info: CheckpointInfo, card: DatasetCard, model: str, data: str) -> None:
    """Raises UserError unless data and checkpoint speak of the same findings and the same pixels."""
    if info.findings != card.findings:
        differ = sorted(set(info.findings) ^ set(card.findings))
        raise UserError(
            f"{model} has {len(info.findings)} findings, {data} has {len(card.findings)}; "
            f"{'they differ in ' + ', '.join(differ[:5]) if differ else 'their order differs'}; "
            f"prepare the data set with prepare.findings of the checkpoint"
        )
    ours = {"image size": info.image_size, **_stored(info.pixels.model_dump())}
    theirs = {"image size": card.image_size, **_stored(card.pixels.model_dump())}
    for name, value in ours.items():
        if theirs[name] != value:
            raise UserError(
                f"{model} was trained with {name} {value}, {data} holds {name} {theirs[name]}; "
                f"prepare the data set with the checkpoint's {name}"
            )


def summary(scored: Scored, info: CheckpointInfo, card: DatasetCard, split: str) -> dict[str, Any]:
    """The content of metrics.json."""
    return {
        "schema_version": 1,
        "split": split,
        "n_images": len(scored.row),
        **score(scored.probabilities, scored.labels, scored.known, card.findings),
        "data_digest": card.digest,
        "synthetic": card.synthetic,
        "checkpoint": {
            "step": info.step,
            "epoch": info.epoch,
            "data_digest": info.data_digest,
            "git_commit": info.git_commit,
        },
    }


def predictions(scored: Scored, findings: tuple[str, ...]) -> pa.Table:
    """One row an image: ids, and lists of K logits, probabilities (float32), labels and known, in findings order."""
    table = pa.table(
        {
            "image_id": pa.array(scored.image_id.tolist(), pa.string()),
            "patient_id": pa.array(scored.patient_id.tolist(), pa.string()),
            "logits": list_column(scored.logits),
            "probabilities": list_column(scored.probabilities.astype("float32")),
            "labels": list_column(scored.labels),
            "known": list_column(scored.known),
        }
    )
    return table.replace_schema_metadata({"findings": json.dumps(findings)})


def _stored(pixels: dict[str, Any]) -> dict[str, Any]:
    """What concerns stored pixels; how the network normalises them is its own affair."""
    return {name: pixels[name] for name in ("encoding", "channels", "dtype", "fit", "reduce_to")}
