"""Hidden positives: findings of training images that training did not observe; which of them the model recovers."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mpc.config import CheckpointInfo
from mpc.pseudo import align, threshold
from pipeline.calls import Calls
from pipeline.card import DatasetCard
from pipeline.config import RunConfig
from pipeline.inference import LoadedModel
from pipeline.predictions import Origin, Predictions
from pipeline.scoring import score_rows
from pipeline.single_positive import draw

HIDDEN_FILE = "hidden.parquet"
ALL_POSITIVES = frozenset({"full", "iun"})
"""Methods that are told more than one positive an image."""


def has_hidden(info: CheckpointInfo, card: DatasetCard) -> bool:
    """Whether the model was trained on single positives of this very data set."""
    return info.data_digest == card.digest and run_of(info).train.method not in ALL_POSITIVES


def run_of(info: CheckpointInfo) -> RunConfig:
    """The run that made a checkpoint."""
    return RunConfig.model_validate(info.config)


def score_hidden(
    loaded: LoadedModel, data: str, card: DatasetCard, images: int, batch_size: int, origin: Origin
) -> Predictions:
    """Predictions for about `images` training images, whole row groups evenly spread, with what training observed."""
    every = max(1, round(len(card.rows("train")) / max(1, images)))
    scored = score_rows(loaded.model, data, card, "train", batch_size, loaded.device, 0, every)
    seed = run_of(loaded.info).data.draw_seed
    observed = draw(scored.image_id.tolist(), scored.labels, scored.known, seed)
    return Predictions.of(scored, card.findings, origin, observed)


def pseudo_positives(found: Predictions, run: RunConfig) -> NDArray[np.bool_] | None:
    """Unobserved entries [N, K] that the finished model would take for positive.

    None for methods that take none, or whose pseudo-labels are the probabilities themselves (`pseudo.form=soft`).

    Training made its pseudo-labels from augmented views and weights on the way; these are of the images as stored and
    the averaged weights at the end. Distribution alignment uses the means of these images.
    """
    terms = (run.loss.lambda_ipc, run.loss.lambda_fpc, run.loss.lambda_btc if run.btc.target != "observed" else 0.0)
    if run.train.method != "mpc" or not any(terms) or run.pseudo.form == "soft":
        return None
    assert found.observed is not None, "training images carry what was observed"
    logits, observed = torch.from_numpy(found.logits.copy()), torch.from_numpy(found.observed.copy()).float()
    if run.pseudo.align == "distribution" and run.pseudo.kappa:
        logits = align(logits, prior=observed.mean(0) * run.pseudo.kappa, running=torch.sigmoid(logits).mean(0))
    made = threshold(logits, observed, tau_pos=run.pseudo.tau_pos, tau_neg=run.pseudo.tau_neg)
    return np.asarray(made.positive.numpy())


def hidden(found: Predictions) -> NDArray[np.bool_]:
    """Positives [N, K] that are known and were not observed."""
    assert found.observed is not None, "training images carry what was observed"
    return np.asarray(found.known & (found.labels == 1) & (found.observed == 0))


def recovered(calls: Calls, run: RunConfig) -> NDArray[np.bool_]:
    """Hidden positives [N, K] that pseudo-labels find; for methods without pseudo-labels, those above the threshold."""
    pseudo = pseudo_positives(calls.predictions, run)
    return hidden(calls.predictions) & (calls.called if pseudo is None else pseudo)


def summarise(calls: Calls, run: RunConfig) -> dict[str, Any]:
    """How many hidden positives there are and are found, of each finding and in all.

    Returns:
        `rows`: finding -> `hidden`, `negatives`, `pseudo_found`, `pseudo_wrong` (None without pseudo-labels), `found`,
        `wrong` (at the threshold). `total`: their sums. `images`: how many were looked at.
    """
    found = calls.predictions
    there, absent, pseudo = hidden(found), calls.absent, pseudo_positives(found, run)
    columns: dict[str, NDArray[Any] | None] = {
        "hidden": there,
        "negatives": absent,
        "pseudo_found": None if pseudo is None else there & pseudo,
        "pseudo_wrong": None if pseudo is None else absent & pseudo,
        "found": there & calls.called,
        "wrong": absent & calls.called,
    }
    rows = {
        name: {key: None if mask is None else int(mask[:, k].sum()) for key, mask in columns.items()}
        for k, name in enumerate(found.findings)
    }
    total = {key: None if mask is None else int(mask.sum()) for key, mask in columns.items()}
    return {"images": len(found.image_id), "rows": rows, "total": total}


def checkpoint_has_weights(checkpoint: Path) -> bool:
    """Whether a checkpoint can score anything, or holds its metadata alone."""
    return any((checkpoint / f"{kind}.safetensors").is_file() for kind in ("ema", "model"))
