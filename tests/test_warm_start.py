"""Trials of an earlier search in a real MLflow database as the beginning of another one."""

from pathlib import Path
from typing import Any

import optuna
import pytest
from conftest import free_port

from mpc.errors import MissingError, UserError
from pipeline.config import RunConfig
from tuning.config import SearchConfig
from tuning.domains import Dimension, Space
from tuning.record import RunRecord, Status
from tuning.searchers import STUDY, Known, make_proposals
from tuning.store import client_of
from tuning.tracking import Tracker
from tuning.warm import Target, earlier_trials

BASE = RunConfig()
SPACE = Space(
    (
        Dimension("optim.lr", "loguniform", (0.0001, 0.01)),
        Dimension("loss.sup", "choice", ("an", "em")),
        Dimension("baseline.em_alpha", "uniform", (0.1, 0.4), (("loss.sup", ("em",)),)),
    )
)
AUROC = "val_macro_auroc"


def record(key: str, name: str, parent: str | None = None, **tags: str) -> RunRecord:
    return RunRecord(key=key, name=name, experiment="test", parent=parent, tags={"data.digest": "d", **tags})


def write_search(uri: str, name: str, trials: list[dict[str, Any]], digest: str = "d", **search: str) -> None:
    """A search as `tune` records it: settings of the run with the parent, sampled ones with each trial."""
    tracker = Tracker(uri, "test")
    parent = tracker.start_run(record(name, name, **{"data.digest": digest}))
    tracker.log_config(parent, {**BASE.model_dump(mode="json"), "search": search})
    for number, trial in enumerate(trials):
        run = tracker.start_run(record(f"{name}/{number}", str(number), name), parent)
        tracker.log_config(run, trial["settings"])
        for epoch, value in enumerate(trial["values"], 1):
            tracker.log_epoch(run, {AUROC: value}, epoch)
        tracker.end_run(run, trial.get("status", Status.FINISHED))
    tracker.end_run(parent, Status.FINISHED)
    assert tracker.close() == 0


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    place = f"sqlite:///{tmp_path_factory.mktemp('warm') / 'mlflow.db'}"
    trials = [
        {"settings": {"optim.lr": 0.002, "loss.sup": "an"}, "values": [0.6, 0.8, 0.7]},
        {"settings": {"optim.lr": 0.003, "loss.sup": "em", "baseline.em_alpha": 0.25}, "values": [0.65]},
        {"settings": {"loss.sup": "em"}, "values": [0.9]},  # optim.lr and em_alpha as the search's run had them
        {"settings": {"optim.lr": 0.5, "loss.sup": "an"}, "values": [0.9]},
        {"settings": {"optim.lr": 0.002, "loss.sup": "wan"}, "values": [0.9]},
        {"settings": {"optim.lr": 0.002, "loss.sup": "an", "pseudo.tau_pos": 0.9}, "values": [0.9]},
        {"settings": {"optim.lr": 0.002, "loss.sup": "an"}, "values": []},
        {"settings": {"optim.lr": 0.002, "loss.sup": "an"}, "values": [0.9], "status": Status.FAILED},
    ]
    write_search(place, "before", trials)
    write_search(place, "elsewhere", trials[:1], digest="another")
    write_search(place, "moving", trials[:1], scheduler="pbt")
    write_search(place, "twin", trials[:1])
    return place


def beginning(uri: str, *names: str, **search: Any) -> Any:
    config = SearchConfig(warm_start=names, **search)
    return earlier_trials(uri, "test", Target(BASE, config, SPACE, "d"))


def test_trials_that_fit_are_known_and_the_others_are_listed_with_their_reasons(uri: str) -> None:
    found = beginning(uri, "before")
    assert sorted(found.known, key=lambda known: known.settings["optim.lr"]) == [
        Known({"optim.lr": 0.0001, "loss.sup": "em", "baseline.em_alpha": 0.2}, 0.9),
        Known({"optim.lr": 0.002, "loss.sup": "an"}, 0.8),
        Known({"optim.lr": 0.003, "loss.sup": "em", "baseline.em_alpha": 0.25}, 0.65),
    ]
    reasons = sorted(item["reason"] for item in found.left_out)
    assert reasons == [
        "it has no val_macro_auroc",
        "it is FAILED",
        "loss.sup wan lies outside choice an, em",
        "optim.lr 0.5 lies outside loguniform 0.0001, 0.01",
        "pseudo.tau_pos was 0.9, is 0.6 here and is not searched",
    ]


@pytest.mark.parametrize(
    ("name", "search", "reason"),
    [
        ("elsewhere", {}, "it was trained on other data"),
        ("moving", {}, "its settings changed while it trained"),
        ("twin", {"searcher": "pareto", "scheduler": "none"}, "its cost in seconds does not compare"),
    ],
)
def test_what_does_not_compare_is_left_out(uri: str, name: str, search: dict[str, Any], reason: str) -> None:
    found = beginning(uri, name, **search)
    assert [item["reason"] for item in found.left_out] == [reason]
    assert not found.known


def test_a_search_is_found_by_its_run_id_and_missed_by_no_other_name(uri: str) -> None:
    tracker = Tracker(uri, "test")
    first, _ = (tracker.start_run(record(key, "double")) for key in ("one", "two"))
    run_id = tracker.run_id(first)
    tracker.close()
    assert beginning(uri, str(run_id)) == ([], [])
    with pytest.raises(UserError, match="2 searches are called double; give one of the run ids"):
        beginning(uri, "double")
    with pytest.raises(MissingError, match="no search nothing"):
        beginning(uri, "nothing")


def test_looking_up_a_search_makes_nothing(uri: str, tmp_path: Path) -> None:
    target = Target(BASE, SearchConfig(warm_start=("before",)), SPACE, "d")
    with pytest.raises(MissingError, match="no MLflow store at"):
        earlier_trials(f"sqlite:///{tmp_path / 'out' / 'mlflow.db'}", "test", target)
    assert not list(tmp_path.iterdir()), "the corrected command would find --out not empty"
    with pytest.raises(MissingError, match="no search before"):
        earlier_trials(uri, "another", target)
    assert client_of(uri).get_experiment_by_name("another") is None


def test_a_server_that_is_away_is_one_line() -> None:
    with pytest.raises(UserError, match=r"search\.warm_start: MLflow at") as caught:
        beginning(f"http://127.0.0.1:{free_port()}", "before")
    assert "\n" not in str(caught.value)


def test_a_file_that_is_no_database_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").write_bytes(b"no database" * 100)
    with pytest.raises(UserError, match=r"search\.warm_start: MLflow at .*not a database"):
        beginning(f"sqlite:///{tmp_path}/mlflow.db", "before")


def test_optuna_learns_from_what_is_known(uri: str) -> None:
    known = beginning(uri, "before").known
    tpe = make_proposals(SearchConfig(), SPACE, 1, known).algorithm
    study = optuna.load_study(study_name=STUDY, storage=tpe._storage)
    assert sorted(trial.value for trial in study.trials) == [0.65, 0.8, 0.9]
    assert all(trial.state.name == "COMPLETE" for trial in study.trials)
    assert study.direction.name == "MAXIMIZE"
    again = make_proposals(SearchConfig(searcher="random", max_trials=8), SPACE, 1, known).algorithm
    proposed = [again.suggest(str(number)) for number in range(3)]
    assert proposed[0] == {"optim.lr": 0.0001, "loss.sup": "em", "baseline.em_alpha": 0.2}, "the best one first"
    assert proposed[1] == {"optim.lr": 0.002, "loss.sup": "an"}
    assert proposed[2] not in proposed[:2], "then new ones"
