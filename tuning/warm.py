"""Trials of earlier searches in MLflow as a beginning: what fits the space and the run, and why the rest does not."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from mlflow.entities import Run
from mlflow.tracking import MlflowClient

from mpc.errors import MissingError, UserError
from pipeline.config import RunConfig
from tuning.config import SearchConfig
from tuning.domains import CHOICE, Dimension, Settings, Space
from tuning.record import flatten, without_places
from tuning.searchers import Beginning, Known
from tuning.store import existing_client, explained
from tuning.tracking import PARENT_TAG

ANYWHERE = ("train.log_every", "train.keep", "train.max_failures", "train.eval_batch_size", "train.seed",
            "train.use_gpu", "train.gpus", "train.worker_cpus", "data.backend", "data.tasks",
            "data.task_cpus")  # fmt: skip
"""Settings that leave a trial's result comparable."""
OF_THE_RUN = ("model.", "views.", "loss.", "pseudo.", "btc.", "baseline.", "optim.", "data.", "train.")
AT_MOST = 1000
"""Trials of one search that are read."""


class Target(NamedTuple):
    """The search that begins."""

    run: RunConfig
    config: SearchConfig
    space: Space
    data_digest: str


class _Misfit(Exception):  # noqa: N818, no error: a reason
    """Why a trial is left out."""


def earlier_trials(uri: str, experiment: str, target: Target) -> Beginning:
    """Reads the trials of `search.warm_start` from MLflow, and makes nothing there.

    Raises:
        UserError: a search that is not there, whose name stands for several, or a server that does not answer.
    """
    with explained(uri, "search.warm_start"):
        client = existing_client(uri)
        searches = [_search(client, experiment, name) for name in target.config.warm_start]
        runs = [(search, run) for search in searches for run in _trials(client, search)]
        return _sorted_out(client, runs, target)


def _sorted_out(client: MlflowClient, runs: Sequence[tuple[Run, Run]], target: Target) -> Beginning:
    known, left_out = [], []
    for search, run in runs:
        try:
            known.append(_known(client, search, run, target))
        except _Misfit as reason:
            left_out.append({"run": run.info.run_id, "reason": str(reason)})
    return Beginning(known, left_out)


def _search(client: MlflowClient, experiment: str, name: str) -> Run:
    """A search by its run id or its name."""
    text, place = name.replace("'", ""), client.get_experiment_by_name(experiment)
    found = [
        run
        for key in ("attributes.run_id", "attributes.run_name")
        for run in client.search_runs([place.experiment_id] if place else [], f"{key} = '{text}'", max_results=10)
        if PARENT_TAG not in run.data.tags
    ]
    if not found:
        raise MissingError(f"search.warm_start: no search {name} in MLflow; give its name or the id of its run")
    if len(found) > 1:
        ids = ", ".join(run.info.run_id for run in found)
        raise UserError(f"search.warm_start: {len(found)} searches are called {name}; give one of the run ids {ids}")
    return found[0]


def _trials(client: MlflowClient, search: Run) -> list[Run]:
    key = f"tags.`{PARENT_TAG}` = '{search.info.run_id}'"
    return list(client.search_runs([search.info.experiment_id], key, max_results=AT_MOST))


def _known(client: MlflowClient, search: Run, run: Run, target: Target) -> Known:
    """A trial as an observation."""
    if run.info.status != "FINISHED":
        raise _Misfit(f"it is {run.info.status}")
    if search.data.tags.get("data.digest") != target.data_digest:
        raise _Misfit("it was trained on other data")
    params = {**search.data.params, **run.data.params}
    if params.get("search.scheduler") == "pbt":
        raise _Misfit("its settings changed while it trained")
    _require_same(params, target)
    history = client.get_metric_history(run.info.run_id, target.config.metric)
    if not history:
        raise _Misfit(f"it has no {target.config.metric}")
    best = (max if target.config.mode == "max" else min)(item.value for item in history)
    return Known(_settings(params, target.space), best, _cost(client, run, target.config))


def _require_same(params: Mapping[str, str], target: Target) -> None:
    """Refuses a trial that differs in what is not searched."""
    searched = {dimension.path for dimension in target.space.dimensions}
    now = flatten(target.run.model_dump(mode="json"))
    for path in sorted(params):
        if not path.startswith(OF_THE_RUN) or path in searched or path in ANYWHERE:
            continue
        if params[path] != now.get(path):
            raise _Misfit(f"{path} was {params[path]}, is {now.get(path)} here and is not searched")


def _settings(params: Mapping[str, str], space: Space) -> Settings:
    """The trial as a point of the space."""
    settings: Settings = {}
    for dimension in space.dimensions:
        if not dimension.active(settings):
            continue
        if dimension.path not in params:
            raise _Misfit(f"it does not say its {dimension.path}")
        settings[dimension.path] = _value(dimension, params[dimension.path])
    return settings


def _value(dimension: Dimension, text: str) -> Any:
    """MLflow's text as a value of the domain."""
    outside = _Misfit(f"{dimension.path} {text} lies outside {dimension.text()}")
    if dimension.kind == CHOICE:
        found = [value for value in dimension.values if str(without_places(value)) == text]
        if not found:
            raise outside
        return found[0]
    try:
        value = float(text)
    except ValueError:
        raise outside from None
    near = dimension.fit(value)
    if abs(near - value) > 1e-9 * max(1.0, abs(value)):
        raise outside
    return near


def _cost(client: MlflowClient, run: Run, config: SearchConfig) -> float | None:
    """What the trial cost, where the search asks; seconds of other machines do not compare."""
    if config.searcher != "pareto":
        return None
    history = client.get_metric_history(run.info.run_id, "cost")
    if not history or config.cost == "seconds":
        raise _Misfit(f"its cost in {config.cost} does not compare")
    return float(history[-1].value)
