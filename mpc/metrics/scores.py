"""Areas under the ROC and precision-recall curves, restricted to the entries whose label is known."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import average_precision_score, roc_auc_score

Array = NDArray[Any]
METRICS = ("auroc", "ap")


def score(probabilities: Array, labels: Array, known: Array, findings: Sequence[str]) -> dict[str, Any]:
    """AUROC and average precision of each finding and their means: the body of metrics.json.

    A finding without both outcomes has no AUROC and no AP (None) and stays out of the means; `findings_averaged` lists
    those that entered. Without any, the means are None.

    Args:
        probabilities: float [N, K] in [0, 1]; any monotone score serves.
        labels: [N, K] in {0, 1}, read where `known`.
        known: bool [N, K].
        findings: K names.

    Returns:
        `{macro: {auroc, ap, findings_averaged}, findings: {name: {n_pos, n_neg, auroc, ap}}}`.

    Raises:
        ValueError: shapes differ, a probability is not finite, or a known label is neither 0 nor 1.
    """
    columns = columns_of(probabilities, labels, known, findings)
    scores = {name: _finding(p, y) for name, (p, y) in columns.items()}
    averaged = [name for name, row in scores.items() if row["auroc"] is not None]
    macro = {key: float(np.mean([scores[name][key] for name in averaged])) if averaged else None for key in METRICS}
    return {"macro": {**macro, "findings_averaged": averaged}, "findings": scores}


def columns_of(
    probabilities: Array, labels: Array, known: Array, findings: Sequence[str]
) -> dict[str, tuple[Array, Array]]:
    """Known probabilities and labels of each finding; arguments and errors are those of `score`."""
    p, y, mask = np.asarray(probabilities, np.float64), np.asarray(labels), np.asarray(known, bool)
    if not (p.ndim == 2 and p.shape == y.shape == mask.shape and p.shape[1] == len(findings)):
        raise ValueError(
            f"scores need equal shapes [N, {len(findings)}]: "
            f"probabilities {p.shape}, labels {y.shape}, known {mask.shape}"
        )
    if not np.isfinite(p).all():
        raise ValueError(f"{np.count_nonzero(~np.isfinite(p))} probabilities are not finite; the model diverged")
    if not np.isin(y[mask], (0, 1)).all():
        raise ValueError("a known label is neither 0 nor 1")
    return {name: (p[mask[:, k], k], y[mask[:, k], k].astype(int)) for k, name in enumerate(findings)}


def both_outcomes(labels: Array) -> bool:
    """Whether labels [n] in {0, 1} hold a 0 and a 1."""
    return 0 < int(labels.sum()) < len(labels)


def _finding(probabilities: Array, labels: Array) -> dict[str, Any]:
    counts = {"n_pos": int(labels.sum()), "n_neg": int(len(labels) - labels.sum())}
    if not both_outcomes(labels):
        return {**counts, "auroc": None, "ap": None}
    return {
        **counts,
        "auroc": float(roc_auc_score(labels, probabilities)),
        "ap": float(average_precision_score(labels, probabilities)),
    }
