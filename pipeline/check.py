"""Verifies a prepared data set against its card and against itself; every fault in words that name the place."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mpc.errors import MissingError, UserError
from pipeline import storage
from pipeline.card import NEAR_FILE, QUARANTINE_FILE, SHARD_FOLDER, DatasetCard, Shard, count, digest, read_card
from pipeline.manifest import UNLABELLED, leaked_patients, matrix
from pipeline.plain_types import refuse_extension_types
from pipeline.shard_file import METADATA_KEY, shard_schema

CHUNK = 8 * 2**20


def check(data_uri: str) -> list[str]:
    """All faults of a prepared data set, each one line; an empty list means that it is sound.

    Reads every byte once for its digest and every row group for its content; memory holds one row group of pixels and
    the other columns of the whole set.

    Raises:
        UserError: no card to check against, or storage that cannot be reached.
    """
    card = read_card(data_uri)
    faults: list[str] = []
    tables: list[pa.Table] = []
    if digest(card.findings, card.shards) != card.digest:
        faults.append("dataset.json: its digest does not match its findings and shards; the card was edited")
    for shard in card.shards:
        found, table = _shard(data_uri, card, shard)
        faults += found
        if table is not None:
            tables.append(table)
    faults += _stray(data_uri, card)
    faults += _quarantine(data_uri, card) + _near(data_uri, card)
    if tables:
        faults += _whole(card, pa.concat_tables(tables), complete=len(tables) == len(card.shards))
    return faults


def _shard(data_uri: str, card: DatasetCard, shard: Shard) -> tuple[list[str], pa.Table | None]:
    """Faults of one file, and its columns without the pixels where it can be read."""
    uri = storage.join(data_uri, shard.path)
    try:
        with storage.open_input(uri) as stream:
            faults = _bytes(stream, shard)
            stream.seek(0)
            try:
                reader = pq.ParquetFile(stream)
                found, table = _content(reader, card, shard)
            except (pa.ArrowInvalid, pa.ArrowTypeError, OSError) as error:
                damage = " ".join(str(error).split())[:160]
                return [*faults, f"{shard.path}: not a readable Parquet file ({damage})"], None
    except MissingError:
        return [f"{shard.path}: the file is missing"], None
    return faults + [f"{shard.path}: {fault}" for fault in found], table


def _bytes(stream: Any, shard: Shard) -> list[str]:
    """Size and SHA-256 of the file."""
    sha = hashlib.sha256()
    length = 0
    while chunk := stream.read(CHUNK):
        sha.update(chunk)
        length += len(chunk)
    if length != shard.bytes:
        return [f"{shard.path}: {length} bytes, the card says {shard.bytes}; restore the file or prepare anew"]
    if sha.hexdigest() != shard.sha256:
        return [f"{shard.path}: SHA-256 differs from the card; restore the file or prepare anew"]
    return []


def _content(reader: pq.ParquetFile, card: DatasetCard, shard: Shard) -> tuple[list[str], pa.Table | None]:
    """Schema, footer, row groups and values of one shard."""
    wanted = shard_schema(card.findings, card.strata, card.image_size)
    about = json.loads((reader.schema_arrow.metadata or {}).get(METADATA_KEY, b"{}"))
    if about.get("findings") != list(card.findings):
        names = ", ".join(about.get("findings", [])) or "none"
        return [f"its findings are {names}; the card says {', '.join(card.findings)}"], None
    if not reader.schema_arrow.equals(wanted):
        return [f"its columns are {_columns(reader.schema_arrow)}; expected {_columns(wanted)}"], None
    faults: list[str] = []
    groups = tuple(reader.metadata.row_group(index).num_rows for index in range(reader.num_row_groups))
    if groups != shard.row_groups:
        faults.append(f"row groups of {groups} rows; the card says {shard.row_groups}")
    faults += _pixels(reader, card)
    table = reader.read(columns=[name for name in wanted.names if name != "image"])
    return faults + list(_values(table, shard)), table


def _columns(schema: pa.Schema) -> str:
    """Names and types on one line."""
    return ", ".join(f"{field.name} {field.type}" for field in schema)


def _pixels(reader: pq.ParquetFile, card: DatasetCard) -> list[str]:
    """Whether every image has the length that the card promises."""
    length = card.image_size**2
    bad = 0
    for group in range(reader.num_row_groups):
        images = reader.read_row_group(group, columns=["image"])["image"]
        lengths = pc.fill_null(pc.binary_length(images), -1)
        bad += len(images) - int(pc.sum(pc.equal(lengths, length)).as_py() or 0)
    return [f"{bad} images do not have {length} bytes"] if bad else []


def _values(table: pa.Table, shard: Shard) -> Iterator[str]:
    """Row numbers, split, labels and mask of one shard."""
    if not np.array_equal(table["row"].to_numpy(), np.arange(shard.row_start, shard.row_start + shard.rows)):
        yield f"column row does not run from {shard.row_start} to {shard.row_start + shard.rows - 1}"
    foreign = [name for name in pc.unique(table["split"]).to_pylist() if name != shard.split]
    if foreign:
        yield f"holds rows of split {foreign[0]!r}; the card says {shard.split!r}"
    for name in ("image_id", "patient_id"):
        if table[name].null_count or pc.any(pc.equal(table[name], "")).as_py():
            yield f"rows without {name}"
    labels, known = matrix(table["labels"]), matrix(table["known"]).astype(bool)
    outside = sorted(set(np.unique(labels).tolist()) - {0, 1})
    if outside:
        yield f"labels hold {outside}; only 0 and 1 are allowed"
    if ((labels == 1) & ~known).any():
        yield "positive labels that are not known"
    bare = int((~((labels == 1) & known).any(axis=1)).sum())
    if shard.split == "train" and bare:
        yield f"{bare} training rows without a known positive; they belong to split {UNLABELLED!r}"
    if shard.split == UNLABELLED and bare != len(table):
        yield f"{len(table) - bare} rows with a known positive in split {UNLABELLED!r}"


def _whole(card: DatasetCard, table: pa.Table, *, complete: bool) -> list[str]:
    """What only shows over all shards: repeated ids, patients in two splits, dense rows, counts."""
    faults: list[str] = []
    images = pc.value_counts(table["image_id"])
    repeated = images.filter(pc.greater(images.field("counts"), 1)).field("values")
    if len(repeated):
        faults.append(f"image id {repeated[0].as_py()!r} occurs more than once ({len(repeated)} such ids)")
    leaked = leaked_patients(table["patient_id"], table["split"])
    for patient, splits in sorted(leaked.items())[:1]:
        faults.append(f"patient {patient!r} has images in {' and '.join(splits)} ({len(leaked)} such patients)")
    start = 0
    for shard in card.shards:
        if shard.row_start != start:
            faults.append(f"{shard.path}: row_start is {shard.row_start}, expected {start}: rows are not dense")
        start = shard.row_start + shard.rows
    return faults + (_counts(card, table) if complete else [])


def _counts(card: DatasetCard, table: pa.Table) -> list[str]:
    """The card's counts against the shards."""
    faults = []
    actual = count(table, card.findings)
    for name in dict.fromkeys([*card.counts, *actual]):
        said, found = card.counts.get(name), actual.get(name)
        if said is None or found is None:
            faults.append(f"split {name!r} is in {'the shards' if said is None else 'the card'} only")
            continue
        if (said.images, said.patients) != (found.images, found.patients):
            faults.append(
                f"split {name!r} holds {found.images} images of {found.patients} patients; "
                f"the card says {said.images} of {said.patients}"
            )
        faults += _findings(name, "positives", card.findings, said.positives, found.positives)
        faults += _findings(name, "known labels", card.findings, said.known, found.known)
    return faults


def _findings(split: str, what: str, findings: Sequence[str], said: dict[str, int], found: dict[str, int]) -> list[str]:
    """The first finding whose count differs."""
    differ = [name for name in findings if said.get(name) != found[name]]
    if not differ:
        return []
    first = differ[0]
    return [
        f"split {split!r} holds {found[first]} {what} of {first}; the card says {said.get(first)} "
        f"({len(differ)} findings differ)"
    ]


def _stray(data_uri: str, card: DatasetCard) -> list[str]:
    """Files among the shards that the card does not name: a reader of the folder would train on them."""
    folder = storage.join(data_uri, SHARD_FOLDER)
    try:
        present = {f"{SHARD_FOLDER}/{storage.name(uri)}" for uri in storage.list_files(folder)}
    except MissingError:
        return []
    stray = sorted(present - {shard.path for shard in card.shards})
    return [f"{path}: not on the card; move it away" for path in stray]


def _quarantine(data_uri: str, card: DatasetCard) -> list[str]:
    """The quarantine table against the card's counts."""
    table = _beside(data_uri, QUARANTINE_FILE, "reason")
    if isinstance(table, str):
        return [table]
    found = dict(Counter(table["reason"].to_pylist()))
    if found != card.quarantined:
        return [f"{QUARANTINE_FILE}: holds {found or 'nothing'}; the card says {card.quarantined or 'nothing'}"]
    return []


def _near(data_uri: str, card: DatasetCard) -> list[str]:
    """The table of near-identical images against the card's count; older data sets have neither."""
    if card.near_duplicates is None:
        return []
    table = _beside(data_uri, NEAR_FILE, "image_id")
    if isinstance(table, str):
        return [table]
    if len(table) != card.near_duplicates:
        return [f"{NEAR_FILE}: {len(table)} entries; the card says {card.near_duplicates}"]
    return []


def _beside(data_uri: str, name: str, column: str) -> pa.Table | str:
    """A table beside the card, which has `column`; or its fault."""
    try:
        with storage.open_input(storage.join(data_uri, name)) as stream:
            refuse_extension_types(pq.read_schema(stream), name)
            return pq.read_table(stream).select([column])
    except MissingError:
        return f"{name}: the file is missing"
    except UserError as error:
        return str(error)
    except (pa.ArrowInvalid, KeyError) as error:
        return f"{name}: not readable ({' '.join(str(error).split())[:160]})"
