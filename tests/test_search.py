"""Searches with real Ray Tune: spaces, early stopping, lone failures, resumption."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
from ray.tune.search.optuna import OptunaSearch
from safetensors.torch import save_file
from searches import Searches, epochs_of, write_space

from mpc.checkpoint import load_weights, read_info
from mpc.errors import UserError
from pipeline import runtime
from pipeline.card import read_card
from pipeline.config import RunConfig
from pipeline.record import MetricsLog, claim
from pipeline.train import train
from tuning import space as spaces
from tuning.config import SearchConfig
from tuning.outcome import SearchResult, identity
from tuning.resources import plan
from tuning.search import search
from tuning.space import Dimension, Space

BASE = RunConfig.model_validate(
    {
        "model": {"backbone": "test_efficientnet_gn"},
        "loss": {"lambda_btc": 0.0, "lambda_fpc": 0.0, "warmup_epochs": 0.2, "ramp_epochs": 0.2},
        "data": {"tasks": 1, "task_cpus": 0.25},
        "train": {"epochs": 3, "batch_size": 64, "worker_cpus": 0.75},
    }
)
SMALL = BASE.model_copy(update={"train": BASE.train.model_copy(update={"batch_size": 8})})
"""For a data set of a few dozen images."""
LOSS = {"metric": "loss_sup", "mode": "min", "cpus_for_data": 0.5}


def test_concurrency_keeps_cpus_for_data() -> None:
    config = SearchConfig(cpus_for_data=1.0)
    wide = BASE.model_copy(update={"train": BASE.train.model_copy(update={"worker_cpus": 1.0})})
    assert plan(wide, config, [{"CPU": 2.0}]).concurrent == 1
    assert plan(wide, config, [{"CPU": 16.0}]).concurrent == 15
    assert plan(wide, SearchConfig(cpus_for_data=1.0, max_concurrent=4), [{"CPU": 16.0}]).concurrent == 4
    with pytest.raises(UserError, match=r"search\.cpus_for_data"):
        plan(wide, config, [{"CPU": 1.0}])


def test_asha_stops_bad_trials_and_a_failed_trial_ends_alone(few_data: str, tmp_path: Path) -> None:
    # heads: 5 does not divide the network's 256 features, so that trial fails; a rate of 1e-9 learns nothing
    text = "optim.lr: {choice: [0.003, 0.000000001]}\nbtc.heads: {choice: [4, 4, 5]}"
    once = SMALL.train.model_copy(update={"max_failures": 1})  # what fails for its settings fails each time
    base = BASE.model_copy(update={"loss": BASE.loss.model_copy(update={"lambda_btc": 0.1}), "train": once})
    config = SearchConfig(
        **LOSS,
        searcher="random",
        max_trials=7,
        max_concurrent=1,
        grace_epochs=1,
        reduction_factor=2,
        keep_trials=1,
        seed=2,
    )
    out = tmp_path / "search"
    result = search(base, config, spaces.load(write_space(tmp_path, text), base), few_data, str(out))
    trials = sorted(result.trials, key=lambda trial: trial.started or 0.0)  # their ids are random
    failed = [t for t in trials if t.status == "failed"]
    ran = [t for t in trials if t.status != "failed"]
    rates = [t.params["optim.lr"] for t in ran]
    # one after the other: before a good one there is nothing to compare with
    bad = [t for t in ran[rates.index(0.003) :] if t.params["optim.lr"] < 1e-3]
    assert failed, "the seed draws a failing trial"
    assert bad, "the seed draws a bad trial"
    assert all("btc.heads 5" in t.error and t.params["btc.heads"] == 5 for t in failed)
    assert all(t.status == "stopped" and t.epochs < 3 for t in bad)
    assert result.best.params["optim.lr"] == 0.003
    assert result.best.epochs == 3
    check_what_lies_there(out, result, keep=1)


class AtATime:
    """A listener that counts the trials at work."""

    def __init__(self) -> None:
        self.running: set[str] = set()
        self.started: list[str] = []
        self.most = 0

    def on_trial_start(self, trial_id: str, params: dict[str, Any]) -> None:
        self.started.append(trial_id)
        self.running.add(trial_id)
        self.most = max(self.most, len(self.running))

    def on_trial_epoch(self, trial_id: str, metrics: dict[str, Any]) -> None: ...

    def on_trial_end(self, trial_id: str, status: str) -> None:
        self.running.discard(trial_id)


@pytest.mark.slow
def test_failed_trials_that_are_resumed_leave_cpus_for_data(few_data: str, tmp_path: Path) -> None:
    # 5 and 7 heads do not divide the network's 256 features; Tune starts whatever a searcher has handed out before
    space = Space((Dimension("btc.heads", "choice", (5, 7, 4)),))
    once = {"max_failures": 0, "epochs": 1}
    base = SMALL.model_copy(
        update={
            "loss": SMALL.loss.model_copy(update={"lambda_btc": 0.1}),
            "train": SMALL.train.model_copy(update=once),
        }
    )
    config = SearchConfig(**LOSS, searcher="grid", scheduler="none", max_trials=3, max_concurrent=1)
    first, again = AtATime(), AtATime()
    for listener in (first, again):
        result = search(
            base, config, space, few_data, str(tmp_path / "s"), resume=listener is again, listeners=[listener]
        )
        assert sorted(trial.status for trial in result.trials) == ["failed", "failed", "finished"]
    assert (len(first.started), first.most) == (3, 1)
    assert (len(again.started), again.most) == (2, 1)


@pytest.mark.slow
def test_pretrained_weights_are_found_from_here_and_read_in_trials(
    few_data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = timm.create_model("test_efficientnet_gn", in_chans=1, num_classes=0)
    save_file(network.state_dict(), tmp_path / "pretrained.safetensors")
    monkeypatch.chdir(tmp_path)
    base = SMALL.model_copy(
        update={
            "model": SMALL.model.model_copy(update={"weights": "pretrained.safetensors"}),
            "train": SMALL.train.model_copy(update={"epochs": 1}),
        }
    )
    config = SearchConfig(**LOSS, searcher="random", scheduler="none", max_trials=1, max_concurrent=1)
    space = Space((Dimension("optim.lr", "choice", (1e-9,)),))
    result = search(base, config, space, few_data, "s")
    found = load_weights(Path(result.best_checkpoint), "model")
    first = next(iter(network.state_dict()))
    torch.testing.assert_close(found[f"backbone.{first}"], network.state_dict()[first], atol=1e-5, rtol=0)
    trained = train(base.model_copy(update={"optim": base.optim.model_copy(update={"lr": 1e-9})}), few_data, "t")
    found = load_weights(Path(trained.best_checkpoint), "model")
    torch.testing.assert_close(found[f"backbone.{first}"], network.state_dict()[first], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("model", "space", "message"),
    [
        ({"weights": "nowhere.pth"}, Space(()), r"nowhere\.pth"),
        ({"backbone": "densnet121"}, Space(()), r"densnet121.*near: "),
        ({}, Space((Dimension("model.weights", "choice", ("none", "x.pth")),)), r"model\.weights x\.pth: .*whole path"),
    ],
)
def test_a_network_that_no_trial_could_build_is_refused(
    few_data: str, tmp_path: Path, model: dict[str, str], space: Space, message: str
) -> None:
    base = SMALL.model_copy(update={"model": SMALL.model.model_copy(update=model)})
    with pytest.raises(UserError, match=message):
        search(base, SearchConfig(**LOSS, max_trials=1), space, few_data, str(tmp_path / "s"))
    assert not (tmp_path / "s").exists()


def check_what_lies_there(out: Path, result: SearchResult, keep: int) -> None:
    record = json.loads((out / "search.json").read_text())
    assert record["best"] == result.best.trial_id
    assert [t["trial_id"] for t in record["trials"]] == [t.trial_id for t in result.trials]
    history = MetricsLog(str(out / "trials" / result.best.trial_id)).read()
    assert min(line["loss_sup"] for line in history) == result.best.value
    info = read_info(Path(result.best_checkpoint))
    assert info.config["optim"]["lr"] == result.best.params["optim.lr"]
    with_weights = {path.parents[1].name for path in (out / "tune").rglob("model.safetensors")}
    assert len(with_weights) == keep  # the other trials' checkpoints are gone


@pytest.mark.slow
def test_a_killed_search_resumes_without_running_finished_trials_again(
    few_data: str, searches: Searches, tmp_path: Path
) -> None:
    yaml = write_space(tmp_path, "optim.lr: {loguniform: [0.001, 0.01]}")
    config = SearchConfig(**LOSS, scheduler="none", max_trials=4, max_concurrent=1)
    out = tmp_path / "search"
    killed = searches.start(few_data, out, SMALL, config, yaml)
    # the first trial is through, the second in the middle
    searches.wait_for(lambda: sorted(epochs_of(out).values())[-2:] == [2, 3], killed)
    searches.kill(killed)
    notes = {path.parent.name: json.loads(path.read_text()) for path in (out / "trials").glob("*/trial.json")}
    _, first = min((note["ended"], name) for name, note in notes.items() if "ended" in note)  # the second may be too
    written = (out / "trials" / first / "metrics.jsonl").stat().st_mtime_ns
    searches.ended_well(searches.start(few_data, out, SMALL, config, yaml, resume=True))
    trials = json.loads((out / "search.json").read_text())["trials"]
    # the running trial may have been killed before Tune had noted it: then it is listed, and another took its place
    lost = [t for t in trials if t["status"] == "lost"]
    assert len(lost) <= 1
    assert [(t["status"], t["error"]) for t in trials if t not in lost] == [("finished", None)] * 4
    assert epochs_of(out) == {t["trial_id"]: t["epochs"] for t in trials}
    assert first in {t["trial_id"] for t in trials if t not in lost}
    assert (out / "trials" / first / "metrics.jsonl").stat().st_mtime_ns == written
    check_what_optuna_learnt(out, [trial for trial in trials if trial not in lost])


@pytest.mark.slow
def test_trials_that_ended_after_tunes_last_note_are_not_run_again(
    few_data: str, searches: Searches, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tune's state on disk is older than the checkpoints: those that it names are gone when the driver is killed."""
    monkeypatch.setenv("TUNE_GLOBAL_CHECKPOINT_S", "0")
    yaml = write_space(tmp_path, "optim.lr: {choice: [0.000000001, 0.003, 0.002]}")
    base = SMALL.model_copy(update={"train": SMALL.train.model_copy(update={"epochs": 8})})
    config = SearchConfig(**LOSS, searcher="grid", scheduler="none", max_concurrent=1, keep_trials=1)
    out, aside = tmp_path / "search", tmp_path / "aside"
    killed = searches.start(few_data, out, base, config, yaml)
    searches.wait_for(lambda: "checkpoint_000001" in state_of(out), killed)
    shutil.copytree(out / "tune", aside, ignore=lambda folder, names: [n for n in names if (Path(folder) / n).is_dir()])
    assert "checkpoint_00000" in state_of(tmp_path, "aside")
    searches.wait_for(lambda: len(epochs_of(out)) == 3, killed)
    searches.kill(killed)
    shutil.copytree(aside, out / "tune", dirs_exist_ok=True)
    ended = {f.parent.name: f.stat().st_mtime_ns for f in out.glob("trials/*/metrics.jsonl") if len(lines(f)) == 8}
    assert len(ended) == 2
    first = min(ended, key=lambda name: ended[name])
    assert not list((out / "tune" / first).rglob("model.safetensors")), "the second is better: none of the first's stay"
    note = (out / "trials" / first / "trial.json").read_text()
    searches.ended_well(searches.start(few_data, out, base, config, yaml, resume=True))
    trials = json.loads((out / "search.json").read_text())["trials"]
    assert [t["error"] for t in trials if t["status"] == "failed"] == []
    assert first in {t["trial_id"] for t in trials if t["status"] == "finished"}
    assert (out / "trials" / first / "metrics.jsonl").stat().st_mtime_ns == ended[first]
    assert (out / "trials" / first / "trial.json").read_text() == note


def state_of(out: Path, folder: str = "tune") -> str:
    return "".join(path.read_text() for path in (out / folder).glob("experiment_state-*.json"))


def lines(file: Path) -> list[str]:
    return file.read_text().splitlines()


class Broken:
    """A listener that raises after the first epoch of the second trial."""

    def __init__(self) -> None:
        self.seen: set[str] = set()

    def on_trial_start(self, trial_id: str, params: dict[str, Any]) -> None: ...

    def on_trial_epoch(self, trial_id: str, metrics: dict[str, Any]) -> None:
        self.seen.add(trial_id)
        if len(self.seen) == 2:
            raise RuntimeError("a disk is full")

    def on_trial_end(self, trial_id: str, status: str) -> None:
        assert status == "finished"


@pytest.mark.filterwarnings("ignore:Exception ignored in.*(progress.csv|result.json)")  # Tune leaves them open then
def test_a_search_that_an_error_ended_goes_on_or_is_left_as_it_is(
    few_data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tune would count its trials as ended, and begin a search of one trial where it cannot read its own state."""
    monkeypatch.setenv("TUNE_GLOBAL_CHECKPOINT_S", "0")  # it has noted both trials then
    config = SearchConfig(**LOSS, searcher="tpe", scheduler="none", max_trials=2, max_concurrent=1)
    space, out = Space((Dimension("optim.lr", "loguniform", (0.001, 0.01)),)), tmp_path / "s"
    with pytest.raises(Exception, match="a disk is full"):
        search(SMALL, config, space, few_data, str(out), listeners=[Broken()])
    notes = [json.loads(path.read_text()) for path in (out / "trials").glob("*/trial.json")]
    assert sorted(note.get("status", "goes on") for note in notes) == ["finished", "goes on"]
    before = epochs_of(out)
    for pattern, message in (("experiment_state-*.json", "is cut short"), ("searcher-state-*.pkl", "cannot read")):
        file = max((out / "tune").glob(pattern))
        content = file.read_bytes()
        file.write_bytes(content[: len(content) // 2])
        with pytest.raises(UserError, match=message):
            search(SMALL, config, space, few_data, str(out), resume=True)
        file.write_bytes(content)
    assert epochs_of(out) == before
    assert not (out / "search.json").exists()
    trials = search(SMALL, config, space, few_data, str(out), resume=True).trials
    assert [(trial.status, trial.epochs) for trial in trials] == [("finished", 3)] * 2


def test_a_search_without_a_noted_trial_begins(few_data: str, tmp_path: Path) -> None:
    """Killed between Tune's first file and its first note."""
    config = SearchConfig(**LOSS, searcher="tpe", scheduler="none", max_trials=2, max_concurrent=1)
    space, out = Space((Dimension("optim.lr", "loguniform", (0.001, 0.01)),)), tmp_path / "s"
    base = SMALL.model_copy(update={"train": SMALL.train.model_copy(update={"epochs": 1})})
    claim(str(out), identity(base, config, space, read_card(few_data)), resume=False)
    (out / "tune").mkdir()
    (out / "tune" / "tuner.pkl").touch()
    assert len(search(base, config, space, few_data, str(out), resume=True).trials) == 2


class Unreadable:
    """A listener that takes the images away after the first epoch, until it is left."""

    def __init__(self, data: Path) -> None:
        self.data, self.away = data, data.with_name("away")

    def on_trial_start(self, trial_id: str, params: dict[str, Any]) -> None: ...

    def on_trial_epoch(self, trial_id: str, metrics: dict[str, Any]) -> None:
        if not self.away.exists():
            self.data.rename(self.away)

    def on_trial_end(self, trial_id: str, status: str) -> None:
        self.away.rename(self.data)


def test_a_trial_that_failed_after_an_epoch_is_tried_again(few_data: str, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(few_data, data)
    base = SMALL.model_copy(update={"train": SMALL.train.model_copy(update={"max_failures": 0, "epochs": 2})})
    config = SearchConfig(**LOSS, searcher="random", scheduler="none", max_trials=1, max_concurrent=1, max_hours=2.0)
    space = Space((Dimension("optim.lr", "choice", (0.003,)),))
    reason = "none of 1 trials .*val-00000"
    with pytest.raises(UserError, match=reason):
        search(base, config, space, str(data), str(tmp_path / "s"), listeners=[Unreadable(data)])
    shutil.copytree(tmp_path / "s", tmp_path / "aside")
    (tmp_path / "s" / "hours.json").write_text('{"hours": 2.5}')
    with pytest.raises(UserError, match=reason):  # it stays what it is while no hour is left to try it in
        search(base, config, space, str(data), str(tmp_path / "s"), resume=True)
    shutil.rmtree(tmp_path / "s")
    (tmp_path / "aside").rename(tmp_path / "s")
    result = search(base, config, space, str(data), str(tmp_path / "s"), resume=True)
    assert [(trial.status, trial.epochs) for trial in result.trials] == [("finished", 2)]


def check_what_optuna_learnt(out: Path, trials: list[dict]) -> None:
    """The sampler's last state holds every trial with its value, also of those before the kill."""
    searcher = OptunaSearch()
    searcher.restore(str(max((out / "tune").glob("searcher-state-*.pkl"))))
    told = {trial.params["optim.lr"]: trial.value for trial in searcher._ot_study.trials if trial.value is not None}
    assert told == {trial["params"]["optim.lr"]: trial["value"] for trial in trials}


@pytest.mark.slow
def test_trials_of_several_workers_run_as_ray_train_jobs_and_stop_early(
    phantom_data: str, searches: Searches, tmp_path: Path
) -> None:
    yaml = write_space(tmp_path, "optim.lr: {choice: [0.003, 0.000000001]}")
    train = BASE.train.model_copy(update={"num_workers": 2, "worker_cpus": 0.5})
    data = BASE.data.model_copy(update={"task_cpus": 0.2})
    asha = {"grace_epochs": 1, "reduction_factor": 2, "max_concurrent": 1}
    config = SearchConfig(**asha, searcher="grid", keep_trials=1, cpus_for_data=0.5)
    out = tmp_path / "search"
    base = BASE.model_copy(update={"train": train, "data": data})
    refused = searches.start(phantom_data, out, base, config, yaml)  # the tests' own cluster runs on this machine
    assert refused.wait(timeout=100) != 0
    assert "other Ray cluster" in searches.said()
    runtime.stop()
    try:
        searches.ended_well(searches.start(phantom_data, out, base, config, yaml))
    finally:
        runtime.start(num_cpus=2)
    trials = json.loads((out / "search.json").read_text())["trials"]
    found = [(trial["params"]["optim.lr"], trial["status"], trial["epochs"]) for trial in trials]
    assert found == [(0.003, "finished", 3), (0.000000001, "stopped", 1)]
    assert read_info(out / "best").config["train"]["num_workers"] == 2
    left = {path.relative_to(out / "trials").parts[0] for path in (out / "trials").rglob("model.safetensors")}
    assert left == {json.loads((out / "search.json").read_text())["best"]}


def test_a_search_is_not_continued_with_another_budget(tmp_path: Path) -> None:
    """Tune restores the budget that it began with: a new one would be ignored without a word."""
    card, space = SimpleNamespace(digest="d"), Space((Dimension("optim.lr", "loguniform", (0.001, 0.01)),))
    claim(str(tmp_path), identity(BASE, SearchConfig(max_trials=4), space, card), resume=False)
    with pytest.raises(UserError, match=r"search\.keep_trials = 3, not 1"):  # `Keep` deletes by what it began with
        claim(str(tmp_path), identity(BASE, SearchConfig(max_trials=4, keep_trials=1), space, card), resume=True)
    with pytest.raises(UserError, match=r"search\.max_trials = 4, not 8"):
        claim(str(tmp_path), identity(BASE, SearchConfig(max_trials=8), space, card), resume=True)


def test_a_search_whose_hours_are_spent_trains_nothing(few_data: str, tmp_path: Path) -> None:
    out = tmp_path / "search"
    out.mkdir()
    (out / "hours.json").write_text('{"hours": 2.5}')
    space = Space((Dimension("optim.lr", "loguniform", (0.001, 0.01)),))
    config = SearchConfig(**LOSS, searcher="random", scheduler="none", max_trials=50, max_concurrent=1, max_hours=2.0)
    with pytest.raises(UserError, match=r"none of \d trials .*search\.max_hours 2 are spent"):
        search(SMALL, config, space, few_data, str(out))


def test_there_must_be_a_search_to_resume(phantom_data: str, tmp_path: Path) -> None:
    space = Space((Dimension("optim.lr", "loguniform", (0.001, 0.01)),))
    with pytest.raises(UserError, match="holds no search to resume"):
        search(BASE, SearchConfig(**LOSS), space, phantom_data, str(tmp_path / "nothing"), resume=True)
