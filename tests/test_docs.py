"""Every command in README and docs is one that the command line takes: verb, flags, settings; and so is each space."""

import re
import shlex
from pathlib import Path

import pytest
import typer

from infra.benchmarking import load as load_protocol
from infra.cli.app import app
from infra.settings import load, presets, run_config
from infra.submit import call as calls_elsewhere
from pipeline.dotted import check_path
from tuning.space import load as load_space

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMAND = typer.main.get_command(app)


def blocks(language: str) -> list[tuple[str, str]]:
    """(page, text) of every fenced block of a language."""
    pattern = re.compile(rf"^```{language}\n(.*?)^```", re.MULTILINE | re.DOTALL)
    return [(page.name, text) for page in PAGES for text in pattern.findall(page.read_text(encoding="utf-8"))]


def calls() -> list[tuple[str, str]]:
    """(page, arguments) of every call of mpc-cxr in a bash block."""
    lines = [(page, line) for page, text in blocks("bash") for line in text.replace("\\\n", " ").splitlines()]
    return [(page, line.partition("mpc-cxr ")[2]) for page, line in lines if "mpc-cxr " in line]


def verbs(command: object, before: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], object]]:
    """Every verb with its path; `config show` is a verb of a group."""
    inner = getattr(command, "commands", None)
    if inner is None:
        return [(before, command)]
    return [found for name, part in inner.items() for found in verbs(part, (*before, name))]


def options(command: object) -> set[str]:
    named = (flag for parameter in command.params for flag in parameter.opts)  # type: ignore[attr-defined]
    return {flag for flag in named if flag.startswith("-")}  # the JOB of `jobs` is no flag


def configured(path: tuple[str, ...], context: typer.Context) -> object:
    """What the flags of a call configure: settings, the protocol of a benchmark, or the verb that is submitted."""
    if path == ("submit",):
        call = calls_elsewhere.read(COMMAND, context.args)  # type: ignore[arg-type]
        return call.settings
    read = load_protocol if path == ("benchmark",) else load
    return read(context.params.get("config"), context.params.get("set_") or [])


def write_files(page: str, folder: Path) -> None:
    """The settings that a page shows: every YAML block that opens with a comment, which names its file."""
    for owner, text in blocks("yaml"):
        if owner == page and (named := re.match(r"# (\S+\.yaml)\n", text)):
            (folder / named[1]).write_text(text)


@pytest.mark.parametrize(("page", "call"), calls())
def test_documented_commands_parse(page: str, call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_files(page, tmp_path)
    monkeypatch.chdir(tmp_path)
    arguments = shlex.split(call, comments=True)
    path, command = max((found for found in verbs(COMMAND) if arguments[: len(found[0])] == list(found[0])), key=len)
    context = command.make_context(" ".join(path), arguments[len(path) :])  # type: ignore[attr-defined]
    assert configured(path, context), page


def test_there_are_commands_to_check() -> None:
    documented = {shlex.split(call)[0] for _, call in calls()}
    assert documented >= {path[0] for path, _ in verbs(COMMAND)}, "the docs show every verb"


@pytest.mark.parametrize(("path", "command"), verbs(COMMAND))
def test_every_help_has_an_example_that_parses(path: tuple[str, ...], command: object) -> None:
    example = command.epilog.partition("Example: mpc-cxr ")[2]  # type: ignore[attr-defined]
    arguments = shlex.split(example.partition(" > ")[0])
    assert tuple(arguments[: len(path)]) == path
    context = command.make_context(" ".join(path), arguments[len(path) :])  # type: ignore[attr-defined]
    assert configured(path, context)


def test_flags_are_the_agreed_ones() -> None:
    agreed = "--source --root --data --out --checkpoint --model --images --split --space --config --set --resume"
    allowed = {*agreed.split(), "--dry-run", "--follow", "-v", "--help"}
    assert not {flag for _, command in verbs(COMMAND) for flag in options(command)} - allowed


@pytest.mark.parametrize(("page", "text"), [b for b in blocks("yaml") if "uniform" in b[1]])
def test_documented_spaces_load(page: str, text: str, tmp_path: Path) -> None:
    file = tmp_path / "space.yaml"
    file.write_text(text)
    assert load_space(str(file), run_config(load("mpc"))).dimensions


def test_every_preset_is_explained() -> None:
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    assert not [name for name in presets() if f"`{name}`" not in text]


def test_documented_settings_exist() -> None:
    settings = load()
    names = rf"`((?:{'|'.join(type(settings).model_fields)})(?:\.[a-z_]+)+)`"
    for page in PAGES:
        for path in re.findall(names, page.read_text(encoding="utf-8")):
            if not path.endswith((".json", ".html", ".py", ".csv", ".safetensors")):
                check_path(type(settings), path, page.name)
