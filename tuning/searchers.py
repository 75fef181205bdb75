"""Who proposes settings: Optuna through Ray Tune, or, for grids and populations, a list of points."""

import warnings
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple

import optuna
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from ray import tune
from ray.tune.search import BasicVariantGenerator, SearchAlgorithm, Searcher
from ray.tune.search.optuna import OptunaSearch

from mpc.errors import UserError
from tuning.config import SearchConfig
from tuning.domains import Settings, Space
from tuning.follow import CELL
from tuning.resources import POPULATIONS

optuna.logging.set_verbosity(optuna.logging.WARNING)

VALUE, COST = "best_so_far", "cost"
"""Keys of a result that the searcher reads: the best value of the metric until then, and `search.cost`."""
STUDY = "optuna"
"""Ray's name of the study."""


class Known(NamedTuple):
    """A trial of an earlier search."""

    settings: Settings
    value: float
    """Best value of the metric."""
    cost: float | None = None


class Beginning(NamedTuple):
    """What earlier searches found for one that begins."""

    known: Sequence[Known] = ()
    left_out: Sequence[Mapping[str, str]] = ()
    """`run` and `reason` of every trial that does not fit."""


class Proposals(NamedTuple):
    """Where settings come from, in Ray Tune's terms."""

    algorithm: Searcher | SearchAlgorithm
    param_space: dict[str, Any]
    samples: int
    """How often `param_space` is drawn from."""


def make_proposals(config: SearchConfig, space: Space, concurrent: int, known: Sequence[Known] = ()) -> Proposals:
    """The searcher that `config` names.

    Args:
        config: of the search.
        space: what is searched.
        concurrent: trials at a time.
        known: trials of earlier searches: tpe and pareto learn from them, the others try their best settings first.

    Raises:
        UserError: a grid without end, or of more points than `search.max_trials`.
    """
    if config.searcher == "grid":
        points = list(islice(space.grid(), config.max_trials + 1))
        if len(points) > config.max_trials:
            raise UserError(
                f"the grid has more points than the {config.max_trials} that search.max_trials allows; raise it, or "
                f"thin the grid out"
            )
        limit = 0 if config.scheduler in POPULATIONS else concurrent
        return Proposals(BasicVariantGenerator(max_concurrent=limit), {CELL: tune.grid_search(points)}, 1)
    if config.scheduler == "pbt":
        points = population(config, space, known)
        return Proposals(BasicVariantGenerator(), {CELL: tune.grid_search(points)}, 1)
    return Proposals(_by_optuna(config, space, known), {}, config.max_trials)


def population(config: SearchConfig, space: Space, known: Sequence[Known] = ()) -> list[Settings]:
    """What the trials of a population begin with: the best earlier settings, then random ones."""
    study = optuna.create_study(sampler=RandomSampler(config.seed))
    first = best_points(config, known)
    return [*first, *(space.suggest(study.ask()) for _ in range(config.max_trials - len(first)))]


def best_points(config: SearchConfig, known: Sequence[Known]) -> list[Settings]:
    """The best earlier settings, each once; at most a quarter of the trials, so that something new is tried."""
    ranked = sorted(known, key=lambda trial: trial.value, reverse=config.mode == "max")
    different = {tuple(sorted(trial.settings.items())): trial.settings for trial in ranked}
    return list(different.values())[: max(1, config.max_trials // 4)]


class _FinalValues(OptunaSearch):  # type: ignore[misc]
    """Optuna without what trials report on their way: only its own pruners would read that, and Tune's schedulers stop.

    Ray counts these steps anew after a restore, and Optuna warns of each that it already knows.
    """

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Nothing to tell."""


def _by_optuna(config: SearchConfig, space: Space, known: Sequence[Known]) -> OptunaSearch:
    aims: dict[str, Any] = {"metric": VALUE, "mode": config.mode}
    if config.searcher == "pareto":
        aims = {"metric": [VALUE, COST], "mode": [config.mode, "min"]}
    study = optuna.storages.InMemoryStorage()
    _remember(config, space, known, study)
    return _FinalValues(space.suggest, sampler=_sampler(config, space), storage=study, study_name=STUDY, **aims)


def _sampler(config: SearchConfig, space: Space) -> BaseSampler:
    if config.searcher == "random":
        return RandomSampler(config.seed)
    startup = min(10, max(3, config.max_trials // 3))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # Optuna calls `group` experimental
        # settings under a condition are not in every trial: their groups are modelled apart
        return TPESampler(seed=config.seed, multivariate=True, group=space.conditional, n_startup_trials=startup)


def _remember(config: SearchConfig, space: Space, known: Sequence[Known], storage: optuna.storages.BaseStorage) -> None:
    """Puts earlier trials into the study: as observations for a sampler that learns, else as the first to try."""
    directions = ["minimize" if mode == "min" else "maximize" for mode in (config.mode, "min")]
    two = config.searcher == "pareto"
    study = optuna.create_study(storage=storage, study_name=STUDY, directions=directions[: 1 + two])
    if config.searcher == "random":
        for settings in best_points(config, known):
            study.enqueue_trial(settings)
        return
    domains = {dimension.path: dimension.distribution() for dimension in space.dimensions}
    for trial in known:
        study.add_trial(
            optuna.trial.create_trial(
                params=trial.settings,
                distributions={path: domains[path] for path in trial.settings},
                values=[trial.value, trial.cost] if two else [trial.value],
            )
        )
