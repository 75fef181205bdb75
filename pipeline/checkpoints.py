"""Ray's checkpoints: opened as a folder, and published under the one name that later verbs know."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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


def is_whole(checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint is there with all its files."""
    infos = checkpoint.filesystem.get_file_info([f"{checkpoint.path}/{part}" for part in PARTS])
    return all(info.is_file for info in infos)


def publish(checkpoint: Checkpoint, out: str) -> str:
    """Copies a checkpoint to `best` below the run or search `out`, in place of an older one; its URI."""
    target = storage.join(out, BEST)
    storage.delete(target)
    filesystem, path = storage.resolve(target)
    filesystem.create_dir(path, recursive=True)
    fs.copy_files(checkpoint.path, path, source_filesystem=checkpoint.filesystem, destination_filesystem=filesystem)
    return target
