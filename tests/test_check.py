"""check: a sound data set passes, and each way of spoiling one is caught and named."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_shards import phantoms

from mpc.errors import UserError
from pipeline import card as cards
from pipeline.check import check
from pipeline.manifest import list_column, matrix
from pipeline.shards import prepare


@pytest.fixture(scope="module")
def pristine(ray_session, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("check") / "data"
    prepare(phantoms(), None, str(folder))
    return folder


@pytest.fixture
def data(pristine, tmp_path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "data"))


def edit_card(data: Path, **changes) -> None:
    content = json.loads((data / "dataset.json").read_text())
    (data / "dataset.json").write_text(json.dumps(content | changes))


def rewrite(data: Path, path: str, column: str, values) -> None:
    """Changes one column of a shard and, as a careful forger would, the card's digests with it."""
    table = pq.read_table(data / path)
    position = table.schema.get_field_index(column)
    field = table.schema.field(position)
    array = list_column(values) if isinstance(values, np.ndarray) and values.ndim == 2 else pa.array(values, field.type)
    pq.write_table(table.set_column(position, field, array.cast(field.type)), data / path, row_group_size=8)
    import hashlib

    card = cards.read_card(str(data))
    content = (data / path).read_bytes()
    new = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    shards = tuple(s.model_copy(update=new) if s.path == path else s for s in card.shards)
    digest = cards.digest(card.findings, shards)
    cards.write_card(str(data), card.model_copy(update={"shards": shards, "digest": digest}))


def only(faults: list[str]) -> str:
    assert len(faults) == 1, faults
    assert "\n" not in faults[0]
    return faults[0]


def some(faults: list[str], words: str) -> None:
    assert any(words in fault for fault in faults), faults


def test_a_sound_data_set_has_no_faults(data):
    assert check(str(data)) == []


def test_leaked_patient(data):
    patients = pq.read_table(data / "shards/val-00000.parquet")["patient_id"].to_pylist()
    train = pq.read_table(data / "shards/train-00000.parquet")["patient_id"].to_pylist()
    rewrite(data, "shards/val-00000.parquet", "patient_id", [train[0], *patients[1:]])
    some(check(str(data)), f"patient {train[0]!r} has images in train and val (1 such patients)")


def test_corrupted_and_missing_shard(data):
    path = data / "shards/train-00001.parquet"
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 0xFF
    path.write_bytes(content)
    some(check(str(data)), "shards/train-00001.parquet: SHA-256 differs from the card")
    path.write_bytes(content[:200])
    faults = check(str(data))
    some(faults, "shards/train-00001.parquet: 200 bytes, the card says")
    some(faults, "shards/train-00001.parquet: not a readable Parquet file")
    path.unlink()
    assert only(check(str(data))) == "shards/train-00001.parquet: the file is missing"


def test_wrong_digest(data):
    edit_card(data, digest="0" * 64)
    assert "dataset.json: its digest does not match" in only(check(str(data)))


def test_mixed_up_finding_list(data):
    card = cards.read_card(str(data))
    mixed = (card.findings[1], card.findings[0], *card.findings[2:])
    edit_card(data, findings=mixed, digest=cards.digest(mixed, card.shards))
    faults = check(str(data))
    assert len(faults) == len(card.shards)
    assert all("its findings are Atelectasis, Cardiomegaly," in fault for fault in faults)


def test_labels_and_mask_out_of_range(data):
    path = "shards/train-00000.parquet"
    table = pq.read_table(data / path)
    labels = matrix(table["labels"]).copy()
    labels[0, 0] = -1
    rewrite(data, path, "labels", labels)
    some(check(str(data)), f"{path}: labels hold [-1]; only 0 and 1 are allowed")
    rewrite(data, path, "labels", matrix(table["labels"]))
    assert check(str(data)) == []
    rewrite(data, path, "known", np.zeros(labels.shape, bool))
    faults = check(str(data))
    some(faults, "positive labels that are not known")
    some(faults, "training rows without a known positive")
    some(faults, "split 'train' holds")


@pytest.mark.parametrize(
    ("column", "value", "words"),
    [
        ("row", 7, "column row does not run from 0"),
        ("image_id", "again", "image id 'again' occurs more than once"),
        ("split", "test", "holds rows of split 'test'"),
        ("image", b"short", "images do not have 1024 bytes"),
        ("patient_id", "", "rows without patient_id"),
    ],
)
def test_spoiled_columns(data, column, value, words):
    path = "shards/train-00000.parquet"
    rows = len(pq.read_table(data / path))
    rewrite(data, path, column, [value] * rows)
    some(check(str(data)), words)


def test_card_that_counts_wrongly(data):
    card = cards.read_card(str(data))
    counts = card.model_dump(mode="json")["counts"]
    counts["val"]["images"] += 1
    counts["test"]["positives"]["Effusion"] += 5
    edit_card(data, counts=counts)
    faults = check(str(data))
    assert len(faults) == 2
    some(faults, "split 'val' holds")
    some(faults, "positives of Effusion; the card says")


def test_foreign_schema_and_stray_shard(data):
    path = data / "shards/val-00000.parquet"
    shutil.copy(path, data / "shards/val-99999.parquet")
    assert only(check(str(data))) == "shards/val-99999.parquet: not on the card; move it away"
    (data / "shards/val-99999.parquet").unlink()
    table = pq.read_table(path)
    pq.write_table(table.append_column("comment", pa.array(["x"] * len(table))), path)
    some(check(str(data)), "its columns are row int64")


def test_quarantine_that_differs(data):
    (data / "quarantine.parquet").unlink()
    assert only(check(str(data))) == "quarantine.parquet: the file is missing"
    edit_card(data, quarantined={"missing": 3})
    shutil.copy(data / "shards/val-00000.parquet", data / "quarantine.parquet")
    assert "quarantine.parquet: not readable" in only(check(str(data)))


def test_nothing_to_check(tmp_path, data):
    with pytest.raises(UserError, match=r"holds no dataset.json"):
        check(str(tmp_path / "nowhere"))
    (data / "dataset.json").write_text('{"schema_version": 2}')
    with pytest.raises(UserError, match=r"is not a dataset card: schema_version"):
        check(str(data))


def test_card_lookups(data):
    card = cards.read_card(str(data))
    with pytest.raises(UserError, match="no split 'dev'; it has train, val, test"):
        card.shards_of("dev")
    ranges = [card.rows(split) for split in card.counts]
    assert [row for found in ranges for row in found] == list(range(90))
    assert card.pixels.fit == "pad"
