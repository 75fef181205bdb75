"""What a search tells about its settings, as numbers: who won by how much, what mattered, what it cost."""

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import optuna
from numpy.typing import NDArray
from optuna.importance import FanovaImportanceEvaluator
from sklearn.ensemble import RandomForestRegressor

from mpc.errors import MissingError, UserError
from pipeline import storage
from pipeline.dotted import flat
from pipeline.record import MetricsLog
from tuning.domains import CHOICE, Dimension

optuna.logging.set_verbosity(optuna.logging.WARNING)

Array = NDArray[Any]

SEARCH_FILE, TRIALS = "search.json", "trials"
LEAST = 10
"""Trials with a value that importances and expected values need at least."""
TREES, RESAMPLES, TREES_EACH = 64, 10, 16
EDGE = 0.02
"""A winner that lies this close to a bound may want to lie beyond it; a share of the domain."""


@dataclass(frozen=True)
class Found:
    """A search as its files hold it."""

    folder: str
    record: dict[str, Any]
    """search.json."""
    histories: dict[str, list[dict[str, Any]]]
    """Epochs of each trial."""

    @property
    def dimensions(self) -> list[Dimension]:
        """What was searched."""
        return [Dimension.of(path, written) for path, written in self.record["domains"].items()]

    @property
    def sign(self) -> float:
        """1 where more is better."""
        return 1.0 if self.record["mode"] == "max" else -1.0

    @property
    def ranked(self) -> list[dict[str, Any]]:
        """Trials with a value and settings that did not fail, the best first."""
        valued = [t for t in self.record["trials"] if t["value"] is not None and t["status"] != "failed"]
        known = [trial for trial in valued if trial["params"]]
        return sorted(known, key=lambda trial: (-self.sign * trial["value"], trial["trial_id"]))

    @property
    def unknown(self) -> int:
        """Lost trials that had noted epochs, but no settings yet: nothing but the table tells of them."""
        return sum(trial["status"] == "lost" and not trial["params"] for trial in self.record["trials"])

    @cached_property
    def level(self) -> dict[str, float]:
        """Values by trial as if all had run equally long."""
        return levelled(self)

    @property
    def population(self) -> bool:
        """Whether settings changed while trials trained: then a trial has no one value of each."""
        return bool(self.record["search"]["scheduler"] == "pbt")

    @property
    def comparable(self) -> bool:
        """Whether there are trials enough, with values that differ, to say what a setting does."""
        return len(self.ranked) >= LEAST and len(set(self.level.values())) > 1 and not self.population

    @property
    def best(self) -> dict[str, Any]:
        """The winner."""
        found: dict[str, Any] = next(t for t in self.record["trials"] if t["trial_id"] == self.record["best"])
        return found

    @property
    def base(self) -> dict[str, Any]:
        """Dotted settings of the run that the search began from."""
        return flat(self.record["config"])


def read_search(folder: str) -> Found:
    """Reads search.json and the trials' records.

    Raises:
        MissingError: there is no search.json: the search has not ended.
        UserError: another version of this software wrote it.
    """
    uri = storage.join(folder, SEARCH_FILE)
    try:
        record = json.loads(storage.read_bytes(uri))
    except MissingError:
        raise MissingError(f"{uri} is absent; the page is made from it once the search has ended") from None
    if record.get("schema_version") != 1 or "domains" not in record:
        raise UserError(f"{uri}: was written by another version; use that version of this software")
    names = [trial["trial_id"] for trial in record["trials"]]
    return Found(folder, record, {name: MetricsLog(storage.join(folder, TRIALS, name)).read() for name in names})


class Cost(NamedTuple):
    """What a search took."""

    epochs: int
    budget: int
    """Epochs if every trial had run to its end."""
    seconds_trained: float
    """Of all trials, epochs and their validation alone."""
    seconds_passed: float | None
    """From the first start to the last end, pauses included; None where they were not noted."""

    @property
    def share(self) -> float:
        """Of the full budget."""
        return self.epochs / self.budget if self.budget else 0.0


def cost_of(found: Found) -> Cost:
    """Epochs and time of all trials, lost ones too."""
    trials = found.record["trials"]
    trained = sum(line.get("seconds", 0.0) for lines in found.histories.values() for line in lines)
    timed = [trial for trial in trials if trial.get("started") and trial.get("ended")]
    passed = max(t["ended"] for t in timed) - min(t["started"] for t in timed) if timed else None
    epochs = sum(trial["epochs"] for trial in trials)
    return Cost(epochs, found.record["max_epochs"] * len(trials), trained, passed)


class Lead(NamedTuple):
    """By how much the winner won; None where there is nobody to compare with."""

    on_second: float | None
    """Below 0 where a better trial has no checkpoint left."""
    on_median: float | None
    """Of the trials that ran to their end."""
    finished: int


def lead_of(found: Found) -> Lead:
    """Differences in the metric, positive where the winner is better."""
    best, ended_well = found.best, [trial for trial in found.ranked if trial["status"] != "lost"]
    others = [trial for trial in ended_well if trial is not best]
    ended = [trial["value"] for trial in ended_well if trial["status"] == "finished"]
    on_second = found.sign * (best["value"] - others[0]["value"]) if others else None
    on_median = found.sign * (best["value"] - statistics.median(ended)) if len(ended) > 1 else None
    return Lead(on_second, on_median, len(ended))


def levelled(found: Found) -> dict[str, float]:
    """Values by trial as if all had run equally long, so that settings can be compared.

    A trial that was stopped is credited with what those that went on gained after the same epoch, in the median; at
    most up to the winner.
    """
    metric, limit, values = found.record["metric"], found.best["value"], {}
    for trial in found.ranked:
        value, last = trial["value"], trial["epochs"]
        gains = [_gain(found, other, metric, last) for other in found.ranked if other["epochs"] > last]
        known = [gain for gain in gains if gain is not None]
        credited = value + found.sign * max(0.0, statistics.median(known)) if known else value
        values[trial["trial_id"]] = credited if found.sign * (limit - credited) > 0 else limit
        if trial["status"] == "finished":
            values[trial["trial_id"]] = value
    return values


def _gain(found: Found, trial: Mapping[str, Any], metric: str, epoch: int) -> float | None:
    """What a trial gained from the best of its first epochs to its best; None where they have no value."""
    history = found.histories[trial["trial_id"]][:epoch]
    before = [found.sign * line[metric] for line in history if line.get(metric) is not None]
    return found.sign * trial["value"] - max(before) if before else None


class Winner(NamedTuple):
    """One searched setting of the winner."""

    path: str
    base: Any
    """Its value where the search began."""
    value: Any
    """None where its condition did not hold."""
    domain: str
    share: float | None
    """Where the value lies in the domain; None for choices."""
    at_edge: bool


def winner_of(found: Found) -> list[Winner]:
    """What the best trial tried, beside what the search began from."""
    settings, rows = found.best["params"], []
    for dimension in found.dimensions:
        value = settings.get(dimension.path)
        number = value is not None and dimension.kind != CHOICE
        share = dimension.share(value) if number else None
        edge = share is not None and not EDGE < share < 1 - EDGE
        rows.append(Winner(dimension.path, found.base.get(dimension.path), value, dimension.text(), share, edge))
    return rows


class Importance(NamedTuple):
    """How much of the differences between trials one setting explains alone."""

    path: str
    share: float
    low: float
    high: float
    """Lowest and highest share over resamples of the trials."""


def importances(found: Found) -> list[Importance]:
    """Shares of the variance by fANOVA (Hutter et al., ICML 2014) over all trials with a value, the greatest first;
    none for too few trials.

    Settings under a condition have none: they are not in every trial.
    """
    dimensions = [d for d in found.dimensions if not d.when and len(set(d.edges())) > 1]
    trials = found.ranked
    if not found.comparable or not dimensions:
        return []
    points = [(trial["params"], found.level[trial["trial_id"]]) for trial in trials]
    whole, draws = _fanova(points, dimensions, TREES), np.random.default_rng(0)
    resampled = [
        _fanova([points[i] for i in draws.integers(0, len(points), len(points))], dimensions, TREES_EACH)
        for _ in range(RESAMPLES)
    ]
    rows = [
        Importance(path, share, *(end(one[path] for one in [whole, *resampled]) for end in (min, max)))
        for path, share in whole.items()
    ]
    return sorted(rows, key=lambda row: -row.share)


def _fanova(
    points: Sequence[tuple[Mapping[str, Any], float]], dimensions: Sequence[Dimension], trees: int
) -> dict[str, float]:
    """Shares of the variance; 0 where no setting divides it, as in a resample with a single value."""
    study = optuna.create_study(storage=optuna.storages.InMemoryStorage())
    domains = {dimension.path: dimension.distribution() for dimension in dimensions}
    for params, value in points:
        settings = {path: params[path] for path in domains}
        study.add_trial(optuna.trial.create_trial(params=settings, distributions=domains, value=value))
    try:
        shares = FanovaImportanceEvaluator(n_trees=trees, seed=0).evaluate(study)
    except RuntimeError:  # Optuna's, of a forest whose trees have no branch
        shares = {}
    return {path: float(shares.get(path, 0.0)) for path in domains}


class Expected:
    """What a random forest, fitted to all trials, expects of settings, averaged over what the trials have elsewhere.

    Args:
        found: the search.
    """

    def __init__(self, found: Found) -> None:
        self.dimensions = found.dimensions
        trials = found.ranked
        self.points = np.array([self._point(trial["params"], found.base) for trial in trials])
        forest = RandomForestRegressor(200, min_samples_leaf=2, random_state=0, n_jobs=1)
        self.forest = forest.fit(self.points, [found.level[trial["trial_id"]] for trial in trials])

    def _point(self, settings: Mapping[str, Any], base: Mapping[str, Any]) -> list[float]:
        """Shares; a setting that was not searched here has the base's value, as in the trial itself."""
        return [self._share(d, settings.get(d.path, base.get(d.path))) for d in self.dimensions]

    def _share(self, dimension: Dimension, value: Any) -> float:
        """Outside the domain, -1: apart from all that was searched."""
        return dimension.share(value) if dimension.holds(value) else -1.0

    def along(self, shares: Mapping[str, Array]) -> Array:
        """Expected values, [M].

        Args:
            shares: path -> [M], what is set; everything else keeps what each trial has.
        """
        columns = [dimension.path for dimension in self.dimensions]
        count = len(next(iter(shares.values())))
        tiled = np.tile(self.points, (count, 1))
        for path, values in shares.items():
            tiled[:, columns.index(path)] = np.repeat(values, len(self.points))
        expected: Array = self.forest.predict(tiled).reshape(count, -1).mean(axis=1)
        return expected
