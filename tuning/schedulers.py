"""Ray Tune's schedulers, made to go on after a restore: Tune saves trials and searcher, but no scheduler (Ray 2.60).

What a scheduler has compared lies in the trials' own records, so it is told again when Tune adds the trials again.
"""

from collections import Counter
from functools import partial
from typing import Any

from ray.tune.experiment import Trial
from ray.tune.schedulers import (
    ASHAScheduler,
    FIFOScheduler,
    HyperBandScheduler,
    MedianStoppingRule,
    PopulationBasedTraining,
    TrialScheduler,
)

from mpc.errors import UserError
from pipeline import storage
from pipeline.config import RunConfig
from pipeline.record import MetricsLog
from pipeline.schedule import WEIGHTS, changeable
from tuning.config import SearchConfig
from tuning.domains import CHOICE, Space
from tuning.follow import CELL, name_of
from tuning.keeping import surviving

EPOCH = "epoch"
"""Our own count of time: Tune's training_iteration starts anew after a restore."""
ENOUGH_TRIALS = 3
"""Others that the median is taken of, at least."""


def _record(trials: str, trial: Trial) -> list[dict[str, Any]]:
    """A trial's epochs in earlier sessions; while storage is away none, as an error here would end the search."""
    with surviving(f"earlier epochs of trial {name_of(trial)}"):
        return MetricsLog(storage.join(trials, name_of(trial))).read()
    return []


class RememberingAsha(ASHAScheduler):  # type: ignore[misc]
    """ASHA that knows after a restore what it compared before.

    Args:
        trials: folder with one folder a trial that holds its metrics.jsonl.
        options: of `ASHAScheduler`.
    """

    def __init__(self, trials: str, **options: Any) -> None:
        super().__init__(**options)
        self.trials = trials

    def on_trial_add(self, controller: Any, trial: Trial) -> None:
        """Records an earlier session's epochs at their rungs; what was decided then is not decided again."""
        super().on_trial_add(controller, trial)
        for line in _record(self.trials, trial):
            self.on_trial_result(controller, trial, line)


class RememberingMedian(MedianStoppingRule):  # type: ignore[misc]
    """The median stopping rule that knows after a restore what it compared before.

    Args:
        trials: folder with one folder a trial that holds its metrics.jsonl.
        options: of `MedianStoppingRule`.
    """

    def __init__(self, trials: str, **options: Any) -> None:
        super().__init__(**options)
        self.trials = trials
        self._told: set[str] = set()

    def on_trial_add(self, controller: Any, trial: Trial) -> None:
        """Takes an earlier session's epochs into the means, once."""
        super().on_trial_add(controller, trial)
        known = trial.trial_id in self._told
        self._told.add(trial.trial_id)
        for line in [] if known else _record(self.trials, trial):
            self.on_trial_complete(controller, trial, line)


class ContinuingHyperBand(HyperBandScheduler):  # type: ignore[misc]
    """HyperBand whose brackets, after a restore, are formed anew of the trials that are left.

    Ray adds ended trials again as well; in a bracket, they would be waited for without end.
    """

    def on_trial_add(self, controller: Any, trial: Trial) -> None:
        """Leaves out what has ended."""
        if not trial.is_finished():
            super().on_trial_add(controller, trial)


class FairPopulation(PopulationBasedTraining):  # type: ignore[misc]
    """Population based training that ends with any number of trials at a time.

    Of the trials that have trained least, Ray runs the first in its list (2.60). A trial that goes on from another
    one is set back to that one's epoch, runs first again, and where it is again worse, is set back again: its donor
    never gets a turn. Here, of equals, the trial that has reported least has the turn. That ends: a trial set back
    leaves no checkpoint to go on from, so once all trials of the lowest epoch have reported, none of them can set
    another one back to it.

    Args:
        options: of `PopulationBasedTraining`, asynchronous.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._reports: Counter[str] = Counter()

    def on_trial_result(self, controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        """Counts the trial's turns."""
        self._reports[trial.trial_id] += 1
        return str(super().on_trial_result(controller, trial, result))

    def choose_trial_to_run(self, controller: Any) -> Trial | None:
        """Of the trials that wait, the shortest way; of equals, the one that has reported least."""
        waiting = [trial for trial in controller.get_trials() if trial.status in (Trial.PENDING, Trial.PAUSED)]
        return min(
            waiting, key=lambda t: (self._trial_state[t].last_train_time, self._reports[t.trial_id]), default=None
        )


def make_scheduler(config: SearchConfig, run: RunConfig, space: Space, trials: str) -> TrialScheduler:
    """The scheduler that `config` names.

    Args:
        config: of the search.
        run: what trials train; its epochs are the longest time.
        space: whose settings population based training changes.
        trials: folder with one folder a trial.

    Raises:
        UserError: the scheduler cannot work with this run or space.
    """
    epochs, aim = run.train.epochs, {"metric": config.metric, "mode": config.mode, "time_attr": EPOCH}
    if config.scheduler in ("pbt", "hyperband") and run.train.num_workers > 1:
        raise UserError(
            f"search.scheduler={config.scheduler} pauses trials and hands their weights on, which a Ray Train job of "
            f"{run.train.num_workers} workers cannot; set train.num_workers=1, or search.scheduler=asha or median"
        )
    grace = min(config.grace_epochs, epochs)
    if config.scheduler == "asha":
        factor = config.reduction_factor
        return RememberingAsha(trials, **aim, max_t=epochs, grace_period=grace, reduction_factor=factor)
    if config.scheduler == "median":
        samples = {"min_samples_required": ENOUGH_TRIALS, "min_time_slice": epochs}
        return RememberingMedian(trials, **aim, grace_period=grace, **samples)
    if config.scheduler == "hyperband":
        return ContinuingHyperBand(**aim, max_t=epochs, reduction_factor=config.reduction_factor)
    if config.scheduler == "pbt":
        return _population(config, run, space, aim)
    return FIFOScheduler()


def rungs(config: SearchConfig, epochs: int) -> list[float]:
    """Epochs at which ASHA compares trials, the last one left out; empty for other schedulers."""
    found, rung = [], float(min(config.grace_epochs, epochs))
    while config.scheduler == "asha" and rung < epochs:
        found.append(rung)
        rung *= config.reduction_factor
    return found


def _population(config: SearchConfig, run: RunConfig, space: Space, aim: dict[str, Any]) -> FairPopulation:
    """Population based training over all settings of the space."""
    require_changeable(run, space)
    mutations = {d.path: list(d.values) if d.kind == CHOICE else d.draw for d in space.dimensions}
    return FairPopulation(
        **aim,
        perturbation_interval=config.pbt.interval,
        quantile_fraction=config.pbt.quantile,
        resample_probability=config.pbt.resample,
        hyperparam_mutations={CELL: mutations},
        custom_explore_fn=partial(_inside, space=space),
        log_config=False,  # a trial's own record holds its schedule
    )


def _inside(config: dict[str, Any], space: Space) -> dict[str, Any]:
    """A perturbed configuration, brought back to where it left the space."""
    return {CELL: space.fit(config[CELL])}


def require_changeable(run: RunConfig, space: Space) -> None:
    """Refuses a space that population based training cannot change while trials train.

    Raises:
        UserError: a fixed setting, a condition, or a weight that would switch a term on or off.
    """
    allowed = changeable(run.train.method)
    if run.train.schedule:
        raise UserError("search.scheduler=pbt makes a schedule of its own; leave train.schedule empty")
    for dimension in space.dimensions:
        where = f"search.scheduler=pbt: {dimension.path}"
        if dimension.path not in allowed:
            raise UserError(f"{where} cannot change while {run.train.method} trains; what can: {', '.join(allowed)}")
        if dimension.when:
            raise UserError(f"{where} has a condition; every setting must be there in every trial")
        if dimension.path in WEIGHTS and 0 in dimension.edges():
            raise UserError(f"{where} may be 0, which switches its term off for good; begin above 0")
