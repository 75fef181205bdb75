"""Puts the sections into the template and writes the page."""

import json
import shlex
from pathlib import Path
from typing import Any

from pipeline import storage
from pipeline.overlay import scale
from tuning.report import judgement, pictures, results, trials
from tuning.report.charts import STATUS_COLOURS
from tuning.report.environment import environment
from tuning.report.files import Inputs, read_inputs

TEMPLATE = "report.html.j2"


def write_report(out: str, *, evaluation: str, data: str, checkpoint: Path, search: str | None, title: str) -> None:
    """Writes one HTML page that needs nothing else: curves, tables, pictures; the same files give the same bytes.

    Args:
        out: URI of the page.
        evaluation: folder or s3:// prefix with predictions.parquet and metrics.json.
        data: URI of the data set that was scored.
        checkpoint: local folder of the model that was scored; its views, thresholds and settings are read.
        search: folder or s3:// prefix with search.json and trials/, or None.
        title: heading of the page.

    Raises:
        MissingError: a file is absent.
        UserError: files that do not belong together.
    """
    inputs = read_inputs(evaluation, data, checkpoint, search)
    page = environment().get_template(TEMPLATE).render(title=title, **_content(inputs))
    storage.write_bytes(out, page.encode())


def _content(inputs: Inputs) -> dict[str, Any]:
    rows = results.result_rows(inputs)
    curves = results.curves(inputs, rows)
    pairs = inputs.metrics.get("finding_map", {"scored": {}})
    return {
        **_judged(inputs),
        "macro": {"auroc_interval": None, "ap_interval": None, **inputs.metrics["macro"]},
        "bootstrap": inputs.metrics.get("bootstrap"),  # absent in evaluations of the first version, as are the next two
        "patients": inputs.metrics.get("n_patients"),
        "pairs": inputs.metrics.get("finding_map"),
        "renamed": [(ours, theirs) for ours, theirs in pairs["scored"].items() if ours != theirs],
        "card": inputs.card,
        "info": inputs.info,
        "run": inputs.run,
        "metrics": inputs.metrics,
        "split": inputs.metrics["split"],
        "same_data": inputs.same_data,
        "single_positive": results.single_positive(inputs),
        "facts": results.facts(inputs),
        "settings": results.settings(inputs),
        "splits": results.splits(inputs),
        "rows": [row for row in rows if row.both],
        "unscored": [row for row in rows if not row.both],
        "few": results.FEW,
        "without_few": results.mean_without_few(rows),
        "curves": curves,
        "search": trials.search_section(inputs),
        "best_colour": STATUS_COLOURS["best"],
        "panels": trials.monitors(inputs, results.positives_per_image(inputs)),
        "examples": pictures.examples(inputs),
        "uses_strong": pictures.uses_strong(inputs),
        "recovered": pictures.recovered(inputs),
        "missed": pictures.errors(inputs, missed=True),
        "alarms": pictures.errors(inputs, missed=False),
        "max_side": pictures.MAX_SIDE,
        "places": inputs.places,
        "command": _command(inputs),
        "defaults": [row.name for row in rows if row.both and row.default],
    }


def _judged(inputs: Inputs) -> dict[str, Any]:
    """What the sections behind the scores are written from."""
    return {
        "points": judgement.operating_points(inputs),
        "rules": list(judgement.RULES.values()),
        "calibration": judgement.calibration(inputs),
        "groups": judgement.groups(inputs),
        "comparison": judgement.comparison(inputs),
        "confusion": judgement.confusion(inputs),
        "least": judgement.LEAST,
        "hidden": judgement.hidden(inputs),
        "soft": inputs.run.train.method == "mpc" and inputs.run.pseudo.form == "soft",
        "maps": inputs.maps,
        "scale": scale(),
        "sanity_words": _sanity(inputs),
    }


def _sanity(inputs: Inputs) -> str:
    """What the check with random weights says, in words."""
    check = judgement.sanity(inputs)
    if check is None:
        return ""
    return (
        f"Check: with random weights in place of the trained ones the maps change: their rank correlation is "
        f"{check['mean']:+.2f} on average over {check['maps']} maps, {check['largest']:+.2f} at most "
        f"(1 would mean that the network does not matter)."
    )


def _command(inputs: Inputs) -> str:
    """The command that makes the numbers anew."""
    registered = inputs.registered
    model = ["--model", f"models:/{registered}"] if registered else ["--checkpoint", inputs.places["checkpoint"]]
    places = ["--data", inputs.places["data"], "--split", inputs.metrics["split"], "--out", inputs.places["evaluation"]]
    settings = []
    pairs = inputs.metrics.get("finding_map", {})
    if (
        any(ours != theirs for ours, theirs in pairs.get("scored", {}).items())
        or inputs.findings != inputs.card.findings
    ):
        renamed = {ours: theirs for ours, theirs in pairs["scored"].items() if ours != theirs}
        settings += ["--set", f"evaluate.finding_map={json.dumps(renamed)}"]
    if "comparison" in inputs.metrics:
        settings += ["--set", f"evaluate.compare={inputs.metrics['comparison']['rival']}"]
    return shlex.join(["mpc-cxr", "evaluate", *model, *places, *settings])
