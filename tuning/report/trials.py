"""The search: its trials, their learning curves, what early stopping saved, and the monitors of the best one."""

from typing import Any, NamedTuple

from pipeline.dotted import flat
from tuning.report.charts import ACCENT, FAILED, SECOND, STATUS_COLOURS, STOPPED, Chart, Line, over_epochs
from tuning.report.files import Inputs

MAX_TRIALS = 200
"""Rows of the table; of more, the best are shown."""
WORDS = {"finished": "finished", "stopped": "stopped early", "failed": "failed", "lost": "lost"}
LOSSES = {"sup": ACCENT, "ipc": SECOND, "fpc": STOPPED, "btc": FAILED}


class Panel(NamedTuple):
    """A small chart with its title, what it shows, and the colours of its lines."""

    title: str
    text: str
    chart: Chart
    legend: list[tuple[str, str]]


def search_section(inputs: Inputs) -> dict[str, Any] | None:
    """What the template says about the search; None without one."""
    record = inputs.search
    if record is None:
        return None
    return {
        **section(record),
        "curves": learning_curves(inputs.histories, record),
        "is_best": _is_best(inputs, record),
        "same_data": record["data_digest"] == inputs.info.data_digest,
    }


def section(record: dict[str, Any]) -> dict[str, Any]:
    """What search.json alone says: counts of trials, what was searched, the table of trials, the best first."""
    sign = -1.0 if record["mode"] == "max" else 1.0
    trials = sorted(record["trials"], key=lambda t: (t["value"] is None, sign * (t["value"] or 0.0)))
    budget = record["max_epochs"] * len(trials)
    trained = sum(trial["epochs"] for trial in trials)
    counts = {status: sum(trial["status"] == status for trial in trials) for status in WORDS}
    return {
        "metric": record["metric"],
        "best": record["best"],
        "max_epochs": record["max_epochs"],
        "searcher": record["search"]["searcher"],
        "scheduler": record["search"]["scheduler"],
        "space": sorted(record["space"].items()),
        "counts": [(count, WORDS[status], STATUS_COLOURS[status]) for status, count in counts.items() if count],
        "stopped": counts["stopped"],
        "total": len(trials),
        "trained": trained,
        "budget": budget,
        "share": trained / budget if budget else 0.0,
        "paths": sorted({path for trial in trials for path in trial["params"]}),
        "trials": [_row(trial, record["best"]) for trial in trials[:MAX_TRIALS]],
        "reasons": any(trial["error"] for trial in trials),
        "left_out": max(0, len(trials) - MAX_TRIALS),
    }


def learning_curves(histories: dict[str, list[dict[str, Any]]], record: dict[str, Any]) -> Chart | None:
    """The searched metric of every trial over epochs; a cross ends the stopped and the failed ones."""
    lines = []
    for trial in sorted(record["trials"], key=lambda trial: trial["trial_id"] == record["best"]):
        epochs = [line for line in histories[trial["trial_id"]] if line.get(record["metric"]) is not None]
        if not epochs:
            continue
        best = trial["trial_id"] == record["best"]
        lines.append(
            Line(
                [line["epoch"] for line in epochs],
                [line[record["metric"]] for line in epochs],
                STATUS_COLOURS["best" if best else trial["status"]],
                strong=best,
                end="x" if trial["status"] in ("stopped", "failed") else "o" if best else "",
            )
        )
    alt = f"{record['metric']} over epochs of {len(lines)} trials; the best is {record['best']}"
    return over_epochs(lines, alt, size=(4.7, 2.6)) if lines else None


def monitors(inputs: Inputs, positives: float | None) -> list[Panel]:
    """Charts over the epochs of the run that gave the checkpoint, or of the best trial.

    Args:
        inputs: what was read.
        positives: known positives of a training image; the dashed levels come from it.
    """
    history = inputs.history
    hidden = None if positives is None else positives - 1
    panels = [
        _panel(history, "Validation", "Scores on the validation split.", _SCORES, limits=(None, None)),
        _panel(history, "Loss terms", "Means over an epoch, before they are weighted.", _LOSSES),
        _panel(
            history,
            "Share selected",
            "Entries (image x finding) whose pseudo-label is sure enough to be used.",
            {"selected_share": ("", ACCENT)},
            limits=(0, 1.02),
        ),
        _panel(
            history,
            "Pseudo-positives an image",
            "Unlabelled entries taken for positive." + _level(hidden, "positives that really stay hidden"),
            {"pseudo_positives": ("", ACCENT)},
            reference=hidden,
            limits=(0, None),
        ),
        _panel(
            history,
            "Sum of probabilities an image",
            "Taking unlabelled for absent pulls it to 1." + _level(positives, "findings an image"),
            {"mean_sum_p": ("", ACCENT)},
            reference=positives,
            limits=(0, None),
        ),
        _panel(
            history,
            "Pseudo-positives against the truth",
            "Precision: how many are right. Recall: how many hidden positives they find.",
            {"pseudo_precision": ("precision", ACCENT), "pseudo_recall": ("recall", SECOND)},
            limits=(0, 1.02),
        ),
    ]
    return [panel for panel in panels if panel is not None]


_SCORES = {"val_macro_auroc": ("macro AUROC", ACCENT), "val_macro_ap": ("mean average precision", SECOND)}
_LOSSES = {f"loss_{name}": (name.upper() if name != "sup" else "supervised", c) for name, c in LOSSES.items()}


def _panel(
    history: list[dict[str, Any]],
    title: str,
    text: str,
    lines: dict[str, tuple[str, str]],
    *,
    reference: float | None = None,
    limits: tuple[float | None, float | None] = (0, None),
) -> Panel | None:
    """A panel of the keys that the history has; None where it has none of them."""
    present = {key: line for key, line in lines.items() if any(epoch.get(key) is not None for epoch in history)}
    if not present:
        return None
    epochs = [epoch["epoch"] for epoch in history]
    drawn = [
        Line(epochs, [float("nan") if epoch.get(key) is None else epoch[key] for epoch in history], colour)
        for key, (_, colour) in present.items()
    ]
    chart = over_epochs(drawn, f"{title} over epochs. {text}", reference=reference, limits=limits)
    return Panel(title, text, chart, [line for line in present.values() if line[0]])


def _level(value: float | None, meaning: str) -> str:
    return "" if value is None else f" Dashed: {meaning}, {value:.2f}."


def _row(trial: dict[str, Any], best: str) -> dict[str, Any]:
    is_best = trial["trial_id"] == best
    colour = STATUS_COLOURS["best" if is_best else trial["status"]]
    return {**trial, "word": WORDS[trial["status"]], "is_best": is_best, "colour": colour}


def _is_best(inputs: Inputs, record: dict[str, Any]) -> bool:
    """Whether the checkpoint carries the settings of the search's best trial."""
    params = next(trial["params"] for trial in record["trials"] if trial["trial_id"] == record["best"])
    config = flat(inputs.info.config)
    return all(config.get(path) == value for path, value in params.items())
