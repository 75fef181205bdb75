"""AUROC where each image shows one positive and nothing else is known: what a search ranks by without full labels.

Written for images of which each has at least one finding and shows one, `observed`. For finding k let A_k be the AUROC
of the images that show k against those that do not. The others are no negatives: a share theta_k of them has k too.
If the image's choice of what it shows does not depend on the score of k, given that k is there, both kinds of positives
are alike, and

    A_k = (1 - theta_k) AUROC_k + theta_k / 2

(Menon et al., ICML 2015; Jain, White & Radivojac, AAAI 2017). So A_k ranks models as AUROC_k does, apart from chance,
whatever theta_k is: within a finding nothing needs to be known. The mean over findings weighs each with 1 - theta_k,
and lies nearer to 1/2 than the true one. With `kappa`, the mean number of findings an image, theta_k follows from how
often k is observed, q_k: a uniform draw among n findings shows each with 1 / n, so that k is there in about kappa q_k
of the images.

What it assumes, and where it fails: a drawn positive is shown with 1 / n, so that images with few findings are over-
represented among the observed ones; where a finding is easier to see alone, A_k is too high, for all models alike only
as far as they see alike. A reader who names the most conspicuous finding breaks the assumption outright. How well it
ranks is measured by benchmarks/selection.py, docs/selection.md.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpc.metrics.scores import Array, score

MOST = 0.95
"""Largest share of images that a finding is taken to be in: `kappa` q_k knows no bound."""


def observed_score(
    probabilities: Array, observed: Array, findings: Sequence[str], *, kappa: float | None = None
) -> dict[str, Any]:
    """`score` of observed against unobserved entries, its AUROC corrected for hidden positives where `kappa` is given.

    Images that show nothing tell nothing and are left out. Average precision is that of the observed positives: it may
    rank, but its value is not that of the true one.

    Args:
        probabilities: float [N, K]; any monotone score serves.
        observed: [N, K] in {0, 1}, at most one 1 a row.
        findings: K names.
        kappa: mean number of findings of the images that show one, at least 1; None corrects nothing.

    Returns:
        `{macro: {auroc, ap, findings_averaged}, findings: {name: {n_pos, n_neg, auroc, ap, hidden}}}`; `hidden` is
        theta_k, 0 without `kappa`. A corrected AUROC may lie outside of [0, 1] where few images show the finding.

    Raises:
        ValueError: as `score`; a row that shows several findings; `kappa` below 1.
    """
    shown = np.asarray(observed)
    if kappa is not None and kappa < 1:
        raise ValueError(f"kappa {kappa} is below 1; each image that shows a finding has at least that one")
    if shown.ndim == 2 and (shown.sum(1) > 1).any():
        raise ValueError(f"{int((shown.sum(1) > 1).sum())} images show several findings; this estimate is for one")
    rows = shown.any(1)
    shown = shown[rows]
    result = score(np.asarray(probabilities)[rows], shown, np.ones_like(shown, bool), findings)
    for row, hidden in zip(result["findings"].values(), hidden_share(shown, kappa), strict=True):
        row["hidden"] = float(hidden)
        if row["auroc"] is not None:
            row["auroc"] = (row["auroc"] - hidden / 2) / (1 - hidden)
    averaged = [result["findings"][name]["auroc"] for name in result["macro"]["findings_averaged"]]
    result["macro"]["auroc"] = float(np.mean(averaged)) if averaged else None
    return result


def hidden_share(observed: Array, kappa: float | None) -> NDArray[np.float64]:
    """Theta, [K]: share of the images that do not show a finding and have it all the same; 0 without `kappa`.

    Args:
        observed: [N, K] in {0, 1}, one 1 a row.
        kappa: mean number of findings an image.
    """
    shown = np.asarray(observed, np.float64).mean(0)
    if kappa is None:
        return np.zeros_like(shown)
    present = np.maximum(shown, np.minimum(kappa * shown, MOST))
    return np.asarray(np.divide(present - shown, 1 - shown, out=np.zeros_like(shown), where=shown < 1))
