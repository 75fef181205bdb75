"""Verbs that train: train, tune, and sync of their records."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated

import typer

from infra.cli.options import (
    Config,
    Data,
    DryRun,
    Out,
    Resume,
    Set,
    Verbose,
    claim,
    fetch,
    settings_of,
    start_ray,
)
from infra.console import progress, say, table
from infra.settings import Settings, run_config
from infra.tracking import tracking_uri

if TYPE_CHECKING:
    from tuning.config import SearchConfig
    from tuning.outcome import SearchResult

Space = Annotated[
    str,
    typer.Option(
        "--space", metavar="NAME|FILE", help="What is searched: a shipped space, or YAML over dotted settings."
    ),
]


def add_to(app: typer.Typer) -> None:
    """Adds the verbs of this file."""
    app.command(
        epilog="Example: mpc-cxr train --data /data/nih-224 --out runs/mpc-1 --config mpc --set train.epochs=8"
    )(train)
    app.command(
        epilog="Example: mpc-cxr tune --data /data/nih-224 --out runs/search-1 --config mpc --set search.max_trials=40"
    )(tune)
    app.command(epilog="Example: mpc-cxr sync --out runs/search-1 --set tracking.uri=http://mlflow:5000")(sync)


def train(
    data: Data,
    out: Out,
    config: Config = None,
    set_: Set = None,
    resume: Resume = False,
    dry_run: DryRun = False,
    verbose: Verbose = False,
) -> None:
    """Trains one model on a prepared data set; every epoch is validated, checkpointed and recorded in MLflow.

    Lengths are epochs, the batch size is images over all workers, rates are per image set as configured.
    """
    settings = settings_of(config, set_, verbose)
    claim(out, resume)
    if dry_run:
        show_plan(settings, data, out)
        return
    from infra.listeners import EpochLines
    from pipeline.follow import Listener
    from pipeline.reference import attach
    from pipeline.train import train as fit
    from tuning.listeners import RunListener
    from tuning.tracking import Tracker

    tracker = Tracker(tracking_uri(settings, out), settings.tracking.experiment)
    start_ray(verbose)
    with progress("train", seconds=0.0) as display:  # a line for every train.log_every steps
        listeners: list[Listener] = [EpochLines(display), RunListener(tracker, out)]
        result = fit(run_config(settings), data, out, resume=resume, listeners=listeners)
    tracker.close()
    attach(result.best_checkpoint, data, settings.reference)
    metric = f"val_{settings.train.metric}"
    say(f"best epoch {result.metrics['epoch']:g} of {settings.train.epochs}: {metric} {result.metrics[metric]:.4f}")
    say(f"best checkpoint: {result.best_checkpoint}")


def show_plan(settings: Settings, data: str, out: str) -> None:
    """What a run would do, from the settings and the dataset card alone."""
    from pipeline.card import read_card

    card = read_card(data)
    images, run = len(card.rows("train")), settings.train
    steps, least = images // run.batch_size, run.least_workers
    workers = f"{run.num_workers}" if least == run.num_workers else f"{least} to {run.num_workers}"
    say(
        f"would train {settings.model.backbone} with {run.method} for {run.epochs} epochs of {steps:,} steps, "
        f"{run.batch_size} images each over {workers} workers, on {images:,} images of {card.name} into {out}"
    )


def tune(
    data: Data,
    out: Out,
    space: Space = "mpc",
    config: Config = None,
    set_: Set = None,
    resume: Resume = False,
    dry_run: DryRun = False,
    verbose: Verbose = False,
) -> None:
    """Searches settings on a prepared data set; each trial is a run, trials that fall behind are stopped early.

    Budgets are settings: search.max_trials, search.max_hours, train.epochs. Only resume from storage that you trust
    as you trust code: Ray Tune keeps its own state as a pickle.
    """
    settings = settings_of(config, set_, verbose)
    claim(out, resume)
    from tuning.space import load

    found = load(space, run_config(settings))
    if dry_run:
        from infra.planning import show_search

        show_plan(settings, data, out)
        show_search(settings, found, data, out, tracking_uri(settings, out))
        return
    from infra.searching import report, search
    from pipeline import storage
    from tuning.outcome import RUN_FILE

    with progress("tune") as display:
        result = search(settings, found, data, out, tracking_uri(settings, out), display, resume, verbose)
    show_trials(result, settings.search)
    say(f"best checkpoint: {result.best_checkpoint}")
    say(f"its settings, for train --config: {storage.join(out, RUN_FILE)}")
    say(f"what was found: {report(settings, fetch(result.best_checkpoint), data, out)}")


def show_trials(result: "SearchResult", config: "SearchConfig") -> None:
    """The trials with what they tried, the best one first."""
    key = lambda trial: (trial.value is None, -config.sign * (trial.value or 0.0), trial.trial_id)  # noqa: E731
    ranked = sorted(result.trials, key=key)
    table(
        f"{len(ranked)} trials, best first",
        ["trial", "status", "epochs", config.metric, "settings"],
        [
            [trial.trial_id, trial.status, trial.epochs, _rounded(trial.value), _settings(trial.params)]
            for trial in ranked
        ],
    )


def _settings(params: Mapping[str, object]) -> str:
    """What a trial tried, in one text that may wrap."""
    return ", ".join(f"{name.partition('.')[2]} {_rounded(value)}" for name, value in sorted(params.items()))


def _rounded(value: object) -> object:
    """Floats with three significant digits; anything else as it is."""
    return f"{value:.3g}" if isinstance(value, float) else value


def sync(out: Out, config: Config = None, set_: Set = None, verbose: Verbose = False) -> None:
    """Replays the runs below --out to MLflow: what a server missed while it was away; what it has stays as it is."""
    settings = settings_of(config, set_, verbose)
    from tuning.sync import sync as replay

    summary = replay(out, tracking_uri(settings, out))
    say(f"{summary.runs} runs, {summary.epochs} epochs are in {summary.uri}")
