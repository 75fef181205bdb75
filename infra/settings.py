"""The root configuration: defaults, then a preset or a YAML file, then `--set a.b=c`."""

from collections.abc import Iterable
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from infra.cluster import ClusterConfig
from infra.serve.config import ServeConfig
from mpc.errors import MissingError, UserError
from pipeline.config import EvaluateConfig, ExplainConfig, PredictConfig, ReferenceConfig, RunConfig
from pipeline.dotted import check_path, flat, merge, nested, validate
from pipeline.prepare_config import PrepareConfig
from tuning.config import SearchConfig, TrackingConfig
from tuning.gate import Gate


class Settings(RunConfig):
    """All that a verb may read: a training run, and the sections around it."""

    prepare: PrepareConfig = PrepareConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    explain: ExplainConfig = ExplainConfig()
    reference: ReferenceConfig = ReferenceConfig()
    predict: PredictConfig = PredictConfig()
    serve: ServeConfig = ServeConfig()
    search: SearchConfig = SearchConfig()
    tracking: TrackingConfig = TrackingConfig()
    gate: Gate = Gate()
    cluster: ClusterConfig = ClusterConfig()


def load(config: str | None = None, overrides: Iterable[str] = ()) -> Settings:
    """The settings of one call.

    Args:
        config: name of a preset, or path of a YAML (or JSON) file.
        overrides: `a.b=c` each, the value read as YAML; later ones win.

    Raises:
        UserError: unknown key (with the nearest one), value out of range (dotted field, value, constraint).
    """
    tree = read(config) if config else {}
    changes = [parse_override(text) for text in overrides]
    for path, value in changes:
        check_path(Settings, path, "--set")
        tree = merge(tree, nested(path, value))
    where = " with ".join([*([config] if config else []), *(["--set"] if changes else [])])
    return validate(Settings, tree, where or "defaults")


def run_config(settings: Settings) -> RunConfig:
    """The part that a training run reads, without the sections around it."""
    return RunConfig(**{name: getattr(settings, name) for name in RunConfig.model_fields})


def presets(folder: str = "presets") -> dict[str, str]:
    """Names of the presets, or of the protocols, with the comment in the first line of each."""
    found = {}
    for entry in sorted(files("infra").joinpath(folder).iterdir(), key=lambda item: item.name):
        if entry.name.endswith(".yaml"):
            first = entry.read_text(encoding="utf-8").partition("\n")[0]
            found[entry.name.removesuffix(".yaml")] = first.removeprefix("#").strip()
    return found


def read(config: str) -> dict[str, Any]:
    """The tree of a preset or of a file, its keys checked."""
    tree = tree_of(config)
    for path in flat(tree):
        check_path(Settings, path, config)
    return tree


def tree_of(config: str, folder: str = "presets") -> dict[str, Any]:
    """The mapping in a YAML file, or in a shipped one of `folder` by its name; its keys are not looked at.

    Raises:
        UserError: no such file, no YAML, no mapping.
    """
    text = _text(config, folder)
    try:
        tree = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise UserError(f"{config}{line}: is not valid YAML; mend its syntax") from error
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise UserError(f"{config}: holds no mapping; write sections such as `loss:` with keys below them")
    return tree


def parse_override(text: str) -> tuple[str, Any]:
    """`("a.b", value)` from `a.b=c`, with c read as YAML: numbers, true, null, [lists], strings."""
    path, sign, value = text.partition("=")
    if not sign or not path.strip():
        raise UserError(f"--set {text}: needs the form a.b=value, for example --set loss.lambda_ipc=0.5")
    try:
        return path.strip(), yaml.safe_load(value)  # YAML 1.1 leaves 1e-4 a string; pydantic makes it a number
    except yaml.YAMLError as error:
        raise UserError(f"--set {text}: the value is not valid YAML; quote strings with special characters") from error


def _text(config: str, folder: str) -> str:
    names = presets(folder)
    if config in names:
        return files("infra").joinpath(folder, f"{config}.yaml").read_text(encoding="utf-8")
    path = Path(config)
    if not path.is_file():
        raise MissingError(
            f"--config {config}: is neither one of the {folder} ({', '.join(names)}) nor a file; "
            f"see `mpc-cxr config presets`"
        )
    return path.read_text(encoding="utf-8")
