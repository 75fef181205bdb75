"""Checkpoints in storage as a killed driver leaves them: what is not whole is not gone on from."""

import json
import os
from pathlib import Path

import pytest
from factory import tiny_checkpoint
from pyarrow import fs
from ray.train import Checkpoint

from pipeline import storage
from pipeline.checkpoints import PARTS, found_in
from tuning.keeping import delete_checkpoints
from tuning.trial import newest


@pytest.fixture
def places(tmp_path: Path) -> tuple[Path, Path]:
    """An older and a newer checkpoint of one trial."""
    older, newer = tmp_path / "checkpoint_000000", tmp_path / "checkpoint_000001"
    for place, written in ((older, 1_000), (newer, 2_000)):
        tiny_checkpoint(place)
        os.utime(place / "checkpoint.json", (written, written))
    return older, newer


def names(folder: str) -> list[str]:
    return [Path(item.checkpoint.path).name for item in found_in(folder)]


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("left", [0.0, 0.5, None], ids=["empty", "half", "gone"])
def test_a_copy_that_was_cut_short_is_none(places: tuple[Path, Path], part: str, left: float | None) -> None:
    older, newer = places
    file = newer / part
    if left is None:
        file.unlink()
    else:
        os.truncate(file, int(left * file.stat().st_size))
    assert names(str(older.parent)) == [older.name]
    start = newest(Checkpoint(str(newer)), str(older.parent))
    assert start is not None
    assert start.path == str(older)


@pytest.mark.parametrize("place", ["local", "s3"])
def test_what_is_deleted_leaves_its_folder_while_the_search_may_go_on(
    place: str, places: tuple[Path, Path], bucket: str
) -> None:
    """Tune fails a trial for good if the folder of a checkpoint that its state names is gone."""
    older, newer = places
    root = str(older.parent) if place == "local" else bucket
    filesystem, path = storage.resolve(storage.join(root, "tune", "a"))
    for folder in places:
        filesystem.create_dir(f"{path}/{folder.name}", recursive=True)
        fs.copy_files(str(folder), f"{path}/{folder.name}", destination_filesystem=filesystem)
    state = storage.join(root, "tune")
    delete_checkpoints(state, "a", needed=[f"{path}/{newer.name}"])
    assert names(storage.join(state, "a")) == [newer.name]
    assert filesystem.get_file_info(f"{path}/{older.name}").type == fs.FileType.Directory
    delete_checkpoints(state, "a", folders=True)
    assert not any(info.is_file for info in filesystem.get_file_info(fs.FileSelector(path, recursive=True)))
    assert filesystem.get_file_info(f"{path}/{older.name}").type == fs.FileType.NotFound


def test_whole_ones_are_found_oldest_first_those_without_sizes_too(places: tuple[Path, Path]) -> None:
    older, newer = places
    assert names(str(older.parent)) == [older.name, newer.name]
    record = json.loads((older / "checkpoint.json").read_text())
    assert set(record.pop("sizes")) == set(PARTS) - {"checkpoint.json"}
    (older / "checkpoint.json").write_text(json.dumps(record))
    assert older.name in names(str(older.parent))
    given = Checkpoint(str(older))
    assert newest(given, str(older.parent)) is given
