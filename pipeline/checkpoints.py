"""Ray's checkpoints: opened as a folder, and published under the one name that later verbs know."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from pyarrow import fs
from ray.train import Checkpoint

from pipeline import storage

BEST = "best"
PARTS = ("checkpoint.json", "model.safetensors", "ema.safetensors", "training_state.pt")


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
    entries = filesystem.get_file_info(fs.FileSelector(path, allow_not_found=True))
    places = [entry.path for entry in entries if entry.base_name.startswith("checkpoint_")]
    found = [_found(Checkpoint(place, filesystem)) for place in places]
    return sorted((item for item in found if item is not None), key=lambda item: item.written)


def _found(checkpoint: Checkpoint) -> Found | None:
    """None while a file is missing: it is still being written, or was left behind."""
    infos = checkpoint.filesystem.get_file_info([f"{checkpoint.path}/{part}" for part in PARTS])
    if not all(info.is_file for info in infos):
        return None
    with checkpoint.filesystem.open_input_file(infos[0].path) as file:
        metrics = json.loads(file.readall())["metrics"]
    return Found(checkpoint, infos[0].mtime.timestamp(), metrics)


def publish(checkpoint: Checkpoint, out: str) -> str:
    """Copies a checkpoint to `best` below the run or search `out`, in place of an older one; its URI."""
    target = storage.join(out, BEST)
    storage.delete(target)
    filesystem, path = storage.resolve(target)
    filesystem.create_dir(path, recursive=True)
    fs.copy_files(checkpoint.path, path, source_filesystem=checkpoint.filesystem, destination_filesystem=filesystem)
    return target
