"""Searchers and schedulers beside random search and ASHA, each in a search of its own with real Ray Tune."""

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pages import Page
from ray import tune
from ray.train import Checkpoint
from runs import PlainHost

from infra.settings import load, run_config
from mpc.checkpoint import read_info
from mpc.config import PixelSpec
from pipeline.card import read_card
from pipeline.checkpoints import Found
from pipeline.config import RunConfig
from pipeline.loop import Loop
from pipeline.record import MetricsLog
from tuning.config import SearchConfig
from tuning.domains import Dimension, Space
from tuning.follow import CELL
from tuning.keeping import best_of
from tuning.outcome import SearchResult, Trial, pareto
from tuning.report import write_search
from tuning.schedulers import make_scheduler
from tuning.search import search
from tuning.space import apply
from tuning.trial import mflops

BASE = RunConfig.model_validate(
    {
        "model": {"backbone": "test_efficientnet_gn"},
        "loss": {"lambda_btc": 0.0, "warmup_epochs": 0.2, "ramp_epochs": 0.2},
        "data": {"tasks": 1, "task_cpus": 0.25},
        "optim": {"lr": 0.003},
        "train": {"epochs": 3, "batch_size": 8, "worker_cpus": 0.75, "max_failures": 0},
    }
)
LOSS = {"metric": "loss_sup", "mode": "min", "cpus_for_data": 0.5}
RATES = Dimension("optim.lr", "choice", (0.003, 0.000000001))
"""One that learns and one that does not."""


def epochs(count: int) -> RunConfig:
    return BASE.model_copy(update={"train": BASE.train.model_copy(update={"epochs": count})})


def searched(
    out: Path, data: str, space: Space, base: RunConfig = BASE, **config: Any
) -> tuple[SearchResult, dict[str, Any]]:
    """A search and its search.json; its page holds what every search's page does."""
    result = search(base, SearchConfig.model_validate({**LOSS, **config}), space, data, str(out))
    words = Page(Path(write_search(str(out))).read_text()).words
    assert result.best.trial_id in words["head"]
    assert {"winner", "parallel", "importance", "slices", "curves", "time", "trials"} <= words.keys()
    return result, json.loads((out / "search.json").read_text())


def replayed(run: RunConfig, data: str, out: Path) -> list[dict[str, Any]]:
    """The epochs of a run in this process."""
    lines: list[dict[str, Any]] = []

    class Host(PlainHost):
        def report(self, metrics: dict[str, Any], checkpoint: Path) -> None:
            lines.append(metrics)

    out.mkdir()
    threads = torch.get_num_threads()
    Loop(run, data, read_card(data), Host(out)).fit()
    torch.set_num_threads(threads)
    return lines


def test_a_population_changes_settings_and_its_schedule_is_replayed(few_data: str, tmp_path: Path) -> None:
    space = Space((RATES, Dimension("loss.lambda_ipc", "uniform", (0.2, 1.0))))
    pbt = {"interval": 1, "quantile": 0.34, "resample": 0.0}
    out = tmp_path / "search"
    result, record = searched(
        out, few_data, space, scheduler="pbt", searcher="random", max_trials=3, max_concurrent=1, pbt=pbt, seed=1
    )
    assert [trial.status for trial in result.trials] == ["finished"] * 3
    first = {trial.trial_id: trial.legs[0]["settings"]["optim.lr"] for trial in result.trials}
    assert set(first.values()) == {0.003, 0.000000001}, "the seed draws a good and a bad trial"
    moved = [(trial, legs[-1]) for trial in result.trials if (legs := [leg for leg in trial.legs if leg["donor"]])]
    assert moved, "a bad trial goes on from a good one"
    for trial, leg in moved:
        assert leg["donor"] in first.keys() - {trial.trial_id}
        assert leg["schedule"][-1] == {"epoch": leg["epoch"], "settings": leg["settings"]}
        assert 0.2 <= leg["settings"]["loss.lambda_ipc"] <= 1.0
        check_replay(trial, leg, few_data, out, tmp_path / trial.trial_id)
    best = run_config(load(str(out / "best.yaml")))
    assert best == RunConfig.model_validate(read_info(out / "best").config), "what `train --config` repeats"
    assert [change.model_dump(mode="json") for change in best.train.schedule] == (
        [leg for leg in result.best.legs if leg["epoch"] < result.best.epochs][-1]["schedule"]
    )
    assert record["trials"][0]["legs"] == result.trials[0].legs


@pytest.mark.usefixtures("ray_session")
def test_a_population_ends_where_the_worst_always_comes_first(tmp_path: Path) -> None:
    """Trial 0 is worse after each epoch and is set back to trial 1's; Ray's order gives trial 1 no second turn."""
    space = Space((Dimension("loss.lambda_ipc", "uniform", (0.2, 1.0)),))
    config = SearchConfig(scheduler="pbt", searcher="random", pbt={"interval": 1, "quantile": 0.5}, **LOSS)
    reports: list[tuple[str, int]] = []

    def trainable(_: dict[str, Any]) -> None:
        """Three epochs; the worth of a trial is its place in the population."""
        trial_id, begun = tune.get_context().get_trial_id(), 0
        if stored := tune.get_checkpoint():
            begun = int((Path(stored.path) / "epoch").read_text())
        for epoch in range(begun + 1, 4):
            with TemporaryDirectory() as folder:
                (Path(folder) / "epoch").write_text(str(epoch))
                worth = {"epoch": epoch, "loss_sup": float(trial_id.endswith("_00000"))}
                tune.report(worth, checkpoint=tune.Checkpoint.from_directory(folder))

    class Turns(tune.Callback):
        """Writes down who trained; after 20 epochs of what needs 6 at best, it is enough."""

        def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: Any, **_: Any) -> None:
            reports.append((trial.trial_id[-1], result["epoch"]))
            assert len(reports) <= 20, f"no end: {reports}"

    tuner = tune.Tuner(
        tune.with_resources(trainable, {"cpu": 2}),
        param_space={CELL: {"loss.lambda_ipc": tune.uniform(0.2, 1.0)}},
        tune_config=tune.TuneConfig(
            scheduler=make_scheduler(config, BASE, space, str(tmp_path)), num_samples=2, reuse_actors=True
        ),
        run_config=tune.RunConfig(storage_path=str(tmp_path), callbacks=[Turns()], verbose=0),
    )
    results = tuner.fit()
    assert [result.metrics["epoch"] for result in results] == [3, 3]


def check_replay(trial: Trial, leg: dict[str, Any], data: str, out: Path, folder: Path) -> None:
    """A run with the schedule of a leg gives the very epochs that the trial had since then, other weights and all."""
    run = apply(BASE, leg["begun_with"], trial.trial_id)
    run = RunConfig.model_validate(
        {**run.model_dump(mode="json"), "train": {**run.train.model_dump(mode="json"), "schedule": leg["schedule"]}}
    )
    again = {line["epoch"]: line for line in replayed(run, data, folder)}
    own = [line for line in MetricsLog(str(out / "trials" / trial.trial_id)).read() if line["epoch"] > leg["epoch"]]
    assert own, "it trained after it had moved"
    for line in own:
        assert line["loss_sup"] == again[line["epoch"]]["loss_sup"]
        assert line["settings"] == again[line["epoch"]]["settings"]


def test_epochs_that_a_population_left_behind_are_no_longer_the_best() -> None:
    """At epoch 6 the trial went back to another one's epoch 3: its own epochs 4 to 6 are no part of what it became."""
    epochs = [(3, 0.6), (4, 0.85), (6, 0.7), (4, 0.83), (5, 0.83)]
    stored = [
        Found(Checkpoint(f"/checkpoint_{number}"), number, {"epoch": epoch, "val_macro_auroc": value})
        for number, (epoch, value) in enumerate(epochs)
    ]
    history = [{"epoch": epoch, "val_macro_auroc": value} for epoch, value in (epochs[0], *epochs[3:])]
    best = best_of(stored, history, SearchConfig())
    assert best is stored[4], "the latest of equals that are recorded"
    assert best_of(stored[:3], history[1:], SearchConfig()) is None


def test_a_grid_tries_every_point_and_the_median_stops_what_falls_behind(few_data: str, tmp_path: Path) -> None:
    rates = (0.003, 0.0029, 0.0028, 0.000000001)
    space = Space((Dimension("optim.lr", "choice", rates),))
    config = {"searcher": "grid", "scheduler": "median", "grace_epochs": 1, "max_trials": 4, "max_concurrent": 1}
    result, record = searched(tmp_path / "search", few_data, space, epochs(2), **config)
    ended = {trial.params["optim.lr"]: (trial.status, trial.epochs) for trial in result.trials}
    first_three = dict.fromkeys(rates[:3], ("finished", 2))  # they have too few others to be compared with
    assert ended == {**first_three, 0.000000001: ("stopped", 1)}
    assert record["ended_by"] == "trials"
    assert all(trial["started"] < trial["ended"] for trial in record["trials"])


def test_hyperband_halves_its_brackets(few_data: str, tmp_path: Path) -> None:
    """With 2 epochs and factor 2: a bracket of two at full length, then one of two, of which one goes on."""
    space = Space((Dimension("optim.lr", "loguniform", (0.0001, 0.01)),))
    config = {"searcher": "random", "scheduler": "hyperband", "reduction_factor": 2, "max_concurrent": 1}
    result, _ = searched(tmp_path / "search", few_data, space, epochs(2), max_trials=4, **config)
    assert sorted((trial.epochs, trial.status) for trial in result.trials) == [(1, "stopped")] + [(2, "finished")] * 3


def test_two_aims_give_a_front(few_data: str, tmp_path: Path) -> None:
    space = Space((Dimension("model.backbone", "choice", ("test_efficientnet_gn", "test_vit")),))
    config = {"searcher": "pareto", "scheduler": "none", "cost": "mflops", "max_trials": 2, "max_concurrent": 1}
    result, record = searched(tmp_path / "search", few_data, space, epochs(1), seed=11, **config)
    costs = {trial.params["model.backbone"]: trial.cost for trial in result.trials}
    assert len(costs) == 2, "the seed draws both networks"
    card = read_card(few_data)
    for backbone, cost in costs.items():
        model = BASE.model.model_copy(update={"backbone": backbone})
        assert cost == mflops(BASE.model_copy(update={"model": model}), card)
    by_id = {trial.trial_id: trial for trial in result.trials}
    front = [by_id[name] for name in record["pareto"]]
    for trial in result.trials:
        beaten = any(other.cost <= trial.cost and other.value <= trial.value for other in front)
        assert beaten, "each trial is on the front, or one of the front is no worse in both"


def test_a_front_by_hand() -> None:
    points = {"a": (1.0, 0.5), "b": (2.0, 0.7), "c": (2.0, 0.6), "d": (3.0, 0.7), "e": (4.0, 0.9), "f": (0.5, None)}
    trials = [Trial(name, "finished", {}, 1, value, None, cost) for name, (cost, value) in points.items()]
    trials.append(Trial("g", "failed", {}, 1, 0.99, "it broke", 1.0))
    assert pareto(trials, SearchConfig(searcher="pareto", scheduler="none")) == ["a", "b", "e"]
    assert pareto(trials, SearchConfig()) == []


def test_operations_of_a_network_by_hand() -> None:
    """A linear head of K outputs on C features adds 2 K C operations, whatever the backbone does before."""
    small, large = (
        mflops(BASE, SimpleNamespace(findings=("x",) * count, pixels=PixelSpec(), image_size=32)) for count in (1, 11)
    )
    assert large - small == pytest.approx(2 * 10 * 256 / 1e6)
