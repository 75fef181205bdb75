"""Checkpoints in storage: whole or not counted, the best one beside the latest, and one name that later verbs know."""

import json
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from pyarrow import fs
from ray.train import Checkpoint

from mpc.checkpoint import INFO
from mpc.config import CheckpointInfo
from pipeline import storage

BEST = "best"
PARTS = (INFO, "model.safetensors", "ema.safetensors", "training_state.pt")
STEP_NAME, BEST_NAME = "step-", "best-"
"""What the folders of a run's latest checkpoints, and of its best one, begin with; a number of steps follows."""


@contextmanager
def opened(checkpoint: Checkpoint | None) -> Iterator[Path | None]:
    """The checkpoint as a local folder while the context lasts; None where there is none."""
    if checkpoint is None:
        yield None
        return
    with checkpoint.as_directory() as folder:
        yield Path(folder)


class Found(NamedTuple):
    """A checkpoint that lies in a folder with all its files."""

    checkpoint: Checkpoint
    written: float
    """Seconds since 1970."""
    metrics: dict[str, float]
    """Of its epoch, by its own checkpoint.json."""


def found_in(folder: str) -> list[Found]:
    """The whole checkpoints in a folder that Ray writes them to, oldest first; Ray's own book may be behind."""
    filesystem, path = storage.resolve(folder)
    entries = filesystem.get_file_info(fs.FileSelector(path, allow_not_found=True, recursive=True))
    places: dict[str, list[fs.FileInfo]] = {}
    for entry in entries:  # one listing: on S3 a request for each file would take seconds
        place = entry.path.rpartition("/")[0]
        if place.rpartition("/")[2].startswith("checkpoint_"):
            places.setdefault(place, []).append(entry)
    found = [_found(Checkpoint(place, filesystem), infos) for place, infos in places.items()]
    return sorted((item for item in found if item is not None), key=lambda item: item.written)


def whole(checkpoint: Checkpoint) -> bool:
    """Whether all its files are there, as long as they were saved."""
    infos = checkpoint.filesystem.get_file_info([f"{checkpoint.path}/{part}" for part in PARTS])
    return _found(checkpoint, infos) is not None


def _found(checkpoint: Checkpoint, infos: Sequence[fs.FileInfo]) -> Found | None:
    """None where a file is missing or shorter than it was saved: it is being written, was left behind, or cut short."""
    files = {info.base_name: info for info in infos if info.is_file}
    if not files.keys() >= set(PARTS):
        return None
    with checkpoint.filesystem.open_input_file(files[INFO].path) as file:
        text = file.readall()
    try:
        record = json.loads(text)
    except ValueError:  # cut short itself
        return None
    sizes = record.get("sizes", {})  # older checkpoints have none
    if any(files[name].size != size for name, size in sizes.items()):
        return None
    return Found(checkpoint, files[INFO].mtime.timestamp(), record["metrics"])


def publish(checkpoint: Checkpoint, out: str) -> str:
    """Copies a checkpoint to `best` below the run or search `out`, in place of an older one; its URI."""
    target = storage.join(out, BEST)
    storage.delete(target)
    filesystem, path = storage.resolve(target)
    filesystem.create_dir(path, recursive=True)
    fs.copy_files(checkpoint.path, path, source_filesystem=checkpoint.filesystem, destination_filesystem=filesystem)
    return target


def upload(folder: Path, target: str) -> None:
    """Copies a local checkpoint to the URI `target`, `checkpoint.json` last: a folder with that file is whole.

    Raises:
        UserError: storage that does not answer, or a disk that is full.
    """
    filesystem, path = storage.resolve(target)
    with storage.explained(target):
        try:
            filesystem.create_dir(path, recursive=True)
            for name in _last(INFO, [file.name for file in folder.iterdir()]):
                fs.copy_files(str(folder / name), f"{path}/{name}", destination_filesystem=filesystem)
        except OSError:
            if not storage.is_remote(target):
                storage.delete(target)  # a full disk gets its space back
            raise


def remember_best(place: str, name: str, metric: str) -> None:
    """Keeps a copy of the checkpoint `name` below `place` if none before it was better.

    The copy is whole before the one that it replaces is deleted.
    """
    kept = best_of(place)
    new = _info(storage.join(place, name))
    if kept is not None and _score(new, metric) <= _score(kept[1], metric):
        return
    target = storage.join(place, BEST_NAME + name)
    filesystem, source = storage.resolve(storage.join(place, name))
    path = storage.resolve(target)[1]
    with storage.explained(target):
        filesystem.create_dir(path, recursive=True)
        files = [entry.base_name for entry in filesystem.get_file_info(fs.FileSelector(source))]
        for file in _last(INFO, files):
            filesystem.copy_file(f"{source}/{file}", f"{path}/{file}")
    sweep(place, BEST_NAME, {BEST_NAME + name})


def best_of(place: str) -> tuple[Checkpoint, CheckpointInfo] | None:
    """The whole checkpoint that `remember_best` kept below `place`; of two, which a kill may leave, the later one."""
    filesystem, _ = storage.resolve(place)
    for name in sorted(_folders(place, BEST_NAME), reverse=True):
        uri = storage.join(place, name)
        if storage.exists(storage.join(uri, INFO)):
            return Checkpoint(storage.resolve(uri)[1], filesystem), _info(uri)
    return None


def sweep(place: str, prefix: str, kept: Collection[str]) -> None:
    """Deletes the folders below `place` that begin with `prefix` and are not `kept`."""
    for name in _folders(place, prefix):
        if name not in kept:
            storage.delete(storage.join(place, name))


def _folders(place: str, prefix: str) -> list[str]:
    filesystem, path = storage.resolve(place)
    with storage.explained(place):
        entries: list[Any] = filesystem.get_file_info(fs.FileSelector(path, allow_not_found=True))
    return [e.base_name for e in entries if e.type == fs.FileType.Directory and e.base_name.startswith(prefix)]


def _info(uri: str) -> CheckpointInfo:
    return CheckpointInfo.model_validate_json(storage.read_bytes(storage.join(uri, INFO)))


def _score(info: CheckpointInfo, metric: str) -> float:
    """Higher is better; an epoch without a value, as where no finding had both outcomes, is the worst."""
    return info.metrics.get(metric, float("-inf"))


def _last(name: str, names: list[str]) -> list[str]:
    return sorted(names, key=lambda other: other == name)
