"""What stands behind the scores: operating points, calibration, groups, a rival, confusion, hidden positives."""

from typing import Any, NamedTuple

import numpy as np

from pipeline.hidden import pseudo_positives, summarise
from pipeline.summary import WAYS
from tuning.report.charts import WAY_COLOURS, reliability
from tuning.report.files import Inputs

RULES = {
    "youden": "Youden",
    "max_f1": "largest F1",
    "sensitivity_0.90": "sensitivity 90 %",
    "sensitivity_0.95": "sensitivity 95 %",
}
"""Of `mpc.metrics.RULES` those that the page shows, with their headings; all are in metrics.json."""
WAY_WORDS = {"raw": "as the network gives them", "temperature": "temperature", "platt": "slope and shift (Platt)"}
GROUPS = {"view": "View", "sex": "Sex", "age_band": "Age", "collection": "Collection"}
MAX_CHARTS = 30
LEAST = 5
"""Images that a share of the confusion table needs."""


class Cell(NamedTuple):
    """A share of the confusion table."""

    share: float | None
    n: int
    strength: float
    """In [0, 1]: how strong its colour is."""
    same: bool
    """On the diagonal: the finding itself."""


class Confusion(NamedTuple):
    """Which findings are called where others are present."""

    findings: list[str]
    base: list[Cell]
    """The share of all images without the finding on which it is called."""
    rows: list[tuple[str, list[Cell]]]


def operating_points(inputs: Inputs) -> list[tuple[str, list[dict[str, Any] | None]]]:
    """Finding and its points by the rules of RULES, in the model's order; empty for an older evaluation."""
    points: dict[str, dict[str, Any]] = inputs.metrics.get("operating_points", {})
    able = {name: of for name, of in points.items() if inputs.metrics["findings"][name]["auroc"] is not None}
    return [(name, [of.get(rule) for rule in RULES]) for name, of in able.items() if of]


def calibration(inputs: Inputs) -> dict[str, Any] | None:
    """Errors before and after, a chart a finding; None for an older evaluation, or where nothing can be judged."""
    found = inputs.metrics.get("calibration")
    if not found or not found["findings"]:
        return None
    rows: list[Any] = []
    charts: list[Any] = []
    for name, row in found["findings"].items():
        rows.append((name, [row.get(way) for way in WAYS], row["fit"]))
        curves = {way: row[way]["reliability"] for way in WAYS if way in row}
        lines = {way: (curve["predicted"], curve["observed"]) for way, curve in curves.items()}
        if len(charts) < MAX_CHARTS:
            charts.append((name, row, reliability(name.replace("_", " "), lines)))
    return {
        "mean": [found["mean"].get(way) for way in WAYS],
        "fitted": bool(found["mean"]),
        "rows": rows,
        "charts": charts,
        "bins": found["bins"],
        "missing": found["not_calibrated"] if found["mean"] else [],
        "legend": [(WAY_WORDS[way], WAY_COLOURS[way]) for way in (WAYS if found["mean"] else WAYS[:1])],
    }


def groups(inputs: Inputs) -> list[dict[str, Any]]:
    """Groupings of the images that have more than one group, with the scores of each."""
    found = []
    for name, by in inputs.metrics.get("groups", {}).items():
        small = [f"{group} ({row['n_patients']} patients)" for group, row in by["too_small"].items()]
        left_out = [
            name for name in inputs.metrics["macro"]["findings_averaged"] if name not in by["findings_averaged"]
        ]
        found.append(
            {
                "title": GROUPS.get(name, name),
                "rows": list(by["scored"].items()),
                "averaged": len(by["findings_averaged"]),
                "left_out": left_out,
                "too_small": small,
            }
        )
    return found


def comparison(inputs: Inputs) -> dict[str, Any] | None:
    """Differences from a rival with their intervals; None where there is none."""
    found = inputs.metrics.get("comparison")
    if found is None:
        return None
    scored = {name: row for name, row in found["findings"].items() if row["auroc"] is not None}
    ends = [
        abs(bound)
        for row in (found["macro"], *scored.values())
        for name in ("auroc", "ap")
        for bound in (row[f"{name}_interval"] or [row[name]])
    ]
    return {**found, "findings": scored, "reach": max([0.01, *ends])}


def confusion(inputs: Inputs) -> Confusion | None:
    """Of the images with a finding and certainly without another, the share on which the other is called."""
    calls, names = inputs.calls, inputs.findings
    able = [k for k, name in enumerate(names) if inputs.metrics["findings"][name]["auroc"] is not None]
    if len(able) < 2:
        return None
    present, absent, called = (values[:, able].astype(float) for values in (calls.present, calls.absent, calls.called))
    alarms, without = present.T @ (absent * called), present.T @ absent
    hits = (present * called).sum(0)
    np.fill_diagonal(alarms, hits)
    np.fill_diagonal(without, present.sum(0))
    rows = [
        (names[k], [_cell(alarms[i, j], without[i, j], same=i == j) for j in range(len(able))])
        for i, k in enumerate(able)
    ]
    base = [_cell((absent * called)[:, j].sum(), absent[:, j].sum(), same=False) for j in range(len(able))]
    return Confusion([names[k] for k in able], base, rows)


def _cell(part: float, whole: float, *, same: bool) -> Cell:
    share = part / whole if whole >= LEAST else None
    return Cell(share, int(whole), 0.0 if share is None else float(share), same)


def hidden(inputs: Inputs) -> dict[str, Any] | None:
    """Counts of hidden positives and of those that were found; None without training images to look at."""
    if inputs.hidden is None:
        return None
    found = summarise(inputs.hidden, inputs.run)
    return {**found, "pseudo": pseudo_positives(inputs.hidden.predictions, inputs.run) is not None}


def sanity(inputs: Inputs) -> dict[str, Any] | None:
    """Rank correlation of the maps with those of random weights: mean, largest, number."""
    maps = inputs.maps.by_case.values() if inputs.maps else ()
    values = [made.randomised for made in maps if made.randomised is not None]
    if not values or inputs.maps is None:
        return None
    return {"mean": float(np.mean(values)), "largest": max(values), "maps": len(values), "how": inputs.maps.how}
