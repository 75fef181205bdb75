"""search.html: what a search found, for somebody who was not there; made from search.json and the trials' records."""

import shlex
from typing import Any

from pipeline import storage
from tuning.pareto import front
from tuning.report import learned, plots, trials
from tuning.report.charts import STATUS_COLOURS, Chart
from tuning.report.environment import environment
from tuning.report.learned import Found, read_search

TEMPLATE, PAGE_FILE = "search.html.j2", "search.html"
MAX_SLICES = 12
"""Settings with a chart of their own; of more, the most important ones."""
COSTS = {"seconds": "seconds an epoch", "mflops": "million operations an image"}
SEARCHERS = {"tpe": "Optuna's TPE", "random": "random draws", "grid": "a grid", "pareto": "Optuna's TPE for two aims"}
SCHEDULERS = {
    "asha": "ASHA, which stops trials that fall behind",
    "median": "the median rule, which stops trials below the others' median",
    "hyperband": "HyperBand, which halves groups of trials",
    "pbt": "population based training, which changes settings while trials train",
    "none": "no early stopping",
}


CREDITED = (
    "A trial that was stopped is credited with what the others gained after the same epoch (median), at most up to the "
    "winner, so that it can be compared."
)


def write_search(out: str) -> str:
    """Writes search.html into the folder of a search that has ended; its place. The same files give the same bytes.

    Raises:
        MissingError: the search has not ended.
        UserError: another version wrote it.
    """
    found = read_search(out)
    place = storage.join(out, PAGE_FILE)
    storage.write_bytes(place, environment().get_template(TEMPLATE).render(**_content(found)).encode())
    return place


def _content(found: Found) -> dict[str, Any]:
    record = found.record
    mattered = learned.importances(found)
    expected = learned.Expected(found) if found.comparable else None
    table = trials.section(record)
    return {
        "record": record,
        "credited": CREDITED if table["stopped"] else "",
        "search": table,
        "best": found.best,
        "best_colour": STATUS_COLOURS["best"],
        "cost": learned.cost_of(found),
        "lead": learned.lead_of(found),
        "valued": len(found.ranked),
        "unknown": found.unknown,
        "winner": learned.winner_of(found),
        "searcher": SEARCHERS[record["search"]["searcher"]],
        "scheduler": SCHEDULERS[record["search"]["scheduler"]],
        "run": record["config"],
        "least": learned.LEAST,
        "resamples": learned.RESAMPLES,
        "population": found.population,
        "parallel": plots.parallel(found),
        "mattered": mattered,
        "conditional": [dimension.path for dimension in found.dimensions if dimension.when],
        "slices": _slices(found, mattered, expected),
        "contour": _contour(found, mattered, expected),
        "curves": trials.learning_curves(found.histories, record),
        "time": plots.over_time(found),
        **_front(found),
        "again": shlex.join(["mpc-cxr", "train", "--config", storage.join(found.folder, "best.yaml")]),
    }


def _by_importance(found: Found, mattered: list[learned.Importance]) -> list[Any]:
    """Dimensions, the most important first; those without importance behind them, in their own order."""
    order = {row.path: number for number, row in enumerate(mattered)}
    return sorted(found.dimensions, key=lambda dimension: order.get(dimension.path, len(order)))


def _slices(
    found: Found, mattered: list[learned.Importance], expected: learned.Expected | None
) -> list[tuple[str, Chart]]:
    """A chart for each setting that trials searched."""
    tried = {path for trial in found.ranked for path in trial["params"]}
    chosen = [d for d in _by_importance(found, mattered) if d.path in tried][:MAX_SLICES]
    return [(d.path, plots.one_setting(found, d, None if d.when else expected)) for d in chosen]


def _contour(
    found: Found, mattered: list[learned.Importance], expected: learned.Expected | None
) -> dict[str, Any] | None:
    """The two settings that matter most, together; None for too few trials, or a single setting."""
    if expected is None or len(mattered) < 2:
        return None
    by_path = {dimension.path: dimension for dimension in found.dimensions}
    first, second = (by_path[row.path] for row in mattered[:2])
    return {"first": first.path, "second": second.path, "chart": plots.two_settings(found, first, second, expected)}


def _front(found: Found) -> dict[str, Any]:
    """The trials that are best for what they cost; nothing where costs were not noted, or are all the same."""
    priced = [trial for trial in found.ranked if trial.get("cost") is not None]
    if len({trial["cost"] for trial in priced}) < 2:
        return {"front": None}
    names = front((trial["cost"], -found.sign * trial["value"], trial["trial_id"]) for trial in priced)
    by_id = {trial["trial_id"]: trial for trial in priced}
    label = COSTS[found.record["search"]["cost"]]
    chart = plots.against_cost(found, names, label)
    return {"front": {"label": label, "chart": chart, "trials": [by_id[name] for name in names]}}
