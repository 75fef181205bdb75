"""What a search would do, from settings, data and cluster, before anything is written: `tune --dry-run`."""

import os
from collections.abc import Iterator

from infra.console import say, table
from infra.searching import begin
from infra.settings import Settings, run_config
from pipeline import runtime
from pipeline.card import read_card
from tuning.domains import Space
from tuning.estimate import Forecast, forecast, pace
from tuning.resources import Node, Plan, cluster, plan
from tuning.search import check
from tuning.searchers import make_proposals


def show_search(settings: Settings, space: Space, data: str, out: str, tracking: str) -> None:
    """Prints the space, the trials with what they ask for, and how long it may take.

    Raises:
        UserError: what `tune` would refuse.
    """
    run, config, card = run_config(settings), settings.search, read_card(data)
    check(run, config, space, card, out)
    placed = plan(run, config, machines())
    beginning = begin(settings, space, data, tracking)
    make_proposals(config, space, placed.concurrent, beginning.known)
    trials = sum(1 for _ in space.grid()) if config.searcher == "grid" else config.max_trials
    epoch = pace(run, data, card, out)
    table("the space", ["setting", "values"], space.describe())
    table(
        "the search", ["what", "how"], _rows(settings, placed, forecast(config, run, trials, placed.concurrent, epoch))
    )
    say(f"an epoch takes about {epoch.seconds:.3g} s: {epoch.source}")
    for note in placed.notes:
        say(note)


def machines() -> list[Node]:
    """Those of the cluster at RAY_ADDRESS; without one, this machine, whose cluster starts with the search."""
    if os.environ.get("RAY_ADDRESS"):
        runtime.start()
        return cluster()
    import torch

    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return [{"CPU": float(cpus), "GPU": float(torch.cuda.device_count())}]


def _rows(settings: Settings, placed: Plan, forecast: Forecast) -> Iterator[list[object]]:
    """What the search is, and what it asks for."""
    train, config = settings.train, settings.search
    yield ["searcher, scheduler", f"{config.searcher}, {config.scheduler}"]
    yield ["trials", f"{forecast.trials}, {placed.concurrent} at a time"]
    gpus = f" and {settings.worker_gpus:g} GPU" if settings.worker_gpus else ""
    workers = f"{train.num_workers} workers with " if train.num_workers > 1 else ""
    yield ["a trial asks for", f"{workers}{settings.worker_cpus:g} CPUs{gpus}; {placed.cpus_for_data:g} CPUs stay free"]
    yield ["epochs", f"{train.epochs} a trial, at most {forecast.epochs_at_most:,}"]
    if forecast.epochs_expected < forecast.epochs_at_most:
        yield ["epochs with early stopping", f"about {forecast.epochs_expected:,.0f}"]
    yield ["time", f"about {_hours(forecast.hours_expected)}, at most about {_hours(forecast.hours_at_most)}"]
    yield ["checkpoints kept", f"of the best {config.keep_trials} trials"]


def _hours(hours: float) -> str:
    """Hours, or minutes where these say more."""
    return f"{hours:.1f} h" if hours >= 1 else f"{60 * hours:.1f} min"
