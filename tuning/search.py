"""A search on Ray Tune: trials, early stopping, resumption, and what a search leaves behind."""

from collections.abc import Sequence
from functools import partial
from typing import Any, Protocol

import ray
from ray import tune
from ray.tune import Callback
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler
from ray.tune.search import BasicVariantGenerator, SearchAlgorithm, Searcher
from ray.tune.search.optuna import OptunaSearch

from mpc.errors import MissingError, UserError
from pipeline import runtime, storage
from pipeline.card import read_card
from pipeline.config import RunConfig
from pipeline.record import claim
from pipeline.scoring import require_validation
from tuning.config import SearchConfig
from tuning.outcome import TRIALS, SearchResult, conclude, identity
from tuning.space import Space
from tuning.trial import run_trial

STATE = "tune"


class SearchListener(Protocol):
    """Someone who follows a search from the driver."""

    def on_trial_start(self, trial_id: str, params: dict[str, Any]) -> None:
        """A trial begins, or goes on after a resume."""
        ...

    def on_trial_epoch(self, trial_id: str, metrics: dict[str, Any]) -> None:
        """A trial finished an epoch."""
        ...

    def on_trial_end(self, trial_id: str, status: str) -> None:
        """`finished`, `stopped` (early, by the scheduler) or `failed`."""
        ...


_listeners: list[SearchListener] = []  # of this process's search: Tune pickles callbacks, displays are not picklable


class _Follow(Callback):  # type: ignore[misc]
    """Tells the listeners of this process what happens."""

    def __init__(self, epochs: int) -> None:
        self.epochs = epochs

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        for listener in _listeners:
            listener.on_trial_start(trial.trial_id, trial.config)

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        for listener in _listeners:
            listener.on_trial_epoch(trial.trial_id, result)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        done = trial.last_result.get("epoch", 0) >= self.epochs
        for listener in _listeners:
            listener.on_trial_end(trial.trial_id, "finished" if done else "stopped")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        for listener in _listeners:
            listener.on_trial_end(trial.trial_id, "failed")


def search(
    run: RunConfig,
    config: SearchConfig,
    space: Space,
    data: str,
    out: str,
    *,
    resume: bool = False,
    listeners: Sequence[SearchListener] = (),
    callbacks: Sequence[Callback] = (),
) -> SearchResult:
    """Searches `space` around `run`; leaves trials/, search.json and the best checkpoint as best/.

    Args:
        run: what every trial shares.
        config: searcher, scheduler, budgets.
        space: what varies.
        data: URI of a prepared data set.
        out: folder or s3:// prefix of this search; its identity.
        resume: continue what lies there; finished trials are not run again. Tune's own state is a pickle: resume only
            from storage that you trust as you trust code.
        listeners: who follows, from this process.
        callbacks: Tune callbacks, such as the one that logs to MLflow; they must pickle.

    Raises:
        UserError: settings that do not fit the cluster or the data; nothing to resume; no trial that ended well.
    """
    data, out = storage.absolute(data), storage.absolute(out)
    card = read_card(data)
    require_validation(card)
    runtime.start(dashboard=run.train.num_workers > 1)
    claim(out, identity(run, config, space, card), resume=resume)
    concurrent = concurrency(run, config, ray.cluster_resources())
    _listeners[:] = listeners
    trainable = tune.with_resources(
        partial(run_trial, base=run.model_dump(mode="json"), data=data, out=storage.join(out, TRIALS)),
        trial_resources(run),
    )
    tuner = _restored(trainable, space, out) if resume else None
    if tuner is None:
        tuner = _fresh(trainable, run, config, space, out, concurrent, callbacks)
    try:
        grid = tuner.fit()
    finally:
        _listeners.clear()
    return conclude(grid, run, config, space, card, out)


def trial_resources(run: RunConfig) -> dict[str, float]:
    """What a trial asks of Ray: its worker's CPUs and GPU, or, with several workers, nothing but its driver."""
    if run.train.num_workers > 1:
        return {"CPU": 0.01}
    return {"CPU": run.train.worker_cpus, **({"GPU": 1.0} if run.train.use_gpu else {})}


def concurrency(run: RunConfig, config: SearchConfig, resources: dict[str, float]) -> int:
    """Trials at a time, such that reading tasks always find a CPU: a search that takes every CPU would wait for ever.

    Raises:
        UserError: not even one trial fits beside `search.cpus_for_data`.
    """
    cpus, gpus = resources.get("CPU", 0.0), resources.get("GPU", 0.0)
    a_trial = run.train.num_workers * run.train.worker_cpus
    fits = int((cpus - config.cpus_for_data) / a_trial + 1e-9)
    if run.train.use_gpu:
        fits = min(fits, int(gpus / run.train.num_workers))
    if fits < 1:
        raise UserError(
            f"a trial needs {a_trial:g} CPUs{' and a GPU' if run.train.use_gpu else ''} beside "
            f"{config.cpus_for_data:g} CPUs for data, the cluster has {cpus:g} CPUs and {gpus:g} GPUs; "
            f"lower train.num_workers, train.worker_cpus or search.cpus_for_data"
        )
    return min(fits, config.max_concurrent or fits)


def _fresh(
    trainable: Any,
    run: RunConfig,
    config: SearchConfig,
    space: Space,
    out: str,
    concurrent: int,
    callbacks: Sequence[Callback],
) -> tune.Tuner:
    filesystem, path = storage.resolve(out)
    return tune.Tuner(
        trainable,
        param_space=space.param_space(),
        tune_config=tune.TuneConfig(
            metric=config.metric,
            mode=config.mode,
            search_alg=_searcher(config, concurrent),
            scheduler=_scheduler(config, run.train.epochs),
            num_samples=config.max_trials,
            max_concurrent_trials=concurrent,
            time_budget_s=config.max_hours * 3600 if config.max_hours else None,
            reuse_actors=run.train.num_workers == 1,
            trial_dirname_creator=_folder,
        ),
        run_config=tune.RunConfig(
            name=STATE,
            storage_path=path,
            storage_filesystem=filesystem if storage.is_remote(out) else None,
            # the best ones and the latest; more than one, because after a kill Tune's state may name an older one
            checkpoint_config=tune.CheckpointConfig(
                num_to_keep=3, checkpoint_score_attribute=config.metric, checkpoint_score_order=config.mode
            ),
            callbacks=[_Follow(run.train.epochs), *callbacks],
            verbose=0,
        ),
    )


def _folder(trial: Any) -> str:
    """A trial's folder carries its id, in Tune's state as in trials/."""
    return str(trial.trial_id)


def _restored(trainable: Any, space: Space, out: str) -> tune.Tuner | None:
    """The search that lies in `out`; None where it was killed before Tune had written anything."""
    filesystem, path = storage.resolve(storage.join(out, STATE))
    if not storage.exists(storage.join(out, STATE)):
        raise MissingError(f"--out {out} holds no search to resume; start it without --resume")
    remote = filesystem if storage.is_remote(out) else None
    if not tune.Tuner.can_restore(path, storage_filesystem=remote):
        return None
    return tune.Tuner.restore(
        path,
        trainable,
        resume_unfinished=True,
        restart_errored=True,
        param_space=space.param_space(),
        storage_filesystem=remote,
    )


def _searcher(config: SearchConfig, concurrent: int) -> Searcher | SearchAlgorithm:
    if config.searcher == "random":
        # max_concurrent_trials of TuneConfig does not reach this one
        return BasicVariantGenerator(max_concurrent=concurrent, random_state=config.seed)
    import optuna
    from optuna.samplers import TPESampler

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    sampler = TPESampler(multivariate=True, seed=config.seed, n_startup_trials=min(10, max(3, config.max_trials // 3)))
    return OptunaSearch(metric=config.metric, mode=config.mode, sampler=sampler)


def _scheduler(config: SearchConfig, epochs: int) -> TrialScheduler:
    if config.scheduler == "none":
        return FIFOScheduler()
    return ASHAScheduler(
        time_attr="epoch",  # our own count: Tune's training_iteration starts anew after a restore
        max_t=epochs,
        grace_period=min(config.grace_epochs, epochs),
        reduction_factor=config.reduction_factor,
    )
