"""The search space: YAML whose keys are dotted paths of a training run, checked before anything starts.

optim.lr: {loguniform: [0.0003, 0.01]}
loss.lambda_ipc: {uniform: [0.1, 2.0]}
views.red.rms: {quniform: [0.0, 0.014, 0.002]}
views.strong.ops: {int: [1, 3]}
loss.sup: {choice: [an, wan, em]}
baseline.em_alpha: {loguniform: [0.05, 0.4], when: {loss.sup: em}}
"""

from collections.abc import Mapping, Sequence
from graphlib import CycleError, TopologicalSorter
from importlib.resources import files
from itertools import combinations
from math import prod
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import TypeAdapter, ValidationError

from mpc.errors import MissingError, UserError
from pipeline.config import RunConfig
from pipeline.dotted import check_path, leaves, merge, nested, section_of, validate
from tuning.domains import CHOICE, KINDS, WHEN, Dimension, Settings, Space

FIXED = ("train.epochs", "train.num_workers", "train.use_gpu", "train.gpus", "train.worker_cpus", "train.schedule",
         "train.checkpoint_every", "train.max_failures", "data.backend", "data.tasks", "data.task_cpus",
         "data.val_labels", "data.val_kappa", "data.draw_seed")  # fmt: skip
"""What all trials share: epochs, what they ask of the cluster, and what they are measured by."""
CORNERS = 256
"""Up to so many corners of a space are all tried on the configuration; of a larger one, every pair of edges."""


def load(name: str, base: RunConfig) -> Space:
    """The space in a YAML file, or one that ships with the presets, by its name.

    Raises:
        UserError: unknown key or domain, wrong bounds or conditions, or values that `base` does not allow.
    """
    try:
        tree = yaml.safe_load(_text(name))
    except yaml.YAMLError as error:
        raise UserError(f"{name}: is not valid YAML; mend its syntax") from error
    if not isinstance(tree, Mapping) or not tree:
        raise UserError(f"{name}: holds no mapping; write lines such as `optim.lr: {{loguniform: [0.0003, 0.01]}}`")
    space = Space(_ordered([_dimension(str(path), spec, name) for path, spec in tree.items()], name))
    check(space, base, name)
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


def check(space: Space, base: RunConfig, where: str) -> None:
    """Tries the edges of every dimension on `base`, each alone and then together.

    Raises:
        UserError: what the configuration refuses.
    """
    for change in base.train.schedule:
        both = sorted(change.settings.keys() & {dimension.path for dimension in space.dimensions})
        if both:
            raise UserError(f"{where}: {both[0]} is searched, and train.schedule sets it; leave it out of one of them")
    pins = [(dimension.path, edge) for dimension in space.dimensions for edge in dimension.edges()]
    for pin in pins:
        _try(space, base, [pin], where)
    if prod(len(dimension.edges()) for dimension in space.dimensions) <= CORNERS:
        for settings in space.combinations(lambda dimension: dimension.edges()):
            apply(base, settings, f"{where}: {_together(settings.items())}")
    else:
        for one, other in combinations(pins, 2):
            _try(space, base, [one, other], where)


def _try(space: Space, base: RunConfig, pins: Sequence[tuple[str, Any]], where: str) -> None:
    settings = _completed(space, dict(pins))
    if settings is not None and len(dict(pins)) == len(pins):
        apply(base, settings, f"{where}: {_together(pins)}")


def _together(settings: Any) -> str:
    return " with ".join(f"{path} {value}" for path, value in settings)


def _completed(space: Space, pins: Settings) -> Settings | None:
    """Settings that hold `pins`, what these depend on, and the first value of the rest; None if pins exclude others."""
    for dimension in reversed(space.dimensions):
        for path, allowed in dimension.when if dimension.path in pins else ():
            if pins.setdefault(path, allowed[0]) not in allowed:
                return None
    settings: Settings = {}
    for dimension in space.dimensions:
        if dimension.active(settings):
            settings[dimension.path] = pins.get(dimension.path, dimension.edges()[0])
    return settings


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
    """One line of the file."""
    check_path(RunConfig, path, where)
    if path not in set(leaves(RunConfig)):
        raise UserError(f"{where}: {path} is a section; search the settings in it, such as {path}.{_first(path)}")
    if path in FIXED:
        raise UserError(f"{where}: {path} is the same for all trials; set it with --set {path}=...")
    domains = {kind: values for kind, values in spec.items() if kind != WHEN} if isinstance(spec, Mapping) else {}
    if len(domains) != 1:
        raise UserError(f"{where}: {path} needs one domain, such as {{uniform: [0.1, 2.0]}}")
    kind, values = next(iter(domains.items()))
    if kind not in KINDS and kind != CHOICE:
        raise UserError(f"{where}: {path} has unknown domain {kind}; use {', '.join([*KINDS, CHOICE])}")
    if not isinstance(values, list) or not values:
        raise UserError(f"{where}: {path} needs a list of values after {kind}")
    read = _choices if kind == CHOICE else _numbers
    found = Dimension(path, kind, read(f"{where}: {path}", kind, values), _when(path, spec.get(WHEN), where))
    return found._replace(values=_resolved(path, found.values)) if kind == CHOICE else found


def _first(section: str) -> str:
    """The first setting of a section, as an example."""
    return next(leaf.removeprefix(f"{section}.") for leaf in leaves(RunConfig) if leaf.startswith(f"{section}."))


def _choices(where: str, kind: str, values: list[Any]) -> tuple[Any, ...]:
    plain = (bool, int, float, str, type(None))
    if not all(isinstance(value, plain) for value in values):
        raise UserError(f"{where}: {kind} takes numbers, texts, true, false and null, found {values}")
    return tuple(values)


def _resolved(path: str, values: Sequence[Any]) -> tuple[Any, ...]:
    """Values as a configuration holds them: YAML's 0 and its text 1e-4 are floats where the setting is one."""
    if path not in set(leaves(RunConfig)):
        return tuple(values)
    *sections, name = path.split(".")
    model: Any = RunConfig
    for part in sections:
        model = section_of(model.model_fields[part].annotation)
    field = model.model_fields[name]
    setting: Any = Annotated[field.annotation, field]
    return tuple(_as(TypeAdapter(setting), value) for value in values)


def _as(setting: TypeAdapter[Any], value: Any) -> Any:
    """What the setting takes `value` for; one that it refuses stays, for `check` to name."""
    try:
        return setting.validate_python(value)
    except ValidationError:
        return value


def _numbers(where: str, kind: str, values: list[Any]) -> tuple[Any, ...]:
    """Bounds, and the step where the kind has one."""
    numbers, count = [_number(value) for value in values], 3 if KINDS[kind].stepped else 2
    wanted = int if KINDS[kind].integer else int | float
    if len(numbers) != count or not all(isinstance(n, wanted) and not isinstance(n, bool) for n in numbers):
        raise UserError(f"{where}: {kind} takes {count} {'whole ' * KINDS[kind].integer}numbers, found {values}")
    low, high, step = [*numbers, None][:3]
    if low >= high or (KINDS[kind].log and low <= 0):
        raise UserError(f"{where}: the lower bound {low} must lie below {high} ({kind}: above 0)" if KINDS[kind].log
                        else f"{where}: the lower bound {low} must lie below {high}")  # fmt: skip
    if step is not None and (step <= 0 or abs((high - low) / step - round((high - low) / step)) > 1e-6):
        raise UserError(f"{where}: from {low} to {high} are no whole steps of {step}; change one of them")
    return tuple(numbers)


def _number(value: Any) -> Any:
    """YAML 1.1 leaves 1e-4 a text."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _when(path: str, spec: Any, where: str) -> tuple[tuple[str, tuple[Any, ...]], ...]:
    """The condition of a line: `{loss.sup: em}` or `{loss.sup: [em, an]}`; several must all hold."""
    if spec is None:
        return ()
    if not isinstance(spec, Mapping) or not spec:
        raise UserError(f"{where}: {path}: write its condition as when: {{loss.sup: em}}")
    allowed = {str(key): value if isinstance(value, list) else [value] for key, value in spec.items()}
    return tuple((key, _resolved(key, values)) for key, values in allowed.items())


def _ordered(dimensions: list[Dimension], where: str) -> tuple[Dimension, ...]:
    """The dimensions with every condition behind what it names.

    Raises:
        UserError: a condition on something that is not searched, is no choice, or never takes that value; a circle.
    """
    by_path = {dimension.path: dimension for dimension in dimensions}
    for dimension in dimensions:
        for path, allowed in dimension.when:
            parent = by_path.get(path)
            if parent is None or parent.kind != CHOICE:
                raise UserError(f"{where}: {dimension.path}: when names {path}, which is no choice of this space")
            never = [value for value in allowed if value not in parent.values]
            if never or not allowed:
                raise UserError(f"{where}: {dimension.path}: when names {path} {never}, which it never takes")
    graph = {dimension.path: {path for path, _ in dimension.when} for dimension in dimensions}
    try:
        return tuple(by_path[path] for path in TopologicalSorter(graph).static_order())
    except CycleError as error:
        raise UserError(f"{where}: conditions run in a circle: {' -> '.join(error.args[1])}") from error
