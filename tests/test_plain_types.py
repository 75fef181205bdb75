"""Parquet from outside runs nothing: Ray Data, which is here, has an Arrow type whose values are pickles."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ray.data.extensions import ArrowPythonObjectArray

from mpc.config import ViewsConfig
from mpc.errors import UserError
from pipeline.card import QUARANTINE_FILE, read_card
from pipeline.check import check
from pipeline.images import find_images
from pipeline.plain_types import refuse_extension_types
from pipeline.plan import make_plan
from pipeline.spans import SpanReader, TrainingData
from pipeline.stream import scan

MARKED = pa.field("x", pa.binary(), metadata={"ARROW:extension:name": "unknown.to.this.process"})


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[object, ...]:
        return os.system, (f"touch {self.canary}",)


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    """A file that appears when a payload runs."""
    return tmp_path / "owned"


def pickles(canary: Path, count: int = 1) -> pa.Array:
    """A column of Ray Data's own type for objects."""
    return ArrowPythonObjectArray.from_objects([Payload(canary)] * count)


def nested(column: pa.Array) -> pa.Array:
    """The same one level deeper."""
    return pa.ListArray.from_arrays(pa.array(range(len(column) + 1), pa.int32()), column)


@pytest.mark.parametrize(
    "field",
    [
        MARKED,
        pa.field("x", pa.list_(MARKED)),
        pa.field("x", pa.struct([pa.field("inner", pa.large_list(MARKED))])),
        pa.field("x", pa.map_(pa.string(), MARKED)),
    ],
    ids=["plain", "list", "struct of list", "map"],
)
def test_a_type_is_refused_however_deep_it_lies(field: pa.Field) -> None:
    plain = pa.schema([pa.field("image", pa.binary()), pa.field("labels", pa.list_(pa.int8(), 3))])
    refuse_extension_types(plain, "shard")
    with pytest.raises(UserError, match="shard: column x has extension type"):
        refuse_extension_types(plain.append(field), "shard")


@pytest.mark.parametrize("wrap", [lambda column: column, nested], ids=["plain", "nested"])
def test_a_table_of_images_is_not_unpickled(tmp_path: Path, canary: Path, wrap: Callable) -> None:
    path = tmp_path / "images.parquet"
    pq.write_table(pa.table({"uri": wrap(pickles(canary))}), path)
    with pytest.raises(UserError, match="column uri has extension type"):
        find_images(str(path))
    assert not canary.exists()
    pq.read_table(path)["uri"].to_pylist()
    assert canary.exists(), "the payload is live"


def test_a_data_set_is_not_unpickled(phantom_data: str, tmp_path: Path, canary: Path) -> None:
    """In place of the ids of a shard, and of the reasons of the quarantine."""
    card, folder = read_card(phantom_data), tmp_path / "data"
    shutil.copytree(phantom_data, folder)
    shard = card.shards_of("train")[0]
    table = pq.read_table(folder / shard.path)
    ids = table.column_names.index("image_id")
    table = table.set_column(ids, "image_id", pickles(canary, len(table)))
    pq.write_table(table, folder / shard.path, row_group_size=shard.row_groups[0])
    pq.write_table(pa.table({"reason": pickles(canary)}), folder / QUARANTINE_FILE)
    plan = make_plan(card, seed=0, batch_size=32)
    reader, (span,) = SpanReader(TrainingData(str(folder), card, ViewsConfig()), plan, 0, 1), plan.spans(0, 1, 32)
    for read in (lambda: list(reader(span)), lambda: list(scan(str(folder), card, "train"))):
        with pytest.raises(UserError, match="column image_id has extension type"):
            read()
    faults = check(str(folder))
    assert any(fault.startswith(f"{QUARANTINE_FILE}: column reason has extension type") for fault in faults), faults
    assert any(shard.path in fault for fault in faults)
    assert not canary.exists()
