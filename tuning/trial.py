"""One trial of a search: the training loop as a plain Tune function, or as a Ray Train job with several workers."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from ray import tune
from torch.utils.flop_counter import FlopCounterMode

from mpc.build import build_model
from mpc.checkpoint import read_info
from pipeline import storage
from pipeline.card import DatasetCard, read_card
from pipeline.checkpoints import found_in, opened, whole
from pipeline.config import RunConfig
from pipeline.dotted import flat
from pipeline.host import Host, Metrics
from pipeline.loop import Loop
from pipeline.record import MetricsLog
from pipeline.schedule import Change
from tuning import journal
from tuning.config import SearchConfig
from tuning.domains import Settings
from tuning.follow import CELL, STATE, TRIALS
from tuning.searchers import COST, VALUE
from tuning.space import apply

LEGS_FILE = "legs.json"
"""Of a trial under population based training: from where, and with which settings, it went on."""


class TuneHost(Host):
    """A trial of Ray Tune as host of the loop.

    Args:
        out: folder of this trial, for metrics.jsonl.
        state: folder of this trial with Tune.
        use_gpu: train on the GPU that the trial was given.
    """

    rank, world_size = 0, 1

    def __init__(self, out: str, state: str, *, use_gpu: bool) -> None:
        self.device = torch.device("cuda" if use_gpu else "cpu")
        self.out, self.metrics, self.state = out, MetricsLog(out), state
        self.unknown: tune.Checkpoint | None = None
        """What the trial goes on from although Tune did not name it."""

    @contextmanager
    def last_checkpoint(self) -> Iterator[Path | None]:
        """The trial's own checkpoint, after the search was resumed; or the one that it was told to go on from."""
        given = tune.get_checkpoint()
        start = newest(given, self.state)
        self.unknown = start if start is not given else None
        with opened(start) as folder:
            yield folder

    def report(self, metrics: Metrics, checkpoint: Path) -> None:
        """Writes the trial's record first: a stopped trial is killed inside `tune.report`."""
        self.unknown = None
        self.metrics.add(metrics)
        tune.report(metrics | self.told(), checkpoint=tune.Checkpoint.from_directory(checkpoint))

    def end(self) -> None:
        """Reports the last epoch of a trial that was through when the driver was killed, but not yet noted by Tune."""
        if self.unknown is None:
            return
        with TemporaryDirectory(prefix="mpc-cxr-") as folder:  # Tune may give the copy the very place of the original
            self.unknown.to_directory(folder)
            last = self.metrics.read()[-1]
            tune.report(last | self.told(), checkpoint=tune.Checkpoint.from_directory(folder))

    def told(self) -> Metrics:
        """What Ray Tune is told of an epoch beside its metrics."""
        return {}

    def log(self, line: Metrics) -> None:
        """Trials show their epochs only."""

    def leave(self, name: str, content: bytes) -> str:
        """A file in the trial's folder."""
        place = storage.join(self.out, name)
        storage.write_bytes(place, content)
        return place


def newest(given: tune.Checkpoint | None, state: str) -> tune.Checkpoint | None:
    """The checkpoint that Tune names, or, where it is gone or none, the newest one in the trial's own folder `state`.

    A killed driver had not noted the last ones, and may have noted one that is no longer kept.
    """
    if given is not None and whole(given):
        return given
    found = found_in(state)
    return found[-1].checkpoint if found else None


class SearchHost(TuneHost):
    """A trial that also says how good it is so far, and at which cost.

    Args:
        out: folder of this trial.
        state: folder of this trial with Tune.
        use_gpu: train on the GPU that the trial was given.
        search: names metric, mode and cost.
        mflops: of one image, where that is the cost.
    """

    def __init__(self, out: str, state: str, *, use_gpu: bool, search: SearchConfig, mflops: float | None) -> None:
        super().__init__(out, state, use_gpu=use_gpu)
        self.search, self.mflops = search, mflops

    def told(self) -> Metrics:
        """The best value of the metric until then and the cost, for the searcher."""
        return summary(self.metrics.read(), self.search, self.mflops)


def summary(history: list[Metrics], search: SearchConfig, mflops: float | None) -> dict[str, float]:
    """Best value and cost of a trial so far; without a value yet, only the cost."""
    values = [line[search.metric] for line in history if line.get(search.metric) is not None]
    seconds = sum(line["seconds"] for line in history) / max(1, len(history))
    best = {VALUE: max(values) if search.mode == "max" else min(values)} if values else {}
    return {**best, COST: seconds if mflops is None else mflops}


class _Forward:
    """Hands the epochs of a Ray Train job inside a trial to Tune.

    Args:
        out: folder of the trial.
        search: names metric, mode and cost.
        mflops: of one image, where that is the cost.
    """

    def __init__(self, out: str, search: SearchConfig, mflops: float | None) -> None:
        self.metrics, self.search, self.mflops = MetricsLog(out), search, mflops
        self.told = False

    def on_start(self, run: RunConfig, card: DatasetCard) -> None:
        """Nothing to do."""

    def on_log(self, line: Metrics) -> None:
        """Trials show their epochs only."""

    def on_epoch(self, metrics: Metrics) -> None:
        """Reports an epoch; the checkpoints stay with Ray Train."""
        self.told = True
        tune.report(metrics | summary(self.metrics.read(), self.search, self.mflops))

    def on_end(self, status: str, best_checkpoint: str | None) -> None:
        """Reports the last epoch of a job that was through when the driver was killed, but not yet noted by Tune."""
        if status == "FINISHED" and not self.told:
            self.on_epoch(self.metrics.read()[-1])


def run_trial(params: dict[str, Any], *, base: dict[str, Any], search: dict[str, Any], data: str, out: str) -> None:
    """Trains with `params`, dotted paths and values, over the configuration `base`.

    Args:
        params: what this trial tries, as Ray Tune carries it.
        base: configuration of a run, as JSON.
        search: configuration of the search, as JSON.
        data: URI of the prepared data set.
        out: folder of the search.
    """
    trial_id, config, card = tune.get_context().get_trial_id(), SearchConfig.model_validate(search), read_card(data)
    folder, state = (storage.join(out, part, trial_id) for part in (TRIALS, STATE))
    settings = params.get(CELL, params)
    run = apply(RunConfig.model_validate(base), settings, f"trial {trial_id}")
    # a trial reports and saves at the ends of epochs alone: the scheduler must find its metric in every report
    run = run.model_copy(update={"train": run.train.model_copy(update={"checkpoint_every": 0})})
    cost = mflops(run, card) if config.cost == "mflops" else None
    history = MetricsLog(folder).read()
    if history and journal.ended_well(journal.read(folder)):  # Tune had not noted it when its driver was killed
        tune.report(history[-1] | summary(history, config, cost))
        return
    if config.scheduler == "pbt":
        run = continued(run, settings, newest(tune.get_checkpoint(), state), folder)
    if run.train.num_workers > 1:
        from pipeline.train import train

        train(run, data, folder, resume=storage.exists(folder), listeners=[_Forward(folder, config, cost)])
        return
    host = SearchHost(folder, state, use_gpu=run.train.use_gpu, search=config, mflops=cost)
    Loop(run, data, card, host).fit()
    host.end()


def mflops(run: RunConfig, card: DatasetCard) -> float:
    """Millions of floating-point operations of one image's forward pass."""
    model = build_model(run, len(card.findings), card.pixels, weights="none").eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 1, card.image_size, card.image_size))
    return float(counter.get_total_flops()) / 1e6


def continued(run: RunConfig, settings: Settings, start: tune.Checkpoint | None, folder: str) -> RunConfig:
    """The run that goes on from `start` with `settings`: the past of that checkpoint, then a change.

    A checkpoint carries its run with all changes until then, so that lineages need no other book.

    Args:
        run: what the settings alone make.
        settings: of now.
        start: the trial's own checkpoint, or that of the trial that it takes the weights of.
        folder: of this trial; the leg is noted there.
    """
    epoch, donor = 0, None
    if start is not None:
        donor = Path(start.path).parent.name
        with opened(start) as place:
            assert place is not None
            info = read_info(place)
        epoch, past = round(info.epoch), RunConfig.model_validate(info.config)
        if epoch >= run.train.epochs:  # taken over from a trial that was through: nothing is left to train
            return past
        if past.at(epoch) == run:
            run = past
        else:
            changes = [change for change in past.train.schedule if change.epoch < epoch]
            changes.append(Change(epoch=epoch, settings=settings))
            tree = past.model_dump(mode="json")
            tree["train"]["schedule"] = [change.model_dump(mode="json") for change in changes]
            run = RunConfig.model_validate(tree)
    note = {"epoch": epoch, "settings": settings, "donor": donor if donor != storage.name(folder) else None}
    schedule = [change.model_dump(mode="json") for change in run.train.schedule]
    _add_leg(folder, {**note, "begun_with": begun_with(run, settings), "schedule": schedule})
    return run


def begun_with(run: RunConfig, settings: Settings) -> Settings:
    """The values with which a lineage began, for the same keys as `settings`."""
    values = flat(run.model_dump(mode="json"))
    return {path: values[path] for path in settings}


def _add_leg(folder: str, leg: dict[str, Any]) -> None:
    uri = storage.join(folder, LEGS_FILE)
    legs = json.loads(storage.read_bytes(uri)) if storage.exists(uri) else []
    if not legs or legs[-1] != leg:  # a trial that only went on after a pause is on the same leg
        storage.write_bytes(uri, json.dumps([*legs, leg], indent=1).encode())
