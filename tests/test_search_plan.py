"""What a search asks of a cluster, what it refuses before it starts, and what it expects to take; no cluster needed."""

import json
import re
import time
from pathlib import Path
from typing import Any, cast

import pytest
from factory import tiny_data
from pydantic import ValidationError
from typer.testing import CliRunner

from infra.cli.app import app
from mpc.errors import UserError
from pipeline.card import CARD_FILE, DatasetCard
from pipeline.config import RunConfig
from pipeline.dotted import validate
from tuning.budget import FILE, Hours
from tuning.config import SearchConfig
from tuning.domains import Dimension, Space
from tuning.estimate import Pace, forecast, pace
from tuning.keeping import ranked
from tuning.resources import HEAD, asked, head_share, plan
from tuning.schedulers import make_scheduler, rungs
from tuning.search import check
from tuning.searchers import Known, make_proposals, population
from tuning.space import load as load_space

LR = Space((Dimension("optim.lr", "loguniform", (0.001, 0.01)),))


def run(**train: Any) -> RunConfig:
    data = {key: train.pop(key) for key in ("backend", "tasks", "task_cpus") if key in train}
    return RunConfig.model_validate({"train": train, "data": data})


def gpu(**train: Any) -> RunConfig:
    return run(use_gpu=True, **train)


@pytest.mark.parametrize(
    ("trial", "nodes", "concurrent"),
    [
        (run(), [{"CPU": 4.0}], 3),  # one CPU stays for data
        (run(num_workers=2, batch_size=32), [{"CPU": 8.0}], 3),
        (run(worker_cpus=3), [{"CPU": 4.0}, {"CPU": 4.0}], 2),  # a worker fits on no two halves of machines
        (run(backend="torch", tasks=2, task_cpus=0.5), [{"CPU": 5.0}], 2),
        (gpu(), [{"CPU": 8.0, "GPU": 2.0}], 2),
        (gpu(gpus=0.25), [{"CPU": 16.0, "GPU": 1.0}], 4),
        (gpu(gpus=0.4), [{"CPU": 16.0, "GPU": 2.0}], 4),  # two on each: no trial lies on two GPUs
        (gpu(gpus=2), [{"CPU": 16.0, "GPU": 4.0}, {"CPU": 16.0}], 2),
        (gpu(num_workers=4, batch_size=32), [{"CPU": 8.0, "GPU": 4.0}, {"CPU": 8.0, "GPU": 4.0}], 2),
    ],
)
def test_as_many_trials_as_find_their_places(trial: RunConfig, nodes: list[dict[str, float]], concurrent: int) -> None:
    placed = plan(trial, SearchConfig(), nodes)
    assert placed.concurrent == concurrent
    assert not placed.notes


@pytest.mark.parametrize(
    ("trial", "nodes", "message"),
    [
        (run(), [{"CPU": 1.0}], "exceeds the cluster's 1 CPUs"),
        (run(worker_cpus=6), [{"CPU": 4.0}, {"CPU": 4.0}], "the largest machine has 4 CPUs"),
        (gpu(), [{"CPU": 8.0}], "no machine carries a worker with 1 CPUs and 1 GPU"),
        (gpu(gpus=2), [{"CPU": 8.0, "GPU": 1.0}, {"CPU": 8.0, "GPU": 1.0}], "has 8 CPUs and 1 GPUs"),
        (gpu(num_workers=2, batch_size=32), [{"CPU": 8.0, "GPU": 1.0}], "exceeds the cluster's 8 CPUs and 1 GPUs"),
    ],
)
def test_what_would_wait_for_ever_is_refused(trial: RunConfig, nodes: list[dict[str, float]], message: str) -> None:
    with pytest.raises(UserError) as caught:
        plan(trial, SearchConfig(), nodes)
    assert message in str(caught.value)
    assert "lower train.num_workers" in str(caught.value)


def test_what_was_mended_is_said() -> None:
    placed = plan(run(), SearchConfig(cpus_for_data=0, max_concurrent=9), [{"CPU": 4.0}])
    assert (placed.concurrent, placed.cpus_for_data) == (3, 0.5)
    assert "search.cpus_for_data raised from 0 to 0.5" in placed.notes[0]
    assert "search.max_concurrent lowered from 9 to 3" in placed.notes[1]
    assert not plan(run(backend="torch"), SearchConfig(cpus_for_data=0), [{"CPU": 4.0}]).notes


def test_a_trial_asks_for_its_worker_or_for_its_driver() -> None:
    assert asked(gpu(gpus=0.25), 4).bundles == [{"CPU": 1.0, "GPU": 0.25}, {HEAD: 0.225}]
    assert asked(gpu(num_workers=2, batch_size=32), 1).bundles == [{"CPU": 0.01}, {HEAD: 0.9}]
    share = asked(run(), 3).bundles
    assert share == [{"CPU": 1.0}, {HEAD: 0.3}], "no more than three of a thing that exists once"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scheduler": "pbt"}, "set searcher=random"),
        ({"scheduler": "pbt", "searcher": "random", "max_trials": 1}, "set max_trials to 2"),
        ({"searcher": "pareto"}, "set scheduler=none"),
        ({"searcher": "grid", "warm_start": ["one"]}, "leave warm_start out"),
        ({"pbt": {"quantile": 0.7}}, "pbt.quantile = 0.7"),
    ],
)
def test_what_does_not_go_together_is_one_line(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        validate(SearchConfig, settings, "--set")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("dimension", "train", "message"),
    [
        (Dimension("model.drop", "uniform", (0.0, 0.5)), {}, "model.drop cannot change while mpc trains"),
        (Dimension("loss.lambda_fpc", "uniform", (0.0, 0.5)), {}, "may be 0, which switches its term off"),
        (Dimension("loss.lambda_ipc", "uniform", (0.1, 0.5)), {"method": "wan"}, "while wan trains"),
        (Dimension("optim.lr", "uniform", (0.1, 0.5), (("loss.sup", ("an",)),)), {}, "has a condition"),
        (Dimension("optim.lr", "uniform", (0.1, 0.5)), {"num_workers": 2, "batch_size": 32}, "set train.num_workers=1"),
    ],
)
def test_a_population_changes_only_what_can_change(dimension: Dimension, train: dict[str, Any], message: str) -> None:
    config = SearchConfig(scheduler="pbt", searcher="random")
    with pytest.raises(UserError, match=message):
        make_scheduler(config, run(**train), Space((dimension,)), "trials")


@pytest.mark.parametrize("concurrent", [1, 2, 3, 9, 10, 30, 90])
def test_no_more_trials_than_planned_find_a_share_and_rays_own_actors_do(concurrent: int) -> None:
    """Ray Train's cleaner and state actor ask for 0.001 each: a trial that had taken all of it waited for itself."""
    share = head_share(concurrent, jobs=False)
    assert concurrent * share <= 1 - 4 * 0.001
    assert concurrent > 79 or (concurrent + 1) * share > 1
    share = head_share(concurrent, jobs=True)
    assert concurrent * share <= 1 - 0.001 * (concurrent + 1)
    assert concurrent > 21 or (concurrent + 1) * share > 1


def test_the_driver_of_a_trial_with_several_workers_needs_room_too() -> None:
    base = run(num_workers=2, batch_size=32, backend="torch", tasks=2, task_cpus=0.5)  # two CPUs each
    config = SearchConfig(cpus_for_data=0.0)
    with pytest.raises(UserError, match=r"search\.cpus_for_data"):
        plan(base, config, [{"CPU": 4.0}])
    assert plan(base, config, [{"CPU": 5.0}]).concurrent == 1
    # a driver takes of what is kept for data, but leaves a reading task enough
    reading = run(num_workers=2, batch_size=32, task_cpus=1.0)
    with pytest.raises(UserError, match=r"search\.cpus_for_data"):
        plan(reading, SearchConfig(cpus_for_data=1.0), [{"CPU": 3.0}])
    small = run(num_workers=2, batch_size=32, task_cpus=0.25)
    assert plan(small, SearchConfig(cpus_for_data=1.0), [{"CPU": 3.0}]).concurrent == 1


@pytest.mark.parametrize("key", ["data.val_kappa", "data.val_labels", "data.draw_seed"])
def test_what_trials_are_measured_by_is_not_searched(key: str, tmp_path: Path) -> None:
    domains = {"data.val_kappa": "{uniform: [1.5, 3.0]}", "data.draw_seed": "{int: [0, 9]}"}
    (tmp_path / "space.yaml").write_text(f"{key}: {domains.get(key, '{choice: [full, observed]}')}\n")
    base = RunConfig.model_validate({"data": {"val_labels": "observed", "val_kappa": 2.0}})
    with pytest.raises(UserError, match=key):
        load_space(str(tmp_path / "space.yaml"), base)


@pytest.mark.parametrize(
    ("search", "reason"),
    [
        ({"metric": "val_macro_aurocc"}, "not every epoch reports metric val_macro_aurocc; set it to one of val_"),
        ({"metric": "seconds", "mode": "min"}, "not every epoch reports metric seconds"),
        ({"metric": "loss_ipc", "mode": "min"}, "not every epoch reports metric loss_ipc"),  # none while it warms up
        ({"metric": "loss"}, "mode max would take the worst loss for the best; set mode=min"),
        ({"mode": "min"}, "mode min would take the worst val_macro_auroc for the best; set mode=max"),
    ],
)
def test_a_metric_that_no_epoch_reports_or_the_wrong_direction_is_refused(search: dict[str, str], reason: str) -> None:
    with pytest.raises(ValidationError, match=reason):
        SearchConfig.model_validate(search)


def test_several_workers_keep_their_checkpoints_by_what_is_searched_for() -> None:
    base = run(num_workers=2, batch_size=32, metric="macro_ap")
    card = cast(DatasetCard, None)  # what follows would read it
    with pytest.raises(UserError, match=r"search\.metric=val_macro_auroc is not train\.metric=macro_ap"):
        check(base, SearchConfig(), LR, card, "out")


def test_equal_trials_rank_by_their_names_everywhere() -> None:
    """Else checkpoints of one would be kept, and those of another published."""
    values = {"b": 0.5, "c": None, "d": 0.7, "a": 0.5}
    assert ranked(values, SearchConfig()) == ["d", "a", "b"]
    assert ranked(values, SearchConfig(metric="loss", mode="min")) == ["a", "b", "d"]


def test_a_grid_beyond_the_budget_is_refused() -> None:
    space = Space((Dimension("views.strong.ops", "int", (0, 4)), Dimension("loss.sup", "choice", ("an", "wan"))))
    with pytest.raises(UserError, match=r"more points than the 9 that search\.max_trials allows"):
        make_proposals(SearchConfig(searcher="grid", max_trials=9), space, 1)
    assert make_proposals(SearchConfig(searcher="grid", max_trials=10), space, 1).samples == 1


def test_a_grid_of_billions_is_refused_at_once() -> None:
    eight = tuple(Dimension(f"loss.lambda_{n}", "quniform", (0.0, 1.0, 0.05)) for n in range(8))
    everything = Space((*eight, Dimension("train.seed", "int", (0, 10**12))))
    with pytest.raises(UserError, match=r"more points than the 9 that search\.max_trials allows"):
        make_proposals(SearchConfig(searcher="grid", max_trials=9), everything, 1)


def test_a_population_begins_with_the_best_of_before() -> None:
    config = SearchConfig(scheduler="pbt", searcher="random", max_trials=8)
    known = [Known({"optim.lr": 0.001 * n}, value) for n, value in ((1, 0.5), (2, 0.9), (3, 0.7), (2, 0.8))]
    first = population(config, LR, known)
    assert first[:2] == [{"optim.lr": 0.002}, {"optim.lr": 0.003}], "a quarter of the trials, each settings once"
    assert len(first) == 8
    assert first[2:] == population(config, LR)[:6], "the rest is drawn from the seed"


def test_hours_of_all_sessions_count(tmp_path: Path) -> None:
    (tmp_path / FILE).write_text(json.dumps({"hours": 1.9999}))
    clock = Hours(2.0, str(tmp_path))
    assert not clock.stop_all()
    deadline = time.monotonic() + 60
    while not clock.stop_all():
        assert time.monotonic() < deadline
    assert json.loads((tmp_path / FILE).read_text())["hours"] >= 2.0
    assert Hours(2.0, str(tmp_path)).stop_all(), "another session has nothing left"
    assert not Hours(None, str(tmp_path)).stop_all()


def test_what_a_search_will_take() -> None:
    config, nine = SearchConfig(max_trials=9, scheduler="asha", reduction_factor=3, grace_epochs=1), run(epochs=9)
    assert rungs(config, 9) == [1.0, 3.0]
    expected = forecast(config, nine, 9, 2, Pace(60.0, "a record"))
    assert expected.epochs_at_most == 81
    assert expected.epochs_expected == 9 * 1 + 3 * 2 + 1 * 6
    assert expected.hours_at_most == pytest.approx(81 / 2 / 60)
    assert expected.hours_expected == pytest.approx(21 / 2 / 60)
    limited = forecast(config.model_copy(update={"max_hours": 0.25}), nine, 9, 2, Pace(60.0, "a record"))
    assert limited.hours_at_most == 0.25
    full = forecast(config.model_copy(update={"scheduler": "none"}), nine, 9, 2, Pace(60.0, "a record"))
    assert full.epochs_expected == full.epochs_at_most


def test_a_dry_run_shows_space_plan_and_time_and_writes_nothing(few_data: str, tmp_path: Path) -> None:
    (tmp_path / "space.yaml").write_text(
        "loss.sup: {choice: [an, em]}\nbaseline.em_alpha: {uniform: [0.1, 0.4], when: {loss.sup: em}}\n"
    )
    tiny = ["model.backbone=test_efficientnet_gn", "model.weights=none", "train.batch_size=8", "train.epochs=9"]
    own = ["train.worker_cpus=0.5", "data.task_cpus=0.25", "search.cpus_for_data=0.1", "search.max_trials=9"]
    out = tmp_path / "out"
    arguments = ["tune", "--data", few_data, "--out", str(out), "--space", str(tmp_path / "space.yaml"), "--dry-run"]
    done = CliRunner().invoke(
        app, [*arguments, *(f"--set={setting}" for setting in [*tiny, *own])], env={"COLUMNS": "200"}
    )
    assert done.exit_code == 0, done.output
    words = " ".join(re.sub(r"[^\x20-\x7e]", " ", done.output).split())
    for text in (
        "baseline.em_alpha uniform 0.1, 0.4 when loss.sup is em",
        "tpe, asha",
        "0.5 CPUs; 0.25 CPUs stay free",
        "9 a trial, at most 81",
        "about 45",  # nine trials to epoch 3, three of them on to epoch 9
        "of the best 3 trials",
        "timed here on cpu",
        "search.cpus_for_data raised from 0.1 to 0.25",
    ):
        assert text in words, (text, words)
    assert not out.exists()
    refused = CliRunner().invoke(app, [*arguments, "--set=train.worker_cpus=4096"])
    assert "the largest machine has" in str(refused.exception)


def test_a_dry_run_takes_data_of_which_only_positives_are_known(ray_session: None, tmp_path: Path) -> None:
    data = tmp_path / "data"
    tiny_data(data, images=200)
    card = json.loads((data / CARD_FILE).read_text())
    for counts in card["counts"].values():
        counts["known"] = counts["positives"]
    (data / CARD_FILE).write_text(json.dumps(card))
    (tmp_path / "space.yaml").write_text("optim.lr: {loguniform: [0.001, 0.01]}\n")
    tiny = ["model.backbone=test_efficientnet_gn", "model.weights=none", "train.batch_size=8", "train.worker_cpus=0.5"]
    arguments = ["tune", "--data", str(data), "--out", str(tmp_path / "out"), "--dry-run"]
    arguments += ["--space", str(tmp_path / "space.yaml"), *(f"--set={setting}" for setting in tiny)]
    refused = CliRunner().invoke(app, arguments)
    assert "data.val_labels=observed" in str(refused.exception)
    done = CliRunner().invoke(app, [*arguments, "--set=data.val_labels=observed"])
    assert done.exit_code == 0, (done.output, done.exception)


def test_an_estimate_rests_on_the_record_or_on_steps_timed_here(ray_session: None, tmp_path: Path) -> None:
    card = tiny_data(tmp_path / "data")
    base = RunConfig.model_validate({"model": {"backbone": "test_efficientnet_gn"}, "train": {"batch_size": 8}})
    (tmp_path / "empty").mkdir()  # or begun, and killed before its first trial
    for folder in ("out", "empty"):
        timed = pace(base, str(tmp_path / "data"), card, str(tmp_path / folder))
        assert timed.seconds > 0
        assert "timed here on cpu, random images" in timed.source
        assert "share" not in timed.source
    quarter = base.model_copy(update={"train": base.train.model_copy(update={"use_gpu": True, "gpus": 0.25})})
    assert "share a GPU slow each other" in pace(quarter, str(tmp_path / "data"), card, str(tmp_path / "out")).source
    (tmp_path / "out" / "trials" / "a").mkdir(parents=True)
    lines = "".join(json.dumps({"epoch": n, "seconds": seconds}) + "\n" for n, seconds in ((1, 10.0), (2, 20.0)))
    (tmp_path / "out" / "trials" / "a" / "metrics.jsonl").write_text(lines)
    assert pace(base, str(tmp_path / "data"), card, str(tmp_path / "out")) == Pace(
        15.0, "the 2 epochs that this search has already trained"
    )
