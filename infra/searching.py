"""A search as a person starts it: on the screen, in MLflow as one parent run with a child a trial, and on disk."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from pathlib import Path

import optuna
from ray.tune import Callback

from infra.console import Display, say, table
from infra.evaluating import evaluate
from infra.listeners import TrialLines
from infra.settings import Settings, run_config
from pipeline import runtime, storage
from pipeline.card import read_card
from pipeline.record import RUN_FILE
from pipeline.reference import attach
from pipeline.setup import located
from tuning import search as searches
from tuning.domains import Space
from tuning.follow import TRIALS
from tuning.listeners import MlflowCallback, data_tags, opened
from tuning.outcome import SearchResult
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
    run, card, out = located(run_config(settings)), read_card(data), storage.absolute(out)
    tags = {**data_tags(card), "searcher": settings.search.searcher, "scheduler": settings.search.scheduler}
    config = {**run.model_dump(mode="json"), "search": settings.search.model_dump(mode="json")}
    resume = resume and storage.exists(storage.join(out, RUN_FILE))
    beginning = Beginning() if resume and searches.begun(out) else begin(settings, space, data, tracking)
    optuna.logging.set_verbosity(optuna.logging.INFO if verbose else optuna.logging.ERROR)
    if verbose:
        runtime.start(dashboard=run.train.num_workers > 1, verbose=True)
    with closing(Tracker(tracking, settings.tracking.experiment)) as tracker, ExitStack() as stack:

        def callbacks() -> list[Callback]:
            parent = stack.enter_context(opened(tracker, out, storage.name(out), config=config, tags=tags))
            return [MlflowCallback(tracker, parent, storage.join(out, TRIALS), base=run, tags=tags)]

        result = searches.search(
            run,
            settings.search,
            space,
            data,
            out,
            resume=resume,
            beginning=beginning,
            listeners=[TrialLines(display, settings.search, run.train.epochs)],
            callbacks=callbacks,
        )
        attach(result.best_checkpoint, data, settings.reference)
    return result


def begin(settings: Settings, space: Space, data: str, tracking: str) -> Beginning:
    """The trials of `search.warm_start`, with a table of those that do not fit."""
    if not settings.search.warm_start:
        return Beginning()
    target = Target(located(run_config(settings)), settings.search, space, read_card(data).digest)
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
