"""search.html: true to a search whose truth is known; made from files alone, safe to open, the same bytes each time."""

import json
import math
import random
import re
from pathlib import Path
from typing import Any

import optuna
import pytest
from pages import Page

from mpc.errors import MissingError, UserError
from pipeline.config import RunConfig
from tuning.domains import Dimension, Space
from tuning.report import write_search
from tuning.report.learned import importances, lead_of, levelled, read_search

LR = Dimension("optim.lr", "loguniform", (0.0001, 0.01))
DIMENSIONS = (
    LR,
    Dimension("loss.lambda_ipc", "uniform", (0.0, 1.0)),
    Dimension("views.strong.ops", "int", (1, 3)),
    Dimension("loss.sup", "choice", ("an", "em")),
    Dimension("baseline.em_alpha", "uniform", (0.1, 0.4), (("loss.sup", ("em",)),)),
)
SECTIONS = ["winner", "parallel", "importance", "slices", "contour", "curves", "time", "front", "trials", "limits"]


def trial(name: str, values: list[float], status: str = "finished", **extra: Any) -> dict[str, Any]:
    """A trial as search.json holds it, with its learning curve, which `write` takes out."""
    base = {"params": {}, "error": None, "cost": 10.0, "started": 1e9, "ended": 1e9 + 60, "legs": []}
    best = max(values, default=None)
    return {"trial_id": name, "status": status, "epochs": len(values), "value": best, "curve": values, **base, **extra}


def write(out: Path, trials: list[dict[str, Any]], dimensions: tuple[Dimension, ...] = (LR,), **search: Any) -> str:
    """The files of a search that has ended."""
    for entry in trials:
        lines = [{"epoch": n, "val_macro_auroc": v, "seconds": 30.0} for n, v in enumerate(entry.pop("curve"), 1)]
        folder = out / "trials" / entry["trial_id"]
        folder.mkdir(parents=True)
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    valued = [entry for entry in trials if entry["value"] is not None and entry["status"] != "failed"]
    record = {
        "schema_version": 1,
        "synthetic": True,
        "metric": "val_macro_auroc",
        "mode": "max",
        "max_epochs": 3,
        "config": RunConfig().model_dump(mode="json"),
        "search": {"searcher": "tpe", "scheduler": "asha", "reduction_factor": 3.0, "cost": "seconds", **search},
        "space": dict(Space(dimensions).describe()),
        "domains": {dimension.path: dimension.written() for dimension in dimensions},
        "data_digest": "d" * 64,
        "rungs": [1.0],
        "ended_by": "trials",
        "warm_start": {"used": [], "left_out": []},
        "best": max(valued, key=lambda entry: entry["value"])["trial_id"],
        "trials": trials,
    }
    (out / "search.json").write_text(json.dumps(record))
    return str(out)


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> str:
    """40 trials whose value is their rate's alone, best at the upper bound; every third was stopped after an epoch."""
    study, draws, trials = optuna.create_study(sampler=optuna.samplers.RandomSampler(0)), random.Random(0), []
    for number in range(40):
        settings = Space(DIMENSIONS).suggest(study.ask())
        good = 0.7 + 0.1 * LR.share(settings["optim.lr"]) + 0.002 * draws.random()
        stopped = number % 3 == 0
        curve = [good - 0.2, good - 0.1, good][: 1 if stopped else 3]
        moments = {"started": 1e9 + 60 * number, "ended": 1e9 + 60 * number + 30 * len(curve)}
        more = {"params": settings, "cost": 10.0 + settings["views.strong.ops"], **moments}
        trials.append(trial(f"t{number:02}", curve, "stopped" if stopped else "finished", **more))
    broken = {"error": "UserError: <b>5 heads</b>", "cost": None, "params": trials[0]["params"]}
    trials.append(trial("broken", [], "failed", **broken))
    return write(tmp_path_factory.mktemp("known"), trials, DIMENSIONS)


@pytest.fixture(scope="module")
def page(known: str) -> str:
    return Path(write_search(known)).read_text(encoding="utf-8")


def test_what_matters_is_found_although_trials_were_stopped(known: str, page: str) -> None:
    rows = importances(read_search(known))
    assert rows[0].path == "optim.lr"
    assert rows[0].share > 0.8
    assert rows[0].low > max(row.high for row in rows[1:]), "no resample doubts it"
    assert {row.path for row in rows} == {d.path for d in DIMENSIONS if not d.when}
    words = Page(page).words
    assert "No share for baseline.em_alpha" in words["importance"]
    assert "optim.lr and" in words["contour"]
    assert "widen optim.lr" not in words["winner"], "the best rate is no bound"


def test_the_headline_says_who_won_by_how_much_and_at_what_cost(known: str, page: str) -> None:
    found, read = read_search(known), Page(page)
    epochs = 26 * 3 + 14
    lead = lead_of(found)
    assert f"{found.best['value']:.4f}" in read.words["head"]
    assert f"{lead.on_second:.4f} ahead of the second and {lead.on_median:.4f} ahead" in read.words["head"]
    assert f"took {epochs} of 123 epochs (75 %) and {epochs * 30 / 60:.1f} min of training" in read.words["head"]
    assert "26 finished, 14 stopped early, 1 failed" in read.words["trials"]
    assert read.row("t00")[2] == "1 / 3"
    assert read.row("broken")[-1] == "UserError: <b>5 heads</b>", "a trial's error is text, not markup"
    assert "epoch 1: one in 3 went on" in read.words["curves"]
    assert read.row("optim.lr")[1:3] == ["0.0001", f"{found.best['params']['optim.lr']:.3g}"]


def test_the_page_needs_nothing_else_and_has_every_section(known: str, page: str) -> None:
    read = Page(page)
    assert [attributes["id"] for tag, attributes in read.tags if tag == "section"] == SECTIONS
    assert not {tag for tag, _ in read.tags} & {"script", "link", "iframe", "object", "base", "form"}
    for _, attributes in read.tags:
        assert (attributes.get("src") or "data:image/").startswith("data:image/")
        assert (attributes.get("href") or "#").startswith("#")
    assert not re.search(r"url\(|@import|https?://", re.sub(r'src="data:[^"]*"', "", page))
    assert all(image["alt"] for image in read.images())
    assert {str(a["href"])[1:] for tag, a in read.tags if tag == "a"} == set(SECTIONS)
    assert "SYNTHETIC DATA" in read.words["head"]
    assert Path(write_search(known)).read_text(encoding="utf-8") == page


def test_stopped_trials_are_credited_with_what_the_others_gained(tmp_path: Path) -> None:
    trials = [
        trial("winner", [0.5, 0.6, 0.9]),
        trial("second", [0.55, 0.7, 0.65]),
        trial("early", [0.4], "stopped"),
        trial("late", [0.5, 0.6], "stopped"),
        trial("near", [0.8], "stopped"),
    ]
    level = levelled(read_search(write(tmp_path, [{**t, "params": {"optim.lr": 0.001}} for t in trials])))
    # after the first epoch they gained 0.4, 0.15 and 0.1; after the second 0.3 and 0; none ends above the winner
    assert level == pytest.approx({"winner": 0.9, "second": 0.7, "early": 0.55, "late": 0.75, "near": 0.9})


def test_a_setting_that_was_off_where_it_was_not_searched_lies_apart(tmp_path: Path) -> None:
    """Its logarithm does not exist."""
    fpc = Dimension("loss.lambda_fpc", "loguniform", (0.1, 1.0), (("loss.sup", ("em",)),))
    searched = [{"loss.sup": "an"}, {"loss.sup": "em", "loss.lambda_fpc": 0.5}]
    trials = [trial(f"t{n:02}", [0.5 + n / 100], params=searched[n % 2]) for n in range(12)]
    write(tmp_path, trials, (DIMENSIONS[3], fpc))
    record = json.loads((tmp_path / "search.json").read_text())
    record["config"]["loss"]["lambda_fpc"] = 0.0
    (tmp_path / "search.json").write_text(json.dumps(record))
    read = Page(Path(write_search(str(tmp_path))).read_text(encoding="utf-8"))
    assert "No share for loss.lambda_fpc" in read.words["importance"]


def test_the_winner_is_the_trial_whose_checkpoint_there_is(tmp_path: Path) -> None:
    """Lost trials, and those whose checkpoints are gone, win nothing; without settings they teach nothing either."""
    trials = [trial(f"t{n:02}", [0.5 + n / 100], params={"optim.lr": 0.001 * (n % 7 + 1)}) for n in range(12)]
    lost = [trial("lost", [0.9], "lost", params={"optim.lr": 0.001}), trial("blank", [0.95], "lost")]
    write(tmp_path, [*trials, *lost])
    for best, lead in (("t11", 0.01), ("t10", -0.01)):
        record = json.loads((tmp_path / "search.json").read_text()) | {"best": best}
        (tmp_path / "search.json").write_text(json.dumps(record))
        found = lead_of(read_search(str(tmp_path)))
        assert found.on_second == pytest.approx(lead)
        assert found.on_median == pytest.approx(0.055 if best == "t11" else 0.045)
        assert found.finished == 12
    read = Page(Path(write_search(str(tmp_path))).read_text(encoding="utf-8"))
    assert "Trial t10 won, 0.0100 behind a trial that has no checkpoint left and 0.0450 ahead of" in read.words["head"]
    assert "between the 13 trials" in read.words["importance"]
    assert "1 lost before noting their settings" in read.words["importance"]
    assert "2 lost" in read.words["trials"]


def test_tied_values_make_a_page(tmp_path: Path) -> None:
    """A resample without the one trial that differs has nothing to explain."""
    trials = [trial(f"t{n:02}", [0.5 + (n == 9) / 10], params={"optim.lr": 0.001 * (n + 1)}) for n in range(10)]
    (row,) = importances(read_search(write(tmp_path, trials)))
    assert row.low == 0.0
    assert row.share > 0.5
    assert "0 to 100 %" in Page(Path(write_search(str(tmp_path))).read_text(encoding="utf-8")).words["importance"]


def test_trials_that_are_all_credited_up_to_the_winner_claim_nothing(tmp_path: Path) -> None:
    stopped = [trial(f"t{n:02}", [0.6 + n / 100], "stopped", params={"optim.lr": 0.001 * (n + 1)}) for n in range(9)]
    trials = [trial("winner", [0.5, 0.7, 0.9], params={"optim.lr": 0.01}), *stopped]
    read = Page(Path(write_search(write(tmp_path, trials))).read_text(encoding="utf-8"))
    assert "10 trials with equal values are too few to tell settings apart" in read.words["importance"]
    assert "contour" not in read.words


def test_few_trials_claim_nothing(tmp_path: Path) -> None:
    trials = [trial(f"t{n}", [0.5 + n / 100], params={"optim.lr": 0.001 * (n + 1)}, cost=None) for n in range(3)]
    read = Page(Path(write_search(write(tmp_path, trials))).read_text(encoding="utf-8"))
    assert "3 trials with a value are too few" in read.words["importance"]
    assert not {"contour", "front"} & read.words.keys()
    assert "a trend of few dots is no proof" in read.words["slices"]


def test_one_trial_and_a_metric_to_minimise_make_a_page(tmp_path: Path) -> None:
    only = trial("only", [0.5, 0.4], started=None, ended=None, params={"optim.lr": 0.01})
    place = write(tmp_path, [only])
    record = json.loads((tmp_path / "search.json").read_text())
    (tmp_path / "search.json").write_text(json.dumps(record | {"mode": "min"}))
    read = Page(Path(write_search(place)).read_text(encoding="utf-8"))
    assert "time" not in read.words
    assert "Trial only won. It took" in read.words["head"]
    assert "widen optim.lr and search again" in read.words["winner"], "it lies at the upper bound"


def test_places_in_a_domain_are_shares_of_it() -> None:
    assert LR.share(0.001) == pytest.approx(0.5)
    assert math.isclose(LR.at(0.5), 0.001)
    sup = DIMENSIONS[3]
    assert [sup.share(value) for value in ("an", "em")] == [0.0, 1.0]
    assert [Dimension.of(d.path, json.loads(json.dumps(d.written()))) for d in DIMENSIONS] == list(DIMENSIONS)


def test_a_search_that_has_not_ended_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match="once the search has ended"):
        write_search(str(tmp_path))
    (tmp_path / "search.json").write_text('{"schema_version": 2}')
    with pytest.raises(UserError, match="another version"):
        write_search(str(tmp_path))
