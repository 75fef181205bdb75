"""Puts the sections into the template and writes the page."""

import json
import shlex
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from pipeline import storage
from pipeline.overlay import scale
from tuning.report import judgement, pictures, results, trials
from tuning.report.charts import STATUS_COLOURS
from tuning.report.files import Inputs, read_inputs

TEMPLATE = "report.html.j2"
DASH, MINUS = "–", "−"


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
    page = _environment().get_template(TEMPLATE).render(title=title, **_content(inputs))
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


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("tuning.report", "template"),
        autoescape=True,  # names of findings, trials and folders are the user's
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(score=_score, percent=_percent, count=_count, words=_words, value=_value)
    environment.filters.update(interval=_interval, percents=_percents, signed=_signed, place=_place)
    environment.filters.update(signed_interval=_signed_interval, breakable=_breakable)
    return environment


def _score(value: float | None, digits: int = 3) -> str:
    return DASH if value is None else f"{value:.{digits}f}"


def _percent(value: float | None, digits: int = 0) -> str:
    return DASH if value is None else f"{100 * value:.{digits}f} %"


def _signed(value: float | None, digits: int = 3) -> str:
    return DASH if value is None else f"{value:+.{digits}f}".replace("-", MINUS)


def _interval(bounds: list[float]) -> str:
    return f"{bounds[0]:.3f}{DASH}{bounds[1]:.3f}"


def _percents(bounds: list[float]) -> str:
    return f"{100 * bounds[0]:.0f}{DASH}{100 * bounds[1]:.0f}"


def _signed_interval(bounds: list[float]) -> str:
    return f"{_signed(bounds[0])} to {_signed(bounds[1])}"


def _place(value: float, low: float, high: float) -> float:
    """Where a value lies between two ends, in per cent; what lies outside is at the end."""
    return round(100 * min(1.0, max(0.0, (value - low) / (high - low))), 1)


def _count(value: int) -> str:
    return f"{value:,}"


def _words(name: str) -> str:
    return name.replace("_", " ")


def _breakable(path: str) -> str:
    """A dotted path that a narrow column may break (zero-width spaces)."""
    return path.replace(".", ".\u200b").replace("_", "_\u200b")


def _value(value: Any) -> str:
    """A setting of a trial: three significant digits."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)
