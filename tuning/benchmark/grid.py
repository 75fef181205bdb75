"""The cells of a stage as a grid on Ray Tune: in parallel on any cluster, continued where a killed run stopped."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from ray import tune
from ray.tune import Callback
from ray.tune.search import BasicVariantGenerator

from mpc.errors import UserError
from pipeline import storage
from pipeline.checkpoints import found_in
from pipeline.config import RunConfig
from tuning.benchmark.cells import Cell, run_cell
from tuning.config import SearchConfig
from tuning.follow import CELL, STATE, Follow, SearchListener, followed, name_of
from tuning.interruption import interruptible
from tuning.keeping import LATEST, delete_checkpoints, surviving
from tuning.resources import asked, cluster, plan
from tuning.search import begun, fresh, restored


class _Sweep(Callback):  # type: ignore[misc]
    """Deletes checkpoints that a cell will not go on from: a grid of hundreds would fill a disk.

    Their folders stay, empty, as those of a search do (`tuning.keeping.Keep`).

    Args:
        out: URI of the stage.
    """

    def __init__(self, out: str) -> None:
        self.state = storage.join(out, STATE)

    def on_trial_save(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A cell has written a checkpoint."""
        with surviving(f"old checkpoints of {name_of(trial)}"):
            newest = found_in(storage.join(self.state, name_of(trial)))[-LATEST:]
            delete_checkpoints(self.state, name_of(trial), [item.checkpoint.path for item in newest])

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A cell is done."""
        with surviving(f"checkpoints of {name_of(trial)}"):
            delete_checkpoints(self.state, name_of(trial))


def run_cells(
    cells: Sequence[Cell],
    methods: Mapping[str, RunConfig],
    out: str,
    *,
    metric: str,
    test: bool,
    concurrent: int | None = None,
    listeners: Sequence[SearchListener] = (),
    callbacks: Sequence[Callback] = (),
) -> dict[str, str]:
    """Runs every cell that is not done yet; each leaves `cells/NAME/metrics.jsonl` and, with `test`, its scores.

    Args:
        cells: of one stage.
        methods: configuration of every method.
        out: folder or s3:// prefix of the stage. Ray Tune keeps a pickle there: trust it as code.
        metric: validation metric that chooses the epoch.
        test: whether cells score the test split.
        concurrent: cells at a time; None takes what the cluster carries.
        listeners: who follows, from this process.
        callbacks: Tune callbacks, such as the one that logs to MLflow.

    Returns:
        Name and reason of every cell that failed.
    """
    out = storage.absolute(out)
    first = next(iter(methods.values()))
    config = SearchConfig(max_concurrent=concurrent, cpus_for_data=first.cpus_beside)
    limit = plan(first, config, cluster()).concurrent
    trainable = tune.with_resources(
        partial(
            run_cell,
            methods={name: run.model_dump(mode="json") for name, run in methods.items()},
            out=out,
            metric=metric,
            test=test,
        ),
        asked(first, limit),
    )
    param_space = {CELL: tune.grid_search([cell.params() for cell in cells])}
    resumed = begun(out)
    if resumed:
        tuner = restored(trainable, out)
    else:
        tuned = tune.TuneConfig(
            search_alg=BasicVariantGenerator(max_concurrent=limit),
            max_concurrent_trials=limit,
            reuse_actors=True,
            trial_dirname_creator=name_of,
        )
        following = [Follow(first.train.epochs), _Sweep(out), *callbacks]
        tuner = fresh(trainable, param_space, out, tuned, tune.CheckpointConfig(), following)
    with followed(listeners, resumed=resumed), interruptible():
        results = tuner.fit()
    return {str(r.config[CELL]["name"]): str(r.error).strip().splitlines()[-1][:300] for r in results if r.error}


def require_one_worker(methods: Mapping[str, RunConfig]) -> None:
    """Refuses cells of several workers: the grid is what runs in parallel.

    Raises:
        UserError: a method asks for more than one.
    """
    for name, run in methods.items():
        if run.train.num_workers > 1:
            raise UserError(
                f"methods.{name}: train.num_workers is {run.train.num_workers}; cells train on one, set it to 1"
            )
