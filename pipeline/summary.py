"""The content of metrics.json: scores, intervals, thresholds, calibration, groups, comparison; from predictions."""

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpc.config import CheckpointInfo
from mpc.errors import UserError
from mpc.metrics import Calibration, Resamples, calibration, compare, counts_at, intervals, rates, reliability, score
from mpc.metrics.intervals import interval
from mpc.metrics.scores import both_outcomes
from mpc.metrics.thresholds import COUNTS, RULES
from pipeline.config import EvaluateConfig
from pipeline.predictions import Predictions

WAYS = ("raw", "temperature", "platt")
"""Probabilities as the network gives them, and as `mpc.metrics.Calibration` mends them."""


def summary(
    found: Predictions, groups: dict[str, NDArray[np.str_]], info: CheckpointInfo, config: EvaluateConfig
) -> dict[str, Any]:
    """Everything that the predictions of one model tell.

    Args:
        found: the predictions.
        groups: name of a grouping -> group of each image.
        info: of the checkpoint, which holds thresholds and calibration that validation chose.
        config: resamples, level, bins.
    """
    drawn = resamples_of(found, config)
    return {
        "n_patients": drawn.patients,
        "bootstrap": {"resamples": config.resamples, "level": config.level, "seed": config.seed, "unit": "patient"},
        **intervals(*found.judged, drawn, config.level),
        "operating_points": operating_points(found, info, drawn, config.level),
        "calibration": calibrations(found, info, config.bins),
        "groups": {name: by_group(found, values, config) for name, values in groups.items() if len(set(values)) > 1},
    }


def resamples_of(found: Predictions, config: EvaluateConfig) -> Resamples:
    """The resamples of these images' patients."""
    return Resamples.draw(found.patient_id, config.resamples, config.seed)


def operating_points(
    found: Predictions, info: CheckpointInfo, drawn: Resamples, level: float
) -> dict[str, dict[str, dict[str, Any]]]:
    """Finding -> rule -> threshold with the counts and rates that it has on these images, and their intervals."""
    points: dict[str, dict[str, dict[str, Any]]] = {name: {} for name in found.findings}
    for rule in RULES:
        chosen = {name: threshold_of(info, name, rule) for name in found.findings}
        limits = np.array([np.nan if value is None else value for value in chosen.values()])
        counts = counts_at(found.probabilities, found.labels, found.known, limits)
        here, resampled = rates(counts.sum(0)), rates(drawn.totals(counts))
        for k, (name, limit) in enumerate(chosen.items()):
            if limit is None:
                continue
            points[name][rule] = {
                "threshold": limit,
                **dict(zip(COUNTS, counts[:, k].sum(0).tolist(), strict=True)),
                **{rate: _finite(values[k]) for rate, values in here.items()},
                **{f"{rate}_interval": interval(values[:, k], level) for rate, values in resampled.items()},
            }
    return points


def threshold_of(info: CheckpointInfo, finding: str, rule: str) -> float | None:
    """What validation chose by a rule; None where it could not."""
    known = info.operating_points.get(finding, {}).get(rule)
    return info.thresholds.get(finding) if known is None and rule == "youden" else known


def calibrations(found: Predictions, info: CheckpointInfo, bins: int) -> dict[str, Any]:
    """Calibration error, Brier score and reliability of each finding, before and after; and their means.

    The means are over the findings that have both outcomes here and were calibrated, the same for every way.
    """
    rows: dict[str, dict[str, Any]] = {}
    for k, name in enumerate(found.findings):
        mask = found.known[:, k]
        logits, labels = found.logits[mask, k].astype(np.float64), found.labels[mask, k]
        if not both_outcomes(labels):
            continue
        fit = info.calibration.get(name)
        ways = WAYS if fit else WAYS[:1]
        map_ = Calibration(**fit.model_dump()) if fit else Calibration(1, 1, 0)
        rows[name] = {"fit": fit.model_dump() if fit else None}
        for way in ways:
            p = map_.apply(logits, way)
            rows[name][way] = {**calibration(p, labels, bins), "reliability": reliability(p, labels, bins)}
    able = [row for row in rows.values() if row["fit"]]
    means = {
        way: {key: float(np.mean([row[way][key] for row in able])) for key in ("ece", "brier")} for way in WAYS if able
    }
    missing = [name for name in rows if not rows[name]["fit"]]
    return {"bins": bins, "mean": means, "not_calibrated": missing, "findings": rows}


def by_group(found: Predictions, values: NDArray[np.str_], config: EvaluateConfig) -> dict[str, Any]:
    """Scores with intervals of each group; the means of all groups are over the same findings.

    Returns:
        `findings_averaged`: findings with both outcomes in every group that is scored. `scored`: group -> `n_images`,
        `n_patients`, `macro`, `findings`. `too_small`: group -> its sizes.
    """
    parts = {group: _rows(found, np.flatnonzero(values == group)) for group in sorted(set(values), key=_rank)}
    sizes = {
        name: {"n_images": len(part.image_id), "n_patients": len(set(part.patient_id))} for name, part in parts.items()
    }
    large = {name: part for name, part in parts.items() if sizes[name]["n_patients"] >= config.min_group}
    able = [score(*part.judged)["macro"]["findings_averaged"] for part in large.values()]
    shared = [name for name in found.findings if able and all(name in names for names in able)]
    return {
        "findings_averaged": shared,
        "scored": {
            name: {**sizes[name], **intervals(*part.judged, resamples_of(part, config), config.level, shared)}
            for name, part in large.items()
        },
        "too_small": {name: sizes[name] for name in parts if name not in large},
    }


def _rows(found: Predictions, rows: NDArray[np.intp]) -> Predictions:
    """Some of the images."""
    return replace(
        found,
        image_id=[found.image_id[row] for row in rows.tolist()],
        patient_id=[found.patient_id[row] for row in rows.tolist()],
        logits=found.logits[rows],
        labels=found.labels[rows],
        known=found.known[rows],
    )


def comparison(found: Predictions, rival: Predictions, config: EvaluateConfig) -> dict[str, Any]:
    """Ours minus a rival on the same images.

    Raises:
        UserError: the rival was scored on other images or findings.
    """
    ours, theirs = (found.image_id, found.findings), (rival.image_id, rival.findings)
    same = np.array_equal(found.known, rival.known) and np.array_equal(found.labels, rival.labels)
    if ours != theirs or not same:
        what = "findings" if found.findings != rival.findings else "images"
        raise UserError(f"evaluate.compare={config.compare}: was scored on other {what}; evaluate it on the same split")
    drawn = resamples_of(found, config)
    return {
        "rival": config.compare,
        "rival_macro": intervals(*rival.judged, drawn, config.level)["macro"],
        **compare(found.probabilities, *rival.judged, drawn, config.level),
    }


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _rank(group: str) -> tuple[int, int, str]:
    """Age bands by their numbers, other groups by name, `unknown` last."""
    first = group.partition("-")[0]
    return (group == "unknown", int(first) if first.isdigit() else 0, group)
