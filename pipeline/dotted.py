"""Dotted paths into configuration models, `loss.lambda_ipc`: how the command line, presets and search spaces write."""

import difflib
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar, get_args, get_origin

from pydantic import BaseModel, ValidationError

from mpc.errors import UserError

M = TypeVar("M", bound=BaseModel)


def section_of(annotation: Any) -> type[BaseModel] | None:
    """The configuration model behind a field's annotation (also `Model | None`), or None for a plain value."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for part in get_args(annotation) if (found := section_of(part)) is not None), None)


def leaves(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Every dotted path of `model` that holds a value, in the order of declaration."""
    for name, field in model.model_fields.items():
        section = section_of(field.annotation)
        if section is None:
            yield prefix + name
        else:
            yield from leaves(section, f"{prefix}{name}.")


def check_path(model: type[BaseModel], path: str, where: str) -> None:
    """Raises UserError, with the nearest known path, unless `path` names a value or a section of `model`."""
    section: type[BaseModel] | None = model
    for part in path.split("."):
        field = section.model_fields.get(part) if section is not None else None
        if field is None:
            raise UserError(f"unknown key {path} in {where}; {suggestion(model, path)}")
        if _is_mapping(field.annotation):  # what follows are the user's own names
            return
        section = section_of(field.annotation)


def _is_mapping(annotation: Any) -> bool:
    """Whether a field takes a mapping (also `dict[...] | None`)."""
    return get_origin(annotation) is dict or any(get_origin(part) is dict for part in get_args(annotation))


def suggestion(model: type[BaseModel], path: str) -> str:
    """`did you mean ...?` with the nearest path by spelling, or by last part, else where all keys are listed."""
    known = list(leaves(model))
    near = difflib.get_close_matches(path, known, n=1, cutoff=0.6)
    if not near:
        last = {key.rsplit(".", 1)[-1]: key for key in reversed(known)}
        near = [last[name] for name in difflib.get_close_matches(path.rsplit(".", 1)[-1], last, n=1, cutoff=0.75)]
    return f"did you mean {near[0]}?" if near else "`mpc-cxr config show` lists every key"


def nested(path: str, value: Any) -> dict[str, Any]:
    """`{"a": {"b": value}}` from the path `a.b`."""
    for part in reversed(path.split(".")):
        value = {part: value}
    assert isinstance(value, dict)
    return value


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"a.b": value}` from nested mappings: the inverse of merging `nested` paths."""
    found: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping) and value:
            found |= flat(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = value
    return found


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with the values of `over`; mappings are merged, everything else is replaced."""
    merged = dict(base)
    for name, value in over.items():
        old = merged.get(name)
        merged[name] = merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return merged


def validate(model: type[M], tree: Mapping[str, Any], where: str) -> M:
    """The configuration that `tree` describes; unknown keys and bad values raise UserError in one line.

    Args:
        model: the root model.
        tree: nested mappings, as YAML gives them.
        where: what the user wrote, for the message: a file, `--set`, a search space.
    """
    for path in flat(tree):
        check_path(model, path, where)
    return parsed(model, tree, where)


def parsed(model: type[M], tree: Mapping[str, Any], where: str) -> M:
    """As `validate`, for models some of whose keys are the user's own names: no nearest key is suggested."""
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        raise UserError(f"{where}: {explain(error)}") from error


def explain(error: ValidationError) -> str:
    """All problems of a pydantic error in one line: dotted field, value, constraint."""
    return "; ".join(dict.fromkeys(_problem(dict(item)) for item in error.errors()))


def _problem(item: dict[str, Any]) -> str:
    path = ".".join(str(part) for part in item["loc"])
    message = str(item["msg"]).removeprefix("Value error, ")
    if item["type"] == "extra_forbidden":
        return f"unknown key {path}"
    if item["type"] == "missing":
        return f"{path} is missing"
    if item["type"] == "value_error":  # raised by a model's own check, which names fields and remedy itself
        return f"{path}: {message}" if path else message
    value = item["input"]
    given = f"{path} = {value!r}" if not isinstance(value, Mapping) else f"{path} is a section"
    return f"{given}: {message.replace('Input should be', 'must be')}"
