"""What a search leaves behind: its trials, the best checkpoint, search.json; nothing that ran is left unsaid."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pyarrow import fs
from ray import tune

from mpc.errors import UserError
from pipeline import storage
from pipeline.card import DatasetCard
from pipeline.checkpoints import BEST, best_of, publish
from pipeline.config import RunConfig
from pipeline.record import METRICS_FILE, MetricsLog
from pipeline.worker import STORAGE_NAME
from tuning.config import SearchConfig
from tuning.space import Space

TRIALS, SEARCH_FILE = "trials", "search.json"


@dataclass(frozen=True)
class Trial:
    """One trial as search.json holds it."""

    trial_id: str
    status: str
    """`finished`, `stopped` (early, by the scheduler), `failed`, or `lost`: killed before Tune had noted it."""
    params: dict[str, Any]
    epochs: int
    value: float | None
    """Best value of the searched metric over its epochs."""
    error: str | None


@dataclass(frozen=True)
class SearchResult:
    """What a search found."""

    trials: list[Trial]
    best: Trial
    best_checkpoint: str
    """URI of the best trial's best checkpoint."""


def identity(run: RunConfig, config: SearchConfig, space: Space, card: DatasetCard) -> dict[str, Any]:
    """What must be the same for a search to be continued: all that Tune restores from its own state, budgets too."""
    fixed = config.model_dump(mode="json", exclude={"keep_trials"})
    return {
        "config": run.model_dump(mode="json"),
        "search": fixed,
        "space": dict(space.describe()),
        "data_digest": card.digest,
    }


def conclude(
    grid: tune.ResultGrid, run: RunConfig, config: SearchConfig, space: Space, card: DatasetCard, out: str
) -> SearchResult:
    """Writes search.json and best/, and deletes the checkpoints of all but the best `keep_trials` trials.

    Raises:
        UserError: no trial reported the metric.
    """
    results = {Path(result.path).name: result for result in grid}
    trials = [_trial(trial_id, result, run, config, out) for trial_id, result in results.items()]
    sign = 1.0 if config.mode == "max" else -1.0
    ranked = sorted(
        (trial for trial in trials if trial.value is not None and trial.status != "failed"),
        key=lambda trial: sign * (trial.value or 0.0),
        reverse=True,
    )
    if not ranked:
        reasons = sorted({trial.error or "no epoch finished" for trial in trials})
        raise UserError(f"none of {len(trials)} trials reported {config.metric}: {'; '.join(reasons)[:400]}")
    best = ranked[0]
    checkpoint = _publish(results[best.trial_id], best, run, config, out)
    kept = {trial.trial_id for trial in ranked[: config.keep_trials]}
    for trial_id in results.keys() - kept:
        _delete_checkpoints(results[trial_id], storage.join(out, TRIALS, trial_id))
    everything = [*trials, *_lost(results, config, out)]
    record = {
        "schema_version": 1,
        "synthetic": card.synthetic,
        "metric": config.metric,
        "mode": config.mode,
        "max_epochs": run.train.epochs,
        "max_trials": config.max_trials,
        **identity(run, config, space, card),
        "best": best.trial_id,
        "trials": [asdict(trial) for trial in everything],
    }
    storage.write_bytes(storage.join(out, SEARCH_FILE), json.dumps(record, indent=2).encode())
    return SearchResult(everything, best, checkpoint)


def _trial(trial_id: str, result: tune.Result, run: RunConfig, config: SearchConfig, out: str) -> Trial:
    epochs, value = _history(trial_id, config, out)
    status = "failed" if result.error else "finished" if epochs >= run.train.epochs else "stopped"
    error = str(result.error).strip().splitlines()[-1][:500] if result.error else None
    return Trial(trial_id, status, dict(result.config), epochs, value, error)


def _lost(known: dict[str, Any], config: SearchConfig, out: str) -> list[Trial]:
    """Trials that left epochs but are not in Tune's state: a killed driver had not noted them yet."""
    folders = {Path(uri).parent.name for uri in storage.list_files(storage.join(out, TRIALS), [METRICS_FILE])}
    error = "killed with the driver before the search had noted it; another trial took its place"
    return [Trial(name, "lost", {}, *_history(name, config, out), error) for name in sorted(folders - known.keys())]


def _history(trial_id: str, config: SearchConfig, out: str) -> tuple[int, float | None]:
    """Epochs of a trial, and the best value among them."""
    history = MetricsLog(storage.join(out, TRIALS, trial_id)).read()
    values = [line[config.metric] for line in history if line.get(config.metric) is not None]
    return len(history), (max if config.mode == "max" else min)(values, default=None)


def _publish(result: tune.Result, best: Trial, run: RunConfig, config: SearchConfig, out: str) -> str:
    """Copies the best checkpoint of the best trial to best/: with several workers the best by train.metric."""
    if run.train.num_workers > 1:  # its checkpoints lie with Ray Train, in the trial's own folder
        found = best_of(storage.join(out, TRIALS, best.trial_id, STORAGE_NAME))
        assert found is not None, "a trial with a value has stored an epoch"
        return publish(found[0], out)
    return publish(result.get_best_checkpoint(config.metric, config.mode), out)


def _delete_checkpoints(result: tune.Result, folder: str) -> None:
    """Of Tune, which keeps one more than it lists, and of Ray Train below `folder`."""
    for entry in result.filesystem.get_file_info(fs.FileSelector(result.path, allow_not_found=True)):
        if entry.base_name.startswith("checkpoint_"):
            result.filesystem.delete_dir(entry.path)
    for name in (STORAGE_NAME, BEST):
        storage.delete(storage.join(folder, name))
