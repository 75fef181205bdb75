"""A search as a person starts it: on the screen, in MLflow as one parent run with a child a trial, and on disk."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import optuna

from infra.console import Display, say, table
from infra.evaluating import evaluate
from infra.listeners import TrialLines
from infra.settings import Settings, run_config
from pipeline import runtime, storage
from pipeline.card import read_card
from pipeline.reference import attach
from tuning import search as searches
from tuning.domains import Space
from tuning.follow import STATE, TRIALS
from tuning.listeners import MlflowCallback, close_run, data_tags, open_run
from tuning.outcome import SearchResult
from tuning.record import Status
from tuning.report import write_search
from tuning.searchers import Beginning
from tuning.tracking import Tracker
from tuning.warm import Target, earlier_trials


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
    resume = resume and storage.exists(storage.join(out, STATE))
    beginning = Beginning() if resume else begin(settings, space, data, tracking)
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
            resume=resume,
            beginning=beginning,
            listeners=[TrialLines(display, settings.search, run.train.epochs)],
            callbacks=[MlflowCallback(tracker, parent, storage.join(out, TRIALS), base=run, tags=tags)],
        )
        attach(result.best_checkpoint, data, settings.reference)
        status = Status.FINISHED
    except (KeyboardInterrupt, SystemExit):  # the latter is what Ray makes of SIGTERM
        status = Status.KILLED
        raise
    finally:
        close_run(tracker, out, parent, status)
        tracker.close()
    return result


def begin(settings: Settings, space: Space, data: str, tracking: str) -> Beginning:
    """The trials of `search.warm_start`, with a table of those that do not fit."""
    if not settings.search.warm_start:
        return Beginning()
    target = Target(run_config(settings), settings.search, space, read_card(data).digest)
    beginning = earlier_trials(tracking, settings.tracking.experiment, target)
    show_left_out(len(beginning.known), beginning.left_out)
    return beginning


def show_left_out(known: int, left_out: Sequence[Mapping[str, str]]) -> None:
    """How many earlier trials are used, and why the others are not."""
    rows = [[item["run"], item["reason"]] for item in left_out]
    say(f"search.warm_start: {known} earlier trials fit, {len(rows)} do not")
    if rows:
        table("earlier trials that do not fit", ["run", "reason"], rows)


def report(settings: Settings, checkpoint: Path, data: str, out: str) -> str:
    """Scores the best checkpoint on the validation split, with a report in val/; the place of search.html."""
    evaluate(settings, checkpoint, data, "val", storage.join(out, "val"), title="Best trial", search=out)
    return write_search(out)
