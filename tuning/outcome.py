"""What a search leaves behind: its trials, the best checkpoint, search.json; nothing that ran is left unsaid."""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml
from ray import tune
from ray.train import Checkpoint

from mpc.checkpoint import INFO
from mpc.errors import UserError
from pipeline import storage
from pipeline.card import DatasetCard
from pipeline.checkpoints import best_of as best_stored
from pipeline.checkpoints import found_in, publish
from pipeline.config import RunConfig
from pipeline.record import METRICS_FILE, MetricsLog
from pipeline.worker import STORAGE_NAME
from tuning import budget, journal
from tuning.config import SearchConfig
from tuning.domains import Space
from tuning.follow import CELL, STATE, TRIALS
from tuning.keeping import best_of, best_value, delete_checkpoints, delete_job, ranked
from tuning.pareto import front
from tuning.schedulers import rungs
from tuning.searchers import COST
from tuning.trial import LEGS_FILE

log = logging.getLogger(__name__)

SEARCH_FILE = "search.json"
RUN_FILE = "best.yaml"
"""Settings of the best trial, its schedule included, for `train --config`."""


@dataclass(frozen=True)
class Trial:
    """One trial as search.json holds it."""

    trial_id: str
    status: str
    """`finished`, `stopped` (early, by the scheduler or with the hours), `failed`, or `lost`: killed before Tune had
    noted it."""
    params: dict[str, Any]
    """What it tried; under population based training, what its best epoch's lineage began with."""
    epochs: int
    value: float | None
    """Best value of the searched metric over its epochs."""
    error: str | None
    cost: float | None = None
    """What `search.cost` names."""
    started: float | None = None
    """Seconds since 1970, like the next."""
    ended: float | None = None
    legs: list[dict[str, Any]] = field(default_factory=list)
    """Population based training: where it took over weights, from whom, and what it went on with."""


@dataclass(frozen=True)
class SearchResult:
    """What a search found."""

    trials: list[Trial]
    best: Trial
    best_checkpoint: str
    """URI of the best trial's best checkpoint."""


def identity(run: RunConfig, config: SearchConfig, space: Space, card: DatasetCard) -> dict[str, Any]:
    """What must be the same for a search to be continued: all that Tune restores from its own state, budgets too."""
    return {
        "config": run.model_dump(mode="json"),
        "search": config.model_dump(mode="json"),
        "space": dict(space.describe()),
        "data_digest": card.digest,
    }


class Conclusion:
    """Makes the outcome of a search from Tune's results and the trials' own records.

    Args:
        run: what every trial shares.
        config: of the search.
        space: what was searched.
        card: of the data set.
        out: folder of the search.
    """

    def __init__(self, run: RunConfig, config: SearchConfig, space: Space, card: DatasetCard, out: str) -> None:
        self.run, self.config, self.space, self.card, self.out = run, config, space, card, out
        self.folder = storage.join(out, TRIALS)

    def write(self, grid: tune.ResultGrid, warm_start: Mapping[str, Any]) -> SearchResult:
        """Writes search.json, best/ and best.yaml, and leaves checkpoints of the best `keep_trials` trials alone.

        Raises:
            UserError: no trial reported the metric, or no checkpoint of one that did is left.
        """
        results = {Path(result.path).name: result for result in grid}
        trials = [self._trial(name, result) for name, result in results.items()]
        lost = self._lost(results)
        ranking = self._ranked(trials)
        if not ranking:
            spent = f": search.max_hours {self.config.max_hours:g} are spent" if self._out_of_hours else ""
            reasons = sorted({trial.error or f"no epoch finished{spent}" for trial in trials})
            raise UserError(f"none of {len(trials)} trials reported {self.config.metric}: {'; '.join(reasons)[:400]}")
        everything = [*trials, *lost]
        left = ((trial, self._checkpoint(trial.trial_id)) for trial in ranking)
        best, checkpoint = next(((trial, found) for trial, found in left if found is not None), (ranking[0], None))
        self._write_record(everything, best, warm_start)
        if checkpoint is None:
            raise UserError(
                f"{self.out}: no checkpoint of any trial is left, {SEARCH_FILE} has their values; search anew"
            )
        if best is not ranking[0]:
            log.warning("trial %s was better than %s, but its checkpoints are gone", ranking[0].trial_id, best.trial_id)
        place = publish(checkpoint, self.out)
        kept = {best.trial_id, *(trial.trial_id for trial in ranking[: self.config.keep_trials])}
        # --resume tries trials again that failed, perhaps from another one's; on S3 an empty folder costs nothing
        folders = not storage.is_remote(self.out) and all(trial.status != "failed" for trial in everything)
        for name in {trial.trial_id for trial in everything} - kept:
            delete_checkpoints(storage.join(self.out, STATE), name, folders=folders)
            delete_job(self.folder, name)
        info = json.loads(storage.read_bytes(storage.join(place, INFO)))
        text = f"# {self.config.metric} {best.value:.4f}: trial {best.trial_id} of {storage.name(self.out)}\n"
        storage.write_bytes(storage.join(self.out, RUN_FILE), (text + yaml.safe_dump(info["config"])).encode())
        return SearchResult(everything, best, place)

    def _write_record(self, trials: Sequence[Trial], best: Trial, warm_start: Mapping[str, Any]) -> None:
        record = {
            "schema_version": 1,
            "synthetic": self.card.synthetic,
            "metric": self.config.metric,
            "mode": self.config.mode,
            "max_epochs": self.run.train.epochs,
            "max_trials": self.config.max_trials,
            **identity(self.run, self.config, self.space, self.card),
            "domains": {dimension.path: dimension.written() for dimension in self.space.dimensions},
            "rungs": rungs(self.config, self.run.train.epochs),
            "ended_by": "hours" if self._out_of_hours else "trials",
            "warm_start": dict(warm_start),
            "best": best.trial_id,
            "pareto": pareto(trials, self.config),
            "trials": [asdict(trial) for trial in trials],
        }
        storage.write_bytes(storage.join(self.out, SEARCH_FILE), json.dumps(record, indent=2).encode())

    @property
    def _out_of_hours(self) -> bool:
        limit = self.config.max_hours
        return limit is not None and budget.spent(storage.join(self.out, budget.FILE)) >= limit

    def _trial(self, name: str, result: tune.Result) -> Trial:
        folder = storage.join(self.folder, name)
        history, note = MetricsLog(folder).read(), journal.read(folder)
        legs = self._legs(name)
        config = result.config or note.get("settings", {})  # Tune has none of a trial that never reported
        params = dict(config.get(CELL, config))
        if legs:
            epoch = self._best_epoch(history)
            params = [leg for leg in legs if leg["epoch"] < epoch or leg is legs[0]][-1]["begun_with"]
        last = history[-1]["epoch"] if history else 0
        status = "finished" if last >= self.run.train.epochs else "stopped"
        if result.error or note.get("status") == "failed":  # which Tune forgets where no hour was left to try it again
            status = "failed"
        return Trial(
            trial_id=name,
            status=status,
            params=params,
            epochs=len(history),
            value=best_value(history, self.config),
            error=journal.last_line(str(result.error or "")) or note.get("error"),
            cost=(result.metrics or {}).get(COST),
            started=note.get("started"),
            ended=note.get("ended"),
            legs=legs,
        )

    def _lost(self, known: Mapping[str, Any]) -> list[Trial]:
        """Trials that left epochs but are not in Tune's state: a killed driver had not noted them yet."""
        files = storage.list_files(self.folder, [METRICS_FILE]) if storage.exists(self.folder) else ()
        found = {uri.partition("?")[0].split("/")[-2] for uri in files}
        error = "killed with the driver before the search had noted it; another trial took its place"
        lost = []
        for name in sorted(found - known.keys()):
            folder = storage.join(self.folder, name)
            history, settings = MetricsLog(folder).read(), journal.read(folder).get("settings", {})
            lost.append(Trial(name, "lost", settings, len(history), best_value(history, self.config), error))
        return lost

    def _legs(self, name: str) -> list[dict[str, Any]]:
        uri = storage.join(self.folder, name, LEGS_FILE)
        legs: list[dict[str, Any]] = json.loads(storage.read_bytes(uri)) if storage.exists(uri) else []
        return legs

    def _best_epoch(self, history: Sequence[Mapping[str, Any]]) -> float:
        """The epoch with the best value, of equals the latest; 0 without one."""
        best = best_value([dict(line) for line in history], self.config)
        values = {line["epoch"]: line.get(self.config.metric) for line in history}
        return max((epoch for epoch, value in values.items() if value is not None and value == best), default=0)

    def _ranked(self, trials: Sequence[Trial]) -> list[Trial]:
        """What ended well and has a value, the best first."""
        well = {trial.trial_id: trial for trial in trials if trial.status != "failed"}
        return [well[name] for name in ranked({name: trial.value for name, trial in well.items()}, self.config)]

    def _checkpoint(self, name: str) -> Checkpoint | None:
        """The best checkpoint of a trial: with several workers the best by train.metric, which is then the same one."""
        if self.run.train.num_workers > 1:  # its checkpoints lie with Ray Train, in the trial's own folder
            stored = best_stored(storage.join(self.folder, name, STORAGE_NAME))
            return stored[0] if stored else None
        history = MetricsLog(storage.join(self.folder, name)).read()
        best = best_of(found_in(storage.join(self.out, STATE, name)), history, self.config)
        return best.checkpoint if best else None


def pareto(trials: Sequence[Trial], config: SearchConfig) -> list[str]:
    """Ids of the trials that no other one beats in metric and cost, the cheapest first; empty for a single aim."""
    if config.searcher != "pareto":
        return []
    return front(
        (trial.cost, -config.sign * trial.value, trial.trial_id)
        for trial in trials
        if trial.value is not None and trial.cost is not None and trial.status in ("finished", "stopped")
    )
