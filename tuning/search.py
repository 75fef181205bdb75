"""A search on Ray Tune: trials, early stopping, resumption, and what a search leaves behind."""

from collections.abc import Sequence
from functools import partial
from typing import Any

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
from tuning.follow import Follow, SearchListener, followed, name_of
from tuning.outcome import TRIALS, SearchResult, conclude, identity
from tuning.space import Space
from tuning.trial import run_trial

STATE = "tune"


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
    if run.train.min_workers is not None:
        raise UserError("train.min_workers: trials keep their number of workers; unset it and set train.num_workers")
    data, out = storage.absolute(data), storage.absolute(out)
    card = read_card(data)
    require_validation(card, run.data.val_labels)
    runtime.start(dashboard=run.train.num_workers > 1)
    claim(out, identity(run, config, space, card), resume=resume)
    concurrent = concurrency(run, config, ray.cluster_resources())
    trainable = tune.with_resources(
        partial(run_trial, base=run.model_dump(mode="json"), data=data, out=storage.join(out, TRIALS)),
        trial_resources(run),
    )
    tuner = restored(trainable, space.param_space(), out) if resume else None
    if tuner is None:
        # the best ones and the latest; more than one, because after a kill Tune's state may name an older one
        kept = tune.CheckpointConfig(
            num_to_keep=3, checkpoint_score_attribute=config.metric, checkpoint_score_order=config.mode
        )
        following = [Follow(run.train.epochs), *callbacks]
        tuner = fresh(trainable, space.param_space(), out, _tune_config(run, config, concurrent), kept, following)
    with followed(listeners):
        grid = tuner.fit()
    return conclude(grid, run, config, space, card, out)


def trial_resources(run: RunConfig) -> dict[str, float]:
    """What a trial asks of Ray: its worker's CPUs and GPU, or, with several workers, nothing but its driver."""
    if run.train.num_workers > 1:
        return {"CPU": 0.01}
    return {"CPU": run.worker_cpus, **({"GPU": 1.0} if run.train.use_gpu else {})}


def concurrency(run: RunConfig, config: SearchConfig, resources: dict[str, float]) -> int:
    """Trials at a time, such that reading tasks always find a CPU: a search that takes every CPU would wait for ever.

    Raises:
        UserError: not even one trial fits beside `search.cpus_for_data`.
    """
    cpus, gpus = resources.get("CPU", 0.0), resources.get("GPU", 0.0)
    a_trial = run.train.num_workers * run.worker_cpus
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


def _tune_config(run: RunConfig, config: SearchConfig, concurrent: int) -> tune.TuneConfig:
    return tune.TuneConfig(
        metric=config.metric,
        mode=config.mode,
        search_alg=_searcher(config, concurrent),
        scheduler=_scheduler(config, run.train.epochs),
        num_samples=config.max_trials,
        max_concurrent_trials=concurrent,
        time_budget_s=config.max_hours * 3600 if config.max_hours else None,
        reuse_actors=run.train.num_workers == 1,
        trial_dirname_creator=name_of,
    )


def fresh(
    trainable: Any,
    param_space: dict[str, Any],
    out: str,
    config: tune.TuneConfig,
    checkpoints: tune.CheckpointConfig,
    callbacks: Sequence[Callback],
) -> tune.Tuner:
    """A tuner whose state lies in `out`, silent but for its callbacks."""
    filesystem, path = storage.resolve(out)
    return tune.Tuner(
        trainable,
        param_space=param_space,
        tune_config=config,
        run_config=tune.RunConfig(
            name=STATE,
            storage_path=path,
            storage_filesystem=filesystem if storage.is_remote(out) else None,
            checkpoint_config=checkpoints,
            callbacks=list(callbacks),
            verbose=0,
        ),
    )


def restored(trainable: Any, param_space: dict[str, Any], out: str) -> tune.Tuner | None:
    """The search that lies in `out`; None where it was killed before Tune had written anything.

    Raises:
        MissingError: nothing lies there.
    """
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
        param_space=param_space,
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
