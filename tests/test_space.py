"""Search spaces: read as they are written, drawn from within their bounds and conditions, refused in one line."""

import math
import random
from collections import Counter
from pathlib import Path

import optuna
import pytest
from optuna.samplers import RandomSampler

from mpc.errors import UserError
from pipeline.config import RunConfig
from pipeline.dotted import flat
from tuning import space as spaces
from tuning.domains import Dimension, Settings, Space

BASE = RunConfig()
CONDITIONAL = """
    baseline.em_alpha: {qloguniform: [0.05, 0.4, 0.05], when: {loss.sup: em}}
    loss.sup: {choice: [an, wan, em]}
    pseudo.align: {choice: [none, distribution]}
    pseudo.kappa: {quniform: [1.5, 3.0, 0.5], when: {pseudo.align: distribution, loss.sup: [an, em]}}
"""


def read(folder: Path, text: str, base: RunConfig = BASE) -> Space:
    path = folder / "space.yaml"
    path.write_text(text)
    return spaces.load(str(path), base)


def draws(space: Space, count: int = 200) -> list[Settings]:
    """What the random searcher proposes."""
    study = optuna.create_study(sampler=RandomSampler(0))
    return [space.suggest(study.ask()) for _ in range(count)]


def test_a_space_is_read_as_it_is_written(tmp_path: Path) -> None:
    text = """
        optim.lr: {loguniform: [3e-4, 0.01]}
        views.strong.ops: {int: [1, 3]}
        views.red.rms: {quniform: [0.0, 0.014, 0.002]}
        loss.sup: {choice: [an, wan]}
    """
    space = read(tmp_path, text)
    assert space.dimensions[0] == Dimension("optim.lr", "loguniform", (0.0003, 0.01))
    drawn = draws(space)
    assert {d["views.strong.ops"] for d in drawn} == {1, 2, 3}  # both ends belong to it
    assert {d["views.red.rms"] for d in drawn} == {0, 0.002, 0.004, 0.006, 0.008, 0.01, 0.012, 0.014}
    run = spaces.apply(BASE, drawn[0], "trial")
    assert run.optim.lr == drawn[0]["optim.lr"]
    assert run.train == BASE.train
    for shipped in ("demo", "mpc", "mpc-abstract"):
        assert spaces.load(shipped, BASE).dimensions


@pytest.mark.parametrize(
    ("domain", "allowed"),
    [
        ("qint: [8, 32, 8]", {8, 16, 24, 32}),
        ("logint: [1, 8]", set(range(1, 9))),
        ("qlogint: [4, 20, 4]", {4, 8, 12, 16, 20}),
    ],
)
def test_numbers_come_in_their_steps(domain: str, allowed: set[int], tmp_path: Path) -> None:
    space = read(tmp_path, f"train.batch_size: {{{domain}}}")
    random.seed(0)
    for values in ([d["train.batch_size"] for d in draws(space)], [space.dimensions[0].draw() for _ in range(400)]):
        assert set(values) == allowed
        assert all(type(value) is int for value in values)


def test_logarithmic_domains_are_even_in_the_logarithm(tmp_path: Path) -> None:
    space = read(tmp_path, "optim.lr: {loguniform: [1e-5, 1e-1]}")
    random.seed(0)
    for values in ([d["optim.lr"] for d in draws(space, 1000)], [space.dimensions[0].draw() for _ in range(1000)]):
        decades = Counter(math.floor(math.log10(value)) for value in values)
        assert all(200 < decades[decade] < 300 for decade in (-5, -4, -3, -2))


def test_a_setting_is_searched_only_where_its_condition_holds(tmp_path: Path) -> None:
    with_kappa = RunConfig.model_validate({"pseudo": {"kappa": 2.0}})  # for loss.sup=wan, where it is not searched
    space = read(tmp_path, CONDITIONAL, with_kappa)
    drawn = draws(space)
    for settings in drawn:
        assert ("baseline.em_alpha" in settings) == (settings["loss.sup"] == "em")
        both = settings["pseudo.align"] == "distribution" and settings["loss.sup"] != "wan"
        assert ("pseudo.kappa" in settings) == both
    alphas = {s["baseline.em_alpha"] for s in drawn if "baseline.em_alpha" in s}
    assert alphas == {0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4}
    run = spaces.apply(BASE, {"loss.sup": "an", "pseudo.align": "none"}, "trial")
    assert run.baseline.em_alpha == BASE.baseline.em_alpha, "what is not searched keeps the base's value"
    assert dict(space.describe())["baseline.em_alpha"].endswith("0.05 when loss.sup is em")


def test_a_grid_holds_each_combination_once(tmp_path: Path) -> None:
    text = """
        loss.sup: {choice: [an, em]}
        baseline.em_alpha: {quniform: [0.1, 0.3, 0.1], when: {loss.sup: em}}
        views.strong.ops: {int: [1, 2]}
    """
    points = list(read(tmp_path, text).grid())
    assert len(points) == (1 + 3) * 2
    assert {tuple(sorted(point.items())) for point in points} == {tuple(sorted(point.items())) for point in points}
    assert {"loss.sup": "an", "views.strong.ops": 2} in points
    assert {"loss.sup": "em", "views.strong.ops": 1, "baseline.em_alpha": 0.2} in points
    with pytest.raises(UserError, match=r"optim\.lr: a grid needs steps"):
        next(read(tmp_path, "optim.lr: {uniform: [0.1, 0.2]}").grid())


@pytest.mark.parametrize(
    ("line", "points"),
    [
        ("baseline.em_alpha: {qloguniform: [0.1, 0.4, 0.1]}", [0.1, 0.2, 0.3, 0.4]),
        ("train.batch_size: {qlogint: [4, 20, 4]}", [4, 8, 12, 16, 20]),
        ("train.batch_size: {logint: [1, 4]}", [1, 2, 3, 4]),
        ("train.batch_size: {qint: [8, 24, 8]}", [8, 16, 24]),
    ],
)
def test_a_grid_takes_every_domain_with_steps(line: str, points: list[float], tmp_path: Path) -> None:
    path = line.partition(":")[0]
    assert [settings[path] for settings in read(tmp_path, line).grid()] == points


def test_choices_are_what_the_configuration_makes_of_them(tmp_path: Path) -> None:
    """YAML 1.1 leaves 1e-4 a text, and 0 a whole number."""
    text = """
        optim.lr: {choice: [1e-4, 3e-4]}
        views.hflip: {choice: [0, 0.5], when: {optim.lr: 0.0001}}
        pseudo.kappa: {choice: [null, 2], when: {views.hflip: [0, 5e-1]}}
    """
    lr, flip, kappa = read(tmp_path, text).dimensions
    assert lr == Dimension("optim.lr", "choice", (0.0001, 0.0003))
    assert flip == Dimension("views.hflip", "choice", (0.0, 0.5), (("optim.lr", (0.0001,)),))
    assert kappa.when == (("views.hflip", (0.0, 0.5)),)
    for dimension in (lr, flip, kappa):
        for value in dimension.values:
            held = flat(spaces.apply(BASE, {dimension.path: value}, "trial").model_dump(mode="json"))[dimension.path]
            assert (value, type(value)) == (held, type(held))
            assert dimension.share(held) in (0.0, 1.0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optim.lrr: {uniform: [0.1, 0.2]}", "did you mean optim.lr?"),
        ("optim.lr: {normal: [0.1, 0.2]}", "unknown domain normal"),
        ("optim.lr: {uniform: [0.2, 0.1]}", "lower bound 0.2"),
        ("optim.lr: {loguniform: [0, 0.1]}", "above 0"),
        ("optim.lr: {uniform: [0.1]}", "takes 2 numbers"),
        ("optim.lr: {uniform: [low, high]}", "takes 2 numbers"),
        ("views.strong.ops: {int: [0, 9]}", "views.strong.ops"),
        ("views.strong.ops: {int: [0, 1.5]}", "2 whole numbers"),
        ("views.red.rms: {quniform: [0.0, 0.01, 0.003]}", "no whole steps of 0.003"),
        ("loss.sup: {choice: [an, wun]}", "loss.sup"),
        ("loss.sup: {choice: [[an], wan]}", "takes numbers, texts"),
        ("optim.lr: 0.1", "needs one domain"),
        ("optim.lr: {uniform: [0.1, 0.2], int: [1, 2]}", "needs one domain"),
        ("[1, 2", "not valid YAML"),
        ("", "holds no mapping"),
        ("loss: {choice: [an]}", "loss is a section; search the settings in it, such as loss.sup"),
        ("train.epochs: {int: [1, 9]}", "train.epochs is the same for all trials"),
        ("views.red.rms: {uniform: [0.0, 0.014]}\nviews.red.sigma: {uniform: [0.03, 0.05]}", "rms 0.014 with sigma"),
        ("pseudo.align: {choice: [none, distribution]}", "pseudo.align distribution: pseudo: align=distribution needs"),
        (CONDITIONAL, "loss.sup wan with pseudo.align distribution"),
        ("optim.lr: {uniform: [0.1, 0.2], when: {loss.sup: em}}", "when names loss.sup, which is no choice"),
        ("loss.sup: {choice: [an]}\noptim.lr: {uniform: [0.1, 0.2], when: {loss.sup: em}}", "which it never takes"),
        ("optim.lr: {uniform: [0.1, 0.2], when: em}", "write its condition as when:"),
        (
            "loss.sup: {choice: [an], when: {loss.norm: all}}\nloss.norm: {choice: [all], when: {loss.sup: an}}",
            "conditions run in a circle",
        ),
    ],
)
def test_a_wrong_space_is_one_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        read(tmp_path, text)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_values_that_exclude_each_other_are_found_in_a_large_space(tmp_path: Path) -> None:
    """Too many corners to try them all: every pair is tried."""
    many = "\n".join(f"{path}: {{uniform: [0.1, 0.2]}}" for path in [
        "optim.lr", "optim.weight_decay", "loss.lambda_ipc", "loss.lambda_fpc", "loss.lambda_btc", "views.hflip",
        "views.strong.blur", "views.strong.cutout",
    ])  # fmt: skip
    assert read(tmp_path, f"{many}\npseudo.tau_pos: {{uniform: [0.6, 0.9]}}").dimensions
    with pytest.raises(UserError, match=r"tau_neg 0\.8 lies above tau_pos 0\.6"):
        read(tmp_path, f"{many}\npseudo.tau_pos: {{uniform: [0.6, 0.9]}}\npseudo.tau_neg: {{uniform: [0.1, 0.8]}}")


def test_what_a_schedule_sets_is_not_searched(tmp_path: Path) -> None:
    train = {"epochs": 3, "schedule": [{"epoch": 1, "settings": {"optim.lr": 0.1}}]}
    with pytest.raises(UserError, match=r"optim\.lr is searched, and train\.schedule sets it"):
        read(tmp_path, "optim.lr: {uniform: [0.1, 0.2]}", RunConfig.model_validate({"train": train}))


def test_a_space_that_does_not_exist_names_those_that_do() -> None:
    with pytest.raises(UserError, match="demo, mpc"):
        spaces.load("mcp", BASE)
