"""Scores of a split: every row exactly once, over any number of ranks, gathered by row."""

from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from scipy.special import expit

from mpc.config import CalibrationInfo
from mpc.distributed import world_size as ranks
from mpc.errors import UserError
from mpc.metrics import RULES, calibrate, observed_score, operating_points, score
from mpc.model import Classifier
from pipeline.card import DatasetCard
from pipeline.config import DataConfig
from pipeline.manifest import matrix
from pipeline.single_positive import draw
from pipeline.spans import images_of
from pipeline.stream import scan


class Scored(NamedTuple):
    """Rows with their logits and labels, in row order once gathered."""

    row: NDArray[np.int64]
    logits: NDArray[np.float32]
    """[N, K]."""
    labels: NDArray[np.int8]
    known: NDArray[np.bool_]
    image_id: NDArray[np.str_]
    patient_id: NDArray[np.str_]

    @property
    def probabilities(self) -> NDArray[np.float64]:
        """[N, K] in (0, 1)."""
        probabilities: NDArray[np.float64] = expit(self.logits.astype(np.float64))
        return probabilities

    def gathered(self, rows: range) -> "Scored | None":
        """All ranks' rows on rank 0, in order; None on the others.

        Raises:
            RuntimeError: a row of `rows` is missing or doubled, which would be a fault of ours.
        """
        parts: list[Any] = [self]
        if ranks() > 1:
            parts = [None] * ranks()
            dist.gather_object(self, parts if dist.get_rank() == 0 else None)
            if dist.get_rank() != 0:
                return None
        whole = Scored._make(np.concatenate(columns) for columns in zip(*parts, strict=True))
        order = np.argsort(whole.row, kind="stable")
        if not np.array_equal(whole.row[order], np.arange(rows.start, rows.stop)):
            raise RuntimeError(f"scored {len(order)} rows of {len(rows)}; every row must be scored exactly once")
        return Scored._make(column[order] for column in whole)


@torch.inference_mode()
def score_rows(
    model: Classifier,
    uri: str,
    card: DatasetCard,
    split: str,
    batch_size: int = 128,
    device: torch.device | str = "cpu",
    rank: int = 0,
    world_size: int = 1,
) -> Scored:
    """The rank's rows of a split with their logits; memory holds scores, and images of a few batches only."""
    model.eval()
    columns: list[list[NDArray[Any]]] = [[] for _ in Scored._fields]
    for batch in scan(uri, card, split, batch_size, rank, world_size):
        images = torch.from_numpy(np.array(images_of(batch["image"], card.image_size)))
        logits = model(images.unsqueeze(1).to(device)).cpu().numpy()
        row = (
            batch["row"].to_numpy(),
            logits,
            matrix(batch["labels"]),
            matrix(batch["known"]),
            np.array(batch["image_id"].to_pylist()),
            np.array(batch["patient_id"].to_pylist()),
        )
        for column, values in zip(columns, row, strict=True):
            column.append(values)
    if columns[0]:
        return Scored._make(np.concatenate(column) for column in columns)
    findings = len(card.findings)
    return Scored(
        np.empty(0, np.int64),
        np.empty((0, findings), np.float32),
        np.empty((0, findings), np.int8),
        np.empty((0, findings), bool),
        np.empty(0, str),
        np.empty(0, str),
    )


def require_validation(card: DatasetCard, val_labels: str = "full") -> None:
    """Refuses a data set whose validation split could not rank one model above another.

    Raises:
        UserError: no finding has a known positive and a known negative there; or, where validation sees one positive an
            image, fewer than two findings have any.
    """
    counts = card.counts["val"]
    about = f"among the {counts.images} images of the val split; prepare it with a larger prepare.split.val"
    if val_labels == "observed":
        if sum(counts.positives.get(name, 0) > 0 for name in card.findings) < 2:
            raise UserError(f"fewer than two findings of {card.name} occur {about}")
        return
    if not any(0 < counts.positives.get(name, 0) < counts.known.get(name, 0) for name in card.findings):
        raise UserError(
            f"no finding of {card.name} has both outcomes {about}, or, where only positives are known, set "
            f"data.val_labels=observed"
        )


class Choices(NamedTuple):
    """What validation chose for later predictions: by names of findings, as `mpc.config.CheckpointInfo` holds it."""

    thresholds: dict[str, float]
    operating_points: dict[str, dict[str, float]]
    calibration: dict[str, CalibrationInfo]


NO_CHOICES = Choices({}, {}, {})


def validation_metrics(scored: Scored, findings: tuple[str, ...], data: DataConfig) -> tuple[dict[str, Any], Choices]:
    """Validation metrics of an epoch, and the choices for later predictions: thresholds and calibration.

    With `data.val_labels=observed` validation knows one positive an image, like training, and `val_macro_auroc` is the
    estimate of `mpc.metrics.observed_score`. For thresholds each unobserved entry then counts as negative, and images
    without a positive are left out. How often a finding is observed is not how often it is there, so that nothing is
    calibrated then.
    """
    labels, known, logits = scored.labels, scored.known, scored.logits
    probabilities = scored.probabilities
    if data.val_labels == "observed":
        labels = draw(scored.image_id.tolist(), labels, known, data.draw_seed)
        with_positive = labels.any(1)
        labels, probabilities = labels[with_positive], probabilities[with_positive]
        known = np.ones_like(labels, dtype=bool)
        macro = observed_score(probabilities, labels, findings, kappa=data.val_kappa)["macro"]
    else:
        macro = score(probabilities, labels, known, findings)["macro"]
    points = operating_points(probabilities, labels, known, findings, RULES)
    chosen = {name: point for name, point in points.items() if point is not None}
    fitted = calibrate(logits, labels, known, findings) if data.val_labels == "full" else {}
    metrics = {
        "val_macro_auroc": macro["auroc"],
        "val_macro_ap": macro["ap"],
        "val_findings_averaged": len(macro["findings_averaged"]),
    }
    return metrics, Choices(
        thresholds={name: point["youden"] for name, point in chosen.items()},
        operating_points=chosen,
        calibration={name: CalibrationInfo(**fit._asdict()) for name, fit in fitted.items()},
    )
