"""A search as a person starts it: on the screen, in MLflow as one parent run with a child a trial, and on disk."""

from pathlib import Path

import optuna

from infra.console import Display
from infra.evaluating import evaluate
from infra.listeners import TrialLines
from infra.settings import Settings, run_config
from pipeline import runtime, storage
from pipeline.card import read_card
from tuning import search as searches
from tuning.listeners import MlflowCallback, close_run, data_tags, open_run
from tuning.outcome import TRIALS, SearchResult
from tuning.record import Status
from tuning.space import Space
from tuning.tracking import Tracker


def search(
    settings: Settings,
    space: Space,
    data: str,
    out: str,
    tracking: str,
    display: Display,
    resume: bool = False,
    verbose: bool = False,
) -> SearchResult:
    """Searches `space` around the run of `settings`, followed by `display` and MLflow.

    Args:
        settings: run, search and tracking.
        space: what varies.
        data: URI of a prepared data set.
        out: folder or s3:// prefix of the search.
        tracking: URI of the tracking store.
        display: moves with the trials.
        resume: continue what `out` holds, or start where it holds nothing.
        verbose: show Ray's logs.
    """
    run = run_config(settings)
    tags = {**data_tags(read_card(data)), "searcher": settings.search.searcher, "scheduler": settings.search.scheduler}
    tracker = Tracker(tracking, settings.tracking.experiment)
    config = {**run.model_dump(mode="json"), "search": settings.search.model_dump(mode="json")}
    parent = open_run(tracker, out, storage.name(out), config=config, tags=tags)
    optuna.logging.set_verbosity(optuna.logging.INFO if verbose else optuna.logging.ERROR)
    if verbose:
        runtime.start(dashboard=run.train.num_workers > 1, verbose=True)
    status = Status.FAILED
    try:
        result = searches.search(
            run,
            settings.search,
            space,
            data,
            out,
            resume=resume and storage.exists(storage.join(out, searches.STATE)),
            listeners=[TrialLines(display, settings.search, run.train.epochs)],
            callbacks=[MlflowCallback(tracker, parent, storage.join(out, TRIALS), base=run, tags=tags)],
        )
        status = Status.FINISHED
    finally:
        close_run(tracker, out, parent, status)
        tracker.close()
    return result


def report(settings: Settings, checkpoint: Path, data: str, out: str) -> str:
    """Scores the best checkpoint on the validation split, writes search.html into `out` and gives its place."""
    scores, page = storage.join(out, "val"), storage.join(out, "search.html")
    evaluate(settings, checkpoint, data, "val", scores, title="Search", report=page, search=out)
    return page
