"""Checkpoint folders: weights as safetensors, training state as tensors, the rest as JSON; nothing is ever unpickled.

model.safetensors     the trained weights
ema.safetensors       their average, if there is one
training_state.pt     what resuming needs, if it is kept; read with torch.load(weights_only=True)
checkpoint.json       `mpc.config.CheckpointInfo`; written last
"""

import json
import os
import shutil
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal
from uuid import uuid4
from zipfile import is_zipfile

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mpc.config import CheckpointInfo
from mpc.errors import MissingError, UserError

INFO, TRAINING_STATE = "checkpoint.json", "training_state.pt"
SCHEMA_VERSION = 1

Kind = Literal["model", "ema"]


def save(
    folder: Path,
    model: nn.Module,
    ema: Mapping[str, Tensor] | None,
    training_state: dict[str, Any] | None,
    metadata: CheckpointInfo,
) -> None:
    """Writes a checkpoint: into a hidden folder beside `folder`, flushed to the disk, then renamed.

    A reader never sees a half-written one. An older checkpoint of the same name is replaced; a process killed in that
    very moment leaves it as `.NAME.old-...`.

    Args:
        folder: where it will be; its parent is made.
        model: its state_dict is saved.
        ema: averaged weights under the same keys.
        training_state: tensors, numbers, strings, None, and dicts, lists, tuples of them.
        metadata: the rest; `sizes` is made here.

    Raises:
        TypeError: `training_state` holds something that a safe reader would refuse.
    """
    if training_state is not None:
        _refuse_objects(training_state, "training_state")
    folder.parent.mkdir(parents=True, exist_ok=True)
    token = uuid4().hex[:12]
    fresh, old = (folder.parent / f".{folder.name}.{kind}-{token}" for kind in ("new", "old"))
    fresh.mkdir()
    try:
        save_file(_on_cpu(model.state_dict()), fresh / "model.safetensors")
        if ema is not None:
            save_file(_on_cpu(ema), fresh / "ema.safetensors")
        if training_state is not None:
            torch.save(training_state, fresh / TRAINING_STATE)
        sizes = {path.name: path.stat().st_size for path in sorted(fresh.iterdir())}
        text = metadata.model_copy(update={"sizes": sizes}).model_dump_json(indent=2)
        (fresh / INFO).write_text(text + "\n", encoding="utf-8")
        for path in (*fresh.iterdir(), fresh):
            _flush(path)
        if folder.exists():
            folder.rename(old)
        fresh.rename(folder)
        _flush(folder.parent)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


def read_info(folder: Path) -> CheckpointInfo:
    """What `checkpoint.json` says.

    Raises:
        MissingError: no checkpoint lies there.
        UserError: another schema version, or a file that is none of ours.
    """
    path = _file(folder, INFO)
    try:
        raw = json.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error}); the checkpoint is damaged, use another") from error
    version = raw.get("schema_version") if isinstance(raw, dict) else None
    if version != SCHEMA_VERSION:
        raise UserError(
            f"{path}: schema_version {version!r}, this software reads {SCHEMA_VERSION}; use the version that wrote it"
        )
    try:
        return CheckpointInfo.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise UserError(f"{path}: {where}: {first['msg']}; the checkpoint is damaged, use another") from error


def load_weights(folder: Path, kind: Kind) -> dict[str, Tensor]:
    """Tensors of `model.safetensors` or `ema.safetensors`, on the CPU.

    Raises:
        MissingError: the file is absent.
        UserError: it is no safetensors file.
    """
    path = _file(folder, f"{kind}.safetensors")
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except SafetensorError as error:
        raise UserError(f"{path}: not a safetensors file ({error}); the checkpoint is damaged, use another") from error
    return tensors


def load_into(model: nn.Module, folder: Path, kind: Kind) -> None:
    """Puts the weights of a checkpoint into `model`; every name and shape must match.

    Raises:
        UserError: they do not; the message names the first difference.
    """
    tensors, own = load_weights(folder, kind), model.state_dict()
    path = folder / f"{kind}.safetensors"
    for name in [*own, *tensors]:
        here, there = own.get(name), tensors.get(name)
        if here is None or there is None or here.shape != there.shape:
            needed = "no such tensor" if here is None else tuple(here.shape)
            found = "nothing" if there is None else tuple(there.shape)
            raise UserError(f"{path}: {name}: the network has {needed}, the file {found}; use the run's own checkpoint")
    model.load_state_dict(tensors)


def load_training_state(folder: Path) -> dict[str, Any]:
    """What `save` was given as `training_state`, tensors on the CPU.

    Raises:
        MissingError: the checkpoint holds none.
        UserError: the file holds anything but tensors and plain values; nothing of it was run.
    """
    path = _file(folder, TRAINING_STATE)
    state: Any = None
    cause: Exception | None = None
    if is_zipfile(path):  # what torch.save writes; older formats take another reader, which is never entered
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # a damaged or hostile file ends the reader anywhere
            cause = error
    if not isinstance(state, dict):
        reason = type(cause).__name__ if cause else "no training state"
        raise UserError(
            f"{path}: refused, it holds more than tensors and plain values or is damaged ({reason}); "
            f"use a checkpoint that this software wrote"
        ) from cause
    return state


def _file(folder: Path, name: str) -> Path:
    path = folder / name
    if not path.is_file():
        raise MissingError(f"{folder}: no {name} there; give the folder of a checkpoint that was saved whole")
    return path


def _on_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _refuse_objects(value: Any, where: str) -> None:
    """Finds on saving what `weights_only` would refuse on loading, when it is too late."""
    if type(value) in (dict, OrderedDict):
        for key, inner in value.items():
            _refuse_objects(key, f"a key of {where}")
            _refuse_objects(inner, f"{where}[{key!r}]")
    elif type(value) in (list, tuple):
        for index, inner in enumerate(value):
            _refuse_objects(inner, f"{where}[{index}]")
    elif not (value is None or isinstance(value, Tensor) or type(value) in (bool, int, float, str, bytes)):
        raise TypeError(f"{where} is a {type(value).__name__}; a checkpoint holds tensors and plain values only")


def _flush(path: Path) -> None:
    """Asks the disk to have it before going on, folders included."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
