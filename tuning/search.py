"""A search on Ray Tune: trials, early stopping, resumption, and what a search leaves behind."""

import json
import logging
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from pyarrow import fs
from ray import tune
from ray.tune import Callback, Stopper
from ray.tune.execution import class_cache

from mpc.config import NO_FILE
from mpc.errors import MissingError, UserError
from pipeline import runtime, storage
from pipeline.card import DatasetCard, read_card
from pipeline.config import RunConfig
from pipeline.record import RUN_FILE, claim
from pipeline.scoring import require_validation
from pipeline.setup import located, make_model
from tuning.budget import Hours
from tuning.config import SearchConfig
from tuning.domains import Space
from tuning.follow import STATE, TRIALS, Follow, SearchListener, followed, name_of
from tuning.interruption import interruptible
from tuning.journal import Journal
from tuning.keeping import Keep
from tuning.outcome import Conclusion, SearchResult, identity
from tuning.resources import POPULATIONS, Plan, asked, cluster, plan
from tuning.schedulers import make_scheduler
from tuning.searchers import Beginning, Known, Proposals, make_proposals
from tuning.trial import run_trial

log = logging.getLogger(__name__)

BEGINNING_FILE = "warm_start.json"

# Tune would hand this process's AWS credentials to its trials, and Ray logs what is handed on. Workers have their own:
# the same environment on one machine, their pod's or instance's elsewhere.
class_cache.ENV_VARS_TO_PROPAGATE = {name for name in class_cache.ENV_VARS_TO_PROPAGATE if not name.startswith("AWS_")}


def search(
    run: RunConfig,
    config: SearchConfig,
    space: Space,
    data: str,
    out: str,
    *,
    resume: bool = False,
    beginning: Beginning = Beginning(),  # noqa: B008, immutable
    listeners: Sequence[SearchListener] = (),
    callbacks: Callable[[], Sequence[Callback]] = tuple,
) -> SearchResult:
    """Searches `space` around `run`; leaves trials/, search.json, best.yaml and the best checkpoint as best/.

    Args:
        run: what every trial shares.
        config: searcher, scheduler, budgets.
        space: what varies.
        data: URI of a prepared data set.
        out: folder or s3:// prefix of this search; its identity.
        resume: continue what lies there, if only that it was begun; finished trials are not run again. Tune's own state
            is a pickle: resume only from storage that you trust as you trust code.
        beginning: what earlier searches found; a resumed search has it already.
        listeners: who follows, from this process.
        callbacks: makes Tune callbacks, such as the one that logs to MLflow, once nothing is left to refuse; they must
            pickle.

    Raises:
        UserError: settings that do not fit the cluster or the data; nothing to resume; no trial that ended well.
        KeyboardInterrupt: Ctrl-C; the search can be resumed.
    """
    run, data, out = located(run), storage.absolute(data), storage.absolute(out)
    if resume and not storage.exists(storage.join(out, RUN_FILE)):
        raise MissingError(f"--out {out} holds no search to resume; start it without --resume")
    card = read_card(data)
    check(run, config, space, card, out)
    runtime.start(dashboard=run.train.num_workers > 1)
    placed = plan(run, config, cluster())
    make_proposals(config, space, placed.concurrent)
    claim(out, identity(run, config, space, card), resume=resume)
    for note in placed.notes:
        log.warning(note)
    work = Work(run, config, space, card, data, out, placed)
    following, noted = callbacks(), begun(out) if resume else 0
    if noted:
        tuner = restored(work.trainable(), out)
    else:
        _note(out, beginning)
        tuner = work.tuner(beginning.known, [*work.callbacks(), *following])
    random.seed(config.seed)  # population based training draws from it
    with followed(listeners, resumed=noted), interruptible():
        grid = tuner.fit()
    return Conclusion(run, config, space, card, out).write(grid, json.loads(storage.read_bytes(_noted(out))))


def check(run: RunConfig, config: SearchConfig, space: Space, card: DatasetCard, out: str) -> None:
    """Refuses what no search could do, on whatever cluster.

    Raises:
        UserError: settings that do not fit each other or the data, or a network that cannot be built.
    """
    if run.train.min_workers is not None:
        raise UserError("train.min_workers: trials keep their number of workers; unset it and set train.num_workers")
    if run.train.num_workers > 1 and config.metric != f"val_{run.train.metric}":
        raise UserError(
            f"search.metric={config.metric} is not train.metric={run.train.metric}, by which a trial with several "
            f"workers keeps its best checkpoint; set both alike, or train.num_workers=1"
        )
    for dimension in space.dimensions:
        for value in dimension.values if dimension.path == "model.weights" else ():
            if value not in NO_FILE and storage.absolute(value) != value:
                raise UserError(f"space: model.weights {value}: trials work in other folders; write the whole path")
    require_validation(card, run.data.val_labels)
    make_model(run, card)
    make_scheduler(config, run, space, storage.join(out, TRIALS))


@dataclass(frozen=True)
class Work:
    """A search in Ray Tune's terms."""

    run: RunConfig
    config: SearchConfig
    space: Space
    card: DatasetCard
    data: str
    out: str
    placed: Plan

    def trainable(self) -> Any:
        """What a trial runs, with what it asks for."""
        function = partial(
            run_trial,
            base=self.run.model_dump(mode="json"),
            search=self.config.model_dump(mode="json"),
            data=self.data,
            out=self.out,
        )
        return tune.with_resources(function, asked(self.run, self.placed.concurrent))

    @property
    def trials(self) -> str:
        """The folder with one folder a trial."""
        return storage.join(self.out, TRIALS)

    def callbacks(self) -> list[Callback]:
        """Who follows in any case."""
        epochs, state = self.run.train.epochs, storage.join(self.out, STATE)
        return [Follow(epochs), Journal(self.trials, epochs), Keep(self.config, state, self.trials)]

    def tuner(self, known: Sequence[Known], callbacks: Sequence[Callback]) -> tune.Tuner:
        """A tuner that begins."""
        proposals = make_proposals(self.config, self.space, self.placed.concurrent, known)
        # what is kept is decided by `Keep`: by Tune's own count, a population would lose what it goes on from
        checkpoints = tune.CheckpointConfig(
            checkpoint_score_attribute=self.config.metric, checkpoint_score_order=self.config.mode
        )
        return fresh(
            self.trainable(),
            proposals.param_space,
            self.out,
            self._tune_config(proposals),
            checkpoints,
            callbacks,
            failures=self.run.train.max_failures,
            stop=Hours(self.config.max_hours, self.out),
        )

    def _tune_config(self, proposals: Proposals) -> tune.TuneConfig:
        limited = self.config.scheduler not in POPULATIONS
        return tune.TuneConfig(
            search_alg=proposals.algorithm,
            scheduler=make_scheduler(self.config, self.run, self.space, self.trials),
            num_samples=proposals.samples,
            max_concurrent_trials=self.placed.concurrent if limited else None,
            reuse_actors=self.run.train.num_workers == 1,
            trial_dirname_creator=name_of,
        )


def fresh(
    trainable: Any,
    param_space: dict[str, Any],
    out: str,
    config: tune.TuneConfig,
    checkpoints: tune.CheckpointConfig,
    callbacks: Sequence[Callback],
    *,
    failures: int = 0,
    stop: Stopper | None = None,
) -> tune.Tuner:
    """A tuner whose state lies in `out`, silent but for its callbacks.

    Args:
        trainable: what a trial runs.
        param_space: what Tune itself draws.
        out: folder of the search.
        config: searcher and scheduler.
        checkpoints: which ones Tune keeps.
        callbacks: who follows.
        failures: how often a trial that failed, or whose machine was lost, goes on from its last checkpoint.
        stop: ends the search.
    """
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
            failure_config=tune.FailureConfig(max_failures=failures),
            stop=stop,
            callbacks=list(callbacks),
            verbose=0,
        ),
    )


def begun(out: str) -> int:
    """How many trials Tune has noted below `out`; of none, a search that was killed has only been claimed.

    Raises:
        UserError: the newest note is cut short.
    """
    filesystem, path = storage.resolve(storage.join(out, STATE))
    entries = filesystem.get_file_info(fs.FileSelector(path, allow_not_found=True))
    notes = sorted(entry.base_name for entry in entries if entry.base_name.startswith("experiment_state-"))
    if not notes:
        return 0
    newest = storage.join(out, STATE, notes[-1])
    try:
        return len(json.loads(storage.read_bytes(newest))["trial_data"])
    except ValueError as error:
        raise UserError(
            f"{newest}: is cut short (a full disk?), and Tune cannot go on from it; delete it to go on from an older "
            f"one beside it, or search anew in another --out"
        ) from error


def restored(trainable: Any, out: str) -> tune.Tuner:
    """The search that lies in `out`; `followed` sees whether Tune could read it.

    A trial that had failed goes on under its own id: under a new one, the searcher would not know it.
    """
    return tune.Tuner.restore(trainable=trainable, resume_unfinished=True, resume_errored=True, **_state(out))


def _state(out: str) -> dict[str, Any]:
    """Where Tune's state lies, in Tune's terms."""
    filesystem, path = storage.resolve(storage.join(out, STATE))
    return {"path": path, "storage_filesystem": filesystem if storage.is_remote(out) else None}


def _noted(out: str) -> str:
    return storage.join(out, BEGINNING_FILE)


def _note(out: str, beginning: Beginning) -> None:
    """What the search begins with, for search.json at its end."""
    used = [{"settings": trial.settings, "value": trial.value} for trial in beginning.known]
    storage.write_bytes(
        _noted(out), json.dumps({"used": used, "left_out": list(beginning.left_out)}, indent=1).encode()
    )
