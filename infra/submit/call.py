"""A verb's command line as `submit` was given it: read and checked here, so that a mistake costs no cluster."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import typer
import yaml
from typer.core import TyperCommand, TyperGroup

from infra import settings as files
from infra.cluster import ClusterConfig
from infra.settings import Settings
from mpc.config import NO_FILE
from mpc.errors import UserError
from pipeline import storage
from pipeline.dotted import flat

CLUSTER = "cluster."
HERE_ONLY = ("submit", "jobs", "serve")
PLACES = ("data", "out", "root", "images", "checkpoint")
"""Flags that name places."""
FILES = ("model.weights", "prepare.key_file", "prepare.split.file", "prepare.table.file")
"""Settings that name files."""


class Call(NamedTuple):
    """A verb with its arguments."""

    path: tuple[str, ...]
    """`("train",)`, `("config", "show")`."""
    command: TyperCommand
    params: dict[str, Any]
    """Values of its flags, as the command line reads them."""
    settings: Settings
    """What --config and --set describe, with the section `cluster`; defaults for verbs without them."""
    arguments: tuple[str, ...]
    """Its command line, without what only the cluster is told."""
    where: tuple[str, ...]
    """Flags that name the same cluster to `jobs`."""

    @property
    def verb(self) -> str:
        """The verb as people write it."""
        return " ".join(self.path)

    @property
    def cluster(self) -> ClusterConfig:
        """Where it shall run."""
        return self.settings.cluster


def read(command: TyperGroup, arguments: Sequence[str]) -> Call:
    """The verb that `arguments` name, with its flags, and with the cluster that `--set cluster.a=b` describes.

    Args:
        command: the whole command line of this project.
        arguments: what follows `submit`.

    Raises:
        UserError: no verb, one that only makes sense here, settings that do not exist.
        typer.TyperException: flags that the verb does not have.
    """
    own, rest = _cluster_settings(arguments)
    path, verb = _verb(command, rest)
    config = None
    if not any(parameter.name == "config" for parameter in verb.params):  # such as `check`: the cluster's alone
        config, rest = _taken(rest, "--config")
    params = verb.make_context(f"mpc-cxr {' '.join(path)}", list(rest[len(path) :])).params
    found = _settings(path, params, config, own)
    file = config or (params.get("config") if path != ("benchmark",) else None)
    where = [*(["--config", file] if file else []), *(f"--set={value}" for value in own)]
    return Call(path, verb, params, found, tuple(rest), tuple(where))


def configuration(call: Call) -> dict[str, Any] | None:
    """Settings, or the protocol of a benchmark, as one tree that needs no other file; None for verbs without them."""
    if "config" not in call.params:
        return None
    if call.path == ("benchmark",):
        from infra.benchmarking import resolved

        return resolved(call.params["config"], call.params["set_"] or ())
    return call.settings.model_dump(mode="json", exclude={"cluster"})


def space(call: Call) -> dict[str, Any] | None:
    """The search space in full; None for verbs that search nothing."""
    if "space" not in call.params:
        return None
    from tuning.space import load

    found = load(call.params["space"], files.run_config(call.settings))
    return {dimension.path: dimension.written() for dimension in found.dimensions}


def places(call: Call) -> Iterator[tuple[str, str]]:
    """Every flag and setting that names a place, with the place."""
    for name in PLACES:
        value = call.params.get(name)
        for place in value if isinstance(value, list | tuple) else [value]:
            if place is not None:
                yield f"--{name}", str(place)
    tree = flat(call.settings.model_dump(mode="json"))
    for name in FILES:
        place = tree.get(name)
        relevant = not name.startswith("prepare.") or call.path in (("prepare",), ("demo",))
        if isinstance(place, str) and place not in NO_FILE and relevant and not _below_root(name, place):
            yield name, place
    uri = call.settings.tracking.uri
    if uri is not None and uri.startswith("sqlite:///"):
        yield "tracking.uri", uri.removeprefix("sqlite:///")


def require_shared(call: Call, shared: Sequence[str]) -> None:
    """Refuses places that only this machine has.

    Args:
        call: the verb.
        shared: folders that all nodes see at the same path.

    Raises:
        UserError: a local place outside them, by its flag or setting.
    """
    folders = [Path(storage.absolute(folder)) for folder in shared]
    for name, place in places(call):
        if storage.is_remote(place):
            continue
        path = Path(os.path.normpath(storage.absolute(place)))
        if not any(path.is_relative_to(folder) for folder in folders):
            raise UserError(
                f"{name} {place}: is on this machine, and other nodes cannot reach it; use s3://BUCKET/..., or name a "
                f"folder that all nodes share in cluster.shared_paths"
            )


def arguments_of(call: Call, config: str | None, space: str | None, resume: bool) -> list[str]:
    """The command line that runs `call` elsewhere: settings and space from files, places absolute.

    Args:
        call: the verb.
        config: file with its settings, where it has any.
        space: file with its search space, where it has one.
        resume: continue what an earlier try left behind, if the verb can.
    """
    changed: dict[str, Any] = {"config": config, "set_": None, "space": space}
    if resume and "resume" in call.params:
        changed["resume"] = True
    line = list(call.path)
    for parameter in call.command.params:
        value = changed.get(parameter.name, call.params.get(parameter.name or ""))
        flag = parameter.opts[0]
        if value is True:
            line.append(flag)
        elif value not in (None, False):
            for part in value if isinstance(value, list | tuple) else [value]:
                line += [flag, storage.absolute(str(part)) if parameter.name in PLACES else str(part)]
    return line


def _cluster_settings(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """`--set cluster.a=b` apart from everything else: the verb itself need not know it."""
    own: list[str] = []
    rest: list[str] = []
    left = iter(arguments)
    for argument in left:
        value = next(left, "") if argument == "--set" else argument.removeprefix("--set=")
        if argument.startswith("--set") and value.startswith(CLUSTER):
            own.append(value)
        else:
            rest += [argument, value] if argument == "--set" else [argument]
    return own, rest


def _taken(arguments: Sequence[str], flag: str) -> tuple[str | None, list[str]]:
    """The value of `flag`, and the arguments without it."""
    if flag not in arguments:
        return None, list(arguments)
    at = list(arguments).index(flag)
    value = arguments[at + 1] if at + 1 < len(arguments) else None
    return value, [*arguments[:at], *arguments[at + 2 :]]


def _verb(group: TyperGroup, arguments: Sequence[str]) -> tuple[tuple[str, ...], TyperCommand]:
    """The verb at the head of `arguments`, through groups such as `config`."""
    path: tuple[str, ...] = ()
    command: Any = group
    while isinstance(command, TyperGroup):
        name = next(iter(arguments[len(path) :]), "")
        known = [verb for verb in command.commands if verb not in HERE_ONLY]
        if name not in known:
            shown = " ".join(part for part in (*path, name) if part) or "nothing"
            raise UserError(f"submit {shown}: is no verb that can run elsewhere; name one of {', '.join(known)}")
        command, path = command.commands[name], (*path, name)
    return path, command


def _settings(path: tuple[str, ...], params: dict[str, Any], config: str | None, own: list[str]) -> Settings:
    """Settings of the verb and, over them, those of the cluster; a benchmark's own are those of its protocol."""
    if path == ("benchmark",) or "config" not in params:
        found = files.load(config, own)
    else:
        found = files.load(params["config"], [*(params["set_"] or ()), *own])
    uri = found.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI")
    if uri is None or "config" not in params:
        return found
    from tuning.store import check_uri

    return found.model_copy(update={"tracking": found.tracking.model_copy(update={"uri": check_uri(uri)})})


def _below_root(name: str, place: str) -> bool:
    """Whether a table lies in the collection: --root says where, and is looked at itself."""
    return name == "prepare.table.file" and not storage.is_remote(place) and not Path(place).is_absolute()


def as_yaml(tree: dict[str, Any]) -> str:
    """`tree` as YAML, in its own order."""
    return str(yaml.safe_dump(tree, sort_keys=False, allow_unicode=True))


def command_line() -> TyperGroup:
    """The whole command line of this project."""
    from infra.cli.app import app

    command = typer.main.get_command(app)
    assert isinstance(command, TyperGroup)
    return command
