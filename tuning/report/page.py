"""Puts the sections into the template and writes the page."""

import shlex
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from pipeline import storage
from tuning.report import pictures, results, trials
from tuning.report.charts import STATUS_COLOURS
from tuning.report.files import Inputs, read_inputs

TEMPLATE = "report.html.j2"
DASH = "–"


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
    return {
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
        "missed": pictures.errors(inputs, missed=True),
        "alarms": pictures.errors(inputs, missed=False),
        "max_side": pictures.MAX_SIDE,
        "places": inputs.places,
        "command": _command(inputs),
        "defaults": [row.name for row in rows if row.both and row.default],
    }


def _command(inputs: Inputs) -> str:
    """The command that makes the numbers anew."""
    registered = inputs.registered
    model = ["--model", f"models:/{registered}"] if registered else ["--checkpoint", inputs.places["checkpoint"]]
    places = ["--data", inputs.places["data"], "--split", inputs.metrics["split"], "--out", inputs.places["evaluation"]]
    return shlex.join(["mpc-cxr", "evaluate", *model, *places])


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("tuning.report", "template"),
        autoescape=True,  # names of findings, trials and folders are the user's
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(score=_score, percent=_percent, count=_count, words=_words, value=_value)
    environment.filters["breakable"] = _breakable
    return environment


def _score(value: float | None, digits: int = 3) -> str:
    return DASH if value is None else f"{value:.{digits}f}"


def _percent(value: float | None, digits: int = 0) -> str:
    return DASH if value is None else f"{100 * value:.{digits}f} %"


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
