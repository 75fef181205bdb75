"""Presets, files and --set become one checked configuration; every mistake is one line that names key and remedy."""

from pathlib import Path

import pytest

from infra.settings import Settings, load, presets, run_config
from mpc.errors import UserError
from pipeline.config import RunConfig
from pipeline.dotted import flat, leaves, merge, nested


def test_later_sources_win(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("loss: {lambda_ipc: 0.3, lambda_fpc: 0.2}\ntrain: {epochs: 5}\n")
    settings = load(str(file), ["loss.lambda_ipc=0.7", "loss.lambda_ipc=0.9", "optim.lr=1e-3"])
    assert settings.loss.lambda_ipc == 0.9
    assert settings.loss.lambda_fpc == 0.2
    assert settings.loss.lambda_btc == Settings().loss.lambda_btc
    assert settings.train.epochs == 5
    assert settings.optim.lr == 1e-3


def test_values_are_read_as_yaml() -> None:
    settings = load(
        None, ["prepare.findings=[Edema, Mass]", "train.use_gpu=true", "search.max_hours=null", "loss={sup: wan}"]
    )
    assert settings.prepare.findings == ("Edema", "Mass")
    assert settings.train.use_gpu is True
    assert settings.search.max_hours is None
    assert settings.loss.sup == "wan"


@pytest.mark.parametrize("name", presets())
def test_presets_load_and_say_what_they_are(name: str) -> None:
    load(name)
    assert presets()[name].endswith(".")


def test_a_written_configuration_reads_back(tmp_path: Path) -> None:
    settings = load("demo")
    file = tmp_path / "run.json"
    file.write_text(settings.model_dump_json())
    assert load(str(file)) == settings


def test_presets_differ_where_their_names_say() -> None:
    lac, an, wan = load("lac-plc"), load("an"), load("wan")
    assert (lac.loss.lambda_ipc, lac.loss.lambda_fpc, lac.loss.lambda_btc, lac.views.red.p) == (1, 0, 0, 0)
    assert not an.loss.needs_strong
    assert an.loss.model_copy(update={"sup": "wan"}) == wan.loss
    abstract = run_config(load("mpc-abstract"))
    assert abstract.model_copy(update={"model": RunConfig().model}) == RunConfig(), "the defaults are the page's"


def test_run_config_leaves_the_other_sections_out() -> None:
    run = run_config(load("demo"))
    assert type(run) is RunConfig
    assert set(run.model_dump()) == {"model", "views", "loss", "pseudo", "btc", "baseline", "optim", "data", "train"}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("loss.lambda_icp=1", r"unknown key loss\.lambda_icp in --set; did you mean loss\.lambda_ipc\?"),
        ("lambda_ipc=1", r"unknown key lambda_ipc in --set; did you mean loss\.lambda_ipc\?"),
        ("foo.bar=1", "unknown key foo.bar in --set; `mpc-cxr config show` lists every key"),
        ("loss.sup.x=1", "unknown key loss.sup.x in --set"),
        ("loss={sub: an}", "unknown key loss.sub in --set; did you mean loss.sup"),
        ("loss.lambda_ipc=-1", r"--set: loss\.lambda_ipc = -1: must be greater than or equal to 0"),
        ("pseudo.tau_pos=1.5", r"--set: pseudo\.tau_pos = 1\.5: must be less than 1"),
        ("loss.sup=bce", r"loss\.sup = 'bce': must be 'an', 'wan', 'an_ls' or 'em'"),
        ("pseudo.tau_neg=0.8", r"pseudo: tau_neg 0\.8 lies above tau_pos 0\.6; keep tau_neg <= tau_pos"),
        ("train.epochs=many", r"train\.epochs = 'many': must be a valid integer"),
        ("optim.lr=.nan", r"optim\.lr = nan: must be"),
        ("train.num_workers=3", r"batch_size 32 does not divide over 3 workers; use a multiple of 3"),
        ("train={num_workers: 4, min_workers: 2}", r"does not divide over 3 workers; .* of 12, or raise min_workers"),
        ("train.min_workers=2", r"min_workers 2 is above num_workers 1; lower it"),
        ("loss", r"--set loss: needs the form a\.b=value"),
        ("loss.sup=[", "is not valid YAML"),
    ],
)
def test_mistakes_are_one_line(override: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        load(None, [override])
    assert "\n" not in str(caught.value)


def test_files_are_named(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("loss:\n  lambda_icp: 1\n")
    with pytest.raises(UserError, match=rf"unknown key loss\.lambda_icp in {file}; did you mean loss\.lambda_ipc"):
        load(str(file))
    file.write_text("loss: [1\n")
    with pytest.raises(UserError, match=rf"{file}, line 2: is not valid YAML"):
        load(str(file))
    file.write_text("- loss\n")
    with pytest.raises(UserError, match="holds no mapping"):
        load(str(file))
    with pytest.raises(UserError, match=r"neither one of the presets .*demo.* nor a file"):
        load("dmeo")


def test_dotted_paths_and_trees() -> None:
    assert nested("a.b", 1) == {"a": {"b": 1}}
    assert flat({"a": {"b": 1, "c": {}}, "d": 2}) == {"a.b": 1, "a.c": {}, "d": 2}
    assert merge({"a": {"b": 1, "c": 2}}, {"a": {"b": 3}, "d": 4}) == {"a": {"b": 3, "c": 2}, "d": 4}
    assert {"views.red.rms", "loss.sup", "train.epochs"} <= set(leaves(RunConfig))
