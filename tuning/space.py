"""The search space: YAML whose keys are dotted paths of a training run, checked before anything starts.

optim.lr: {loguniform: [0.0003, 0.01]}
loss.lambda_ipc: {uniform: [0.1, 2.0]}
views.red.rms: {quniform: [0.0, 0.014, 0.002]}
views.strong.ops: {int: [1, 3]}
loss.sup: {choice: [an, wan]}
"""

from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from mpc.errors import MissingError, UserError
from pipeline.config import RunConfig
from pipeline.dotted import check_path, merge, nested, validate

ARITY = {"uniform": 2, "loguniform": 2, "quniform": 3, "int": 2}
"""Numbers that a kind takes: low, high, and for `quniform` the step. `int` includes both ends."""


class Dimension(NamedTuple):
    """One searched value."""

    path: str
    kind: str
    """`uniform`, `loguniform`, `quniform`, `int` or `choice`."""
    values: tuple[Any, ...]

    def edges(self) -> tuple[Any, ...]:
        """Values that must be valid for every value in between to be: both bounds, or each choice."""
        return self.values if self.kind == "choice" else self.values[:2]

    def domain(self) -> Any:
        """The dimension in Ray Tune's terms."""
        from ray import tune

        if self.kind == "choice":
            return tune.choice(list(self.values))
        if self.kind == "int":
            return tune.randint(self.values[0], self.values[1] + 1)
        return getattr(tune, self.kind)(*self.values)


class Space(NamedTuple):
    """What is searched."""

    dimensions: tuple[Dimension, ...]

    def param_space(self) -> dict[str, Any]:
        """Dotted path to domain, as Ray Tune takes it."""
        return {dimension.path: dimension.domain() for dimension in self.dimensions}

    def describe(self) -> list[tuple[str, str]]:
        """Path and domain of every dimension, for people."""
        return [(d.path, f"{d.kind} {', '.join(map(str, d.values))}") for d in self.dimensions]


def load(name: str, base: RunConfig) -> Space:
    """The space in a YAML file, or one that ships with the presets, by its name.

    Raises:
        UserError: unknown key, unknown kind, wrong bounds, or a bound that `base` does not allow.
    """
    text = _text(name)
    try:
        tree = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{name}: is not valid YAML; mend its syntax") from error
    if not isinstance(tree, Mapping) or not tree:
        raise UserError(f"{name}: holds no mapping; write lines such as `optim.lr: {{loguniform: [0.0003, 0.01]}}`")
    space = Space(tuple(_dimension(str(path), spec, name) for path, spec in tree.items()))
    for dimension in space.dimensions:
        for value in dimension.edges():
            apply(base, {dimension.path: value}, f"{name}: {dimension.path}")
    return space


def apply(base: RunConfig, values: Mapping[str, Any], where: str) -> RunConfig:
    """`base` with the values at the dotted paths replaced.

    Raises:
        UserError: a value, or values together, that the configuration refuses.
    """
    tree = base.model_dump(mode="json")
    for path, value in values.items():
        tree = merge(tree, nested(path, value))
    return validate(RunConfig, tree, where)


def _text(name: str) -> str:
    path = Path(name)
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise MissingError(f"--space {name}: no such file; give a YAML file, or the name of a shipped space")
        return path.read_text(encoding="utf-8")
    shipped = files("tuning").joinpath("spaces")
    found = shipped.joinpath(f"{name}.yaml")
    if not found.is_file():
        have = ", ".join(sorted(entry.name.removesuffix(".yaml") for entry in shipped.iterdir()))
        raise MissingError(f"--space {name}: neither a YAML file nor one of the shipped spaces: {have}")
    return found.read_text(encoding="utf-8")


def _dimension(path: str, spec: Any, where: str) -> Dimension:
    check_path(RunConfig, path, where)
    if not isinstance(spec, Mapping) or len(spec) != 1:
        raise UserError(f"{where}: {path} needs one domain, such as {{uniform: [0.1, 2.0]}}")
    kind, values = next(iter(spec.items()))
    if kind not in ARITY and kind != "choice":
        raise UserError(f"{where}: {path} has unknown domain {kind}; use {', '.join([*ARITY, 'choice'])}")
    if not isinstance(values, list) or not values:
        raise UserError(f"{where}: {path} needs a list of values after {kind}")
    if kind == "choice":
        return Dimension(path, kind, tuple(values))
    numbers = int if kind == "int" else int | float
    if len(values) != ARITY[kind] or not all(isinstance(v, numbers) and not isinstance(v, bool) for v in values):
        raise UserError(f"{where}: {path}: {kind} takes {ARITY[kind]} numbers, found {values}")
    if values[0] >= values[1] or (kind == "loguniform" and values[0] <= 0):
        raise UserError(
            f"{where}: {path}: the lower bound {values[0]} must lie below {values[1]} (loguniform: above 0)"
        )
    return Dimension(path, kind, tuple(values))
