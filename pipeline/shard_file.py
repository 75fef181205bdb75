"""One shard: decode its rows, write one Parquet file, report what became of every image. Runs in a Ray task."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from mpc.config import Config
from pipeline import near, storage
from pipeline.card import Shard, SplitName
from pipeline.decode import DecodeError
from pipeline.geometry import Fit
from pipeline.manifest import TEXT_COLUMNS
from pipeline.pixels import load

WORK_FOLDER = "_prepare"
METADATA_KEY = b"mpc_cxr"
REMOTE_READS = 8
"""Images that are fetched at a time where the source is object storage: latency, not CPU, bounds that."""


class Fault(Config):
    """An image that cannot be used."""

    row: int
    """Position among the planned rows of its shard."""
    reason: str
    detail: str


class ShardRecord(Config):
    """What a finished shard leaves in the work folder: the mark that it needs no second pass."""

    plan: str
    shard: Shard
    faults: tuple[Fault, ...]
    fingerprints: str
    """Perceptual hashes of the shard's images in their order, as `near.packed` writes them."""


@dataclass(frozen=True)
class ShardJob:
    """Everything one task needs besides its rows."""

    out: str
    path: str
    split: SplitName
    row_start: int
    plan: str
    findings: tuple[str, ...]
    strata: tuple[str, ...]
    size: int
    fit: Fit
    row_group: int
    reduce_to: int | None = None

    @property
    def record_uri(self) -> str:
        """Where the record of the finished shard lies."""
        stem = self.path.rpartition("/")[2].removesuffix(".parquet")
        return storage.join(self.out, WORK_FOLDER, f"{stem}.json")


def shard_schema(findings: Sequence[str], strata: Sequence[str], size: int) -> pa.Schema:
    """Columns of a shard; the footer repeats findings and pixel layout, so that a stray shard explains itself."""
    texts = [name for name in TEXT_COLUMNS if name != "uri"]
    fields = [pa.field("row", pa.int64(), nullable=False)]
    fields += [pa.field(name, pa.string(), nullable=False) for name in (*texts, "split")]
    fields += [pa.field(name, pa.string()) for name in strata]
    fields += [
        pa.field("image", pa.large_binary(), nullable=False),
        pa.field("labels", pa.list_(pa.int8(), len(findings)), nullable=False),
        pa.field("known", pa.list_(pa.bool_(), len(findings)), nullable=False),
    ]
    about = {"schema_version": 1, "findings": list(findings), "image_size": size, "encoding": "raw"}
    return pa.schema(fields, metadata={METADATA_KEY: json.dumps(about).encode()})


def write(job: ShardJob, rows: pa.Table) -> ShardRecord:
    """Decodes `rows` of the manifest in order and writes the shard and then its record.

    A faulty image is left out and named in the record. Memory: one row group of pixels.

    Raises:
        UserError: the storage failed; nothing is recorded, so that the shard is written again on resuming.
    """
    faults: list[Fault] = []
    groups: list[int] = []
    fingerprints: list[bytes] = []
    schema = shard_schema(job.findings, job.strata, job.size)
    uri = storage.join(job.out, job.path)
    with storage.open_output(uri) as stream:
        sink = HashingSink(stream)
        with _writer(sink, schema) as writer:
            for kept, images in _decoded(job, rows["uri"].to_pylist(), faults):
                block = _block(rows.take(kept), images, schema, job.row_start + sum(groups))
                writer.write_table(block, row_group_size=job.row_group)
                groups.append(len(kept))
                fingerprints += map(near.fingerprint, images)
    if not groups:
        storage.delete(uri)
    shard = Shard(
        path=job.path, split=job.split, rows=sum(groups), row_start=job.row_start, row_groups=tuple(groups),
        bytes=sink.bytes, sha256=sink.hexdigest(),
    )  # fmt: skip
    return _record(
        job, ShardRecord(plan=job.plan, shard=shard, faults=tuple(faults), fingerprints=near.packed(fingerprints))
    )


def renumber(job: ShardJob, record: ShardRecord) -> ShardRecord:
    """Rewrites a shard's `row` column to start at `job.row_start`; every other byte of data stays what it was.

    The record goes first: if the task dies midway, the shard counts as unfinished and is decoded again.
    """
    storage.delete(job.record_uri)
    uri = storage.join(job.out, job.path)
    schema = shard_schema(job.findings, job.strata, job.size)
    start = job.row_start
    with storage.open_input(uri) as source, storage.open_output(uri) as stream:
        reader, sink = pq.ParquetFile(source), HashingSink(stream)
        with _writer(sink, schema) as writer:
            for group in range(reader.num_row_groups):
                block = reader.read_row_group(group)
                numbers = pa.array(np.arange(start, start + len(block)), pa.int64())
                columns = [numbers, *(block[name] for name in schema.names[1:])]
                writer.write_table(pa.table(columns, schema=schema), row_group_size=job.row_group)
                start += len(block)
    shard = record.shard.model_copy(
        update={"row_start": job.row_start, "bytes": sink.bytes, "sha256": sink.hexdigest()}
    )
    return _record(job, record.model_copy(update={"shard": shard}))


def finished(job: ShardJob) -> ShardRecord | None:
    """The record of this shard, if an earlier run of the same plan finished it and its file is still whole."""
    if not storage.exists(job.record_uri):
        return None
    record = ShardRecord.model_validate_json(storage.read_bytes(job.record_uri))
    whole = record.shard.rows == 0 or storage.size(storage.join(job.out, job.path)) == record.shard.bytes
    return record if whole and record.plan == job.plan else None


def at(job: ShardJob, row_start: int) -> ShardJob:
    """The same job with another first row."""
    return replace(job, row_start=row_start)


class HashingSink:
    """A file for the Parquet writer that hashes and counts what passes; Parquet never seeks back."""

    def __init__(self, stream: Any) -> None:
        self._stream, self._hash = stream, hashlib.sha256()
        self.bytes = 0
        self.closed = False

    def write(self, data: Any) -> int:
        """Passes the bytes on."""
        self._hash.update(data)
        self._stream.write(data)
        self.bytes += len(data)
        return len(data)

    def tell(self) -> int:
        """Bytes so far."""
        return self.bytes

    def flush(self) -> None:
        """Nothing is held back here."""

    def close(self) -> None:
        """The stream's owner closes it."""
        self.closed = True

    def hexdigest(self) -> str:
        """SHA-256 of everything written."""
        return self._hash.hexdigest()


def _writer(sink: HashingSink, schema: pa.Schema) -> pq.ParquetWriter:
    """Statistics of pixels would hold whole images, and a dictionary of them gains nothing."""
    texts = [name for name in schema.names if pa.types.is_string(schema.field(name).type)]
    return pq.ParquetWriter(sink, schema, compression="lz4", use_dictionary=texts, write_statistics=["row", *texts])


def _decoded(
    job: ShardJob, uris: list[str], faults: list[Fault]
) -> Iterator[tuple[list[int], list[NDArray[np.uint8]]]]:
    """Row groups of good images with their positions; appends to `faults` what is not good."""
    kept: list[int] = []
    images: list[NDArray[np.uint8]] = []
    for row, image in enumerate(_loaded(job, uris)):
        if isinstance(image, DecodeError):
            faults.append(Fault(row=row, reason=image.reason, detail=image.detail))
            continue
        kept.append(row)
        images.append(image)
        if len(kept) == job.row_group:
            yield kept, images
            kept, images = [], []
    if kept:
        yield kept, images


def _loaded(job: ShardJob, uris: list[str]) -> Iterator[NDArray[np.uint8] | DecodeError]:
    """Images in order; those of object storage are fetched side by side, one row group ahead at most."""
    if not any(storage.is_remote(uri) for uri in uris):
        yield from (_load(uri, job) for uri in uris)
        return
    with ThreadPoolExecutor(REMOTE_READS) as pool:
        for start in range(0, len(uris), job.row_group):
            yield from pool.map(lambda uri: _load(uri, job), uris[start : start + job.row_group])


def _load(uri: str, job: ShardJob) -> NDArray[np.uint8] | DecodeError:
    """The image, or why there is none."""
    try:
        return load(uri, job.size, job.fit, job.reduce_to)
    except DecodeError as fault:
        return fault


def _block(rows: pa.Table, images: list[NDArray[np.uint8]], schema: pa.Schema, row_start: int) -> pa.Table:
    """One row group in the shard's schema."""
    made = {
        "row": pa.array(np.arange(row_start, row_start + len(rows)), pa.int64()),
        "image": pa.array([image.tobytes() for image in images], pa.large_binary()),
    }
    return pa.table([made[name] if name in made else rows[name] for name in schema.names], schema=schema)


def _record(job: ShardJob, record: ShardRecord) -> ShardRecord:
    """Writes the record; from now on the shard is finished."""
    storage.write_bytes(job.record_uri, record.model_dump_json().encode())
    return record
