"""DICOM headers by the thousand, in Ray Data tasks: a few values that are asked for by name, and nothing else."""

import io
import json
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, BinaryIO

import pyarrow as pa
import pydicom

from mpc.errors import MissingError, UserError
from pipeline import storage
from pipeline.dicom import (  # importing it also keeps pydicom from quoting values in warnings and logs
    DicomError,
    refuse_bomb,
)

ALLOWED = frozenset(
    {"SOPInstanceUID", "StudyInstanceUID", "PatientID", "AccessionNumber", "Modality", "ViewPosition", "PatientSex"}
    | {"PatientAge"}
)
"""Everything that may ever be read from a header; a caller asks for those that it needs."""
CHUNK = 256
"""Files of one task."""
RADIOGRAPHS = ("CR", "DX", "RG", "OT")
"""Modalities (PS3.3 C.7.3.1.1.1) that a chest radiograph may have; OT is what converters write."""
LATERALS = ("LL", "RL", "LLD", "RLD", "LATERAL", "LAT")
"""View positions of the side, decubitus ones too; the last two are no defined terms, but are in use."""
OTHER_MODALITY, LATERAL = "other_modality", "lateral"
BUFFER = 2**16
"""Bytes of one read: most headers are shorter, and on object storage each read is a request."""
REMOTE_READS = 8
"""Files read at a time where they lie on object storage: latency bounds that."""


def read_headers(uris: Sequence[str], keywords: Sequence[str], cpus: float) -> pa.Table:
    """Columns `uri`, one for each keyword, `reason` and `detail`, all text, in the order of `uris`.

    `reason` is "" where the header could be read, else `unsupported`, `unreadable`, `too_large`, `missing` or `denied`;
    `detail` quotes no value. What a header does not have is "".

    Args:
        uris: files, at least one.
        keywords: DICOM keywords, each one of `ALLOWED`.
        cpus: what each task asks of Ray.

    Raises:
        UserError: the storage cannot be reached, or no machine offers `cpus`.
    """
    assert set(keywords) <= ALLOWED, keywords
    from pipeline import tasks  # Ray, which other readers of tables do not need

    shared = {"keywords": json.dumps(list(keywords))}
    starts = range(0, len(uris), CHUNK)
    items = [{**shared, "start": start, "uris": json.dumps(uris[start : start + CHUNK])} for start in starts]
    parts = {row["start"]: row["rows"] for row in tasks.results(header_task, items, cpus)}
    return pa.concat_tables([pa.ipc.open_stream(parts[start]).read_all() for start in starts]).combine_chunks()


def header_task(item: dict[str, Any]) -> dict[str, Any]:
    """In the worker: the headers of one chunk as an Arrow stream, or the user's error as a value."""
    uris, keywords = json.loads(item["uris"]), json.loads(item["keywords"])
    schema = pa.schema([(name, pa.string()) for name in ("uri", *keywords, "reason", "detail")])
    with warnings.catch_warnings(), ThreadPoolExecutor(REMOTE_READS if storage.is_remote(uris[0]) else 1) as pool:
        warnings.simplefilter("ignore")
        try:
            rows = pa.Table.from_pylist(list(pool.map(lambda uri: _row(uri, keywords), uris)), schema=schema)
        except UserError as error:
            return {"start": item["start"], "rows": b"", "error": str(error)}
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, schema) as writer:
        writer.write_table(rows)
    return {"start": item["start"], "rows": sink.getvalue().to_pybytes(), "error": ""}


def _row(uri: str, keywords: Sequence[str]) -> dict[str, str]:
    """The values of one file, or why there are none."""
    row = dict.fromkeys((*keywords, "reason", "detail"), "") | {"uri": uri}
    try:
        with storage.open_input(uri) as stream:
            return row | read_header(_Buffered(stream, BUFFER), keywords)
    except DicomError as fault:
        return row | {"reason": fault.reason, "detail": fault.detail}
    except MissingError:
        return row | {"reason": "missing", "detail": "no such file"}
    except storage.DeniedError:
        return row | {"reason": "denied", "detail": "may not be read: check its rights"}


class _Buffered(io.BufferedReader):
    """Reads ahead; pydicom asks such a file for its name, which the storage's files do not have."""

    name = ""

    def read(self, size: int | None = -1) -> bytes:
        """As any file; the rest, which pydicom asks for to inflate it, only where that is safe."""
        content = super().read(size)
        if size is None or size < 0:
            refuse_bomb(content)
        return content


def read_header(stream: BinaryIO, keywords: Sequence[str]) -> dict[str, str]:
    """Keyword -> value as text, "" where the header has none; pixels are not read.

    Raises:
        DicomError: not DICOM, or a header that cannot be read.
        OSError: the file itself cannot be.
    """
    magic = stream.read(132)[128:]
    if magic != b"DICM":
        raise DicomError("unsupported", "not DICOM by its first bytes")
    stream.seek(0)
    try:
        dataset = pydicom.dcmread(stream, stop_before_pixels=True, specific_tags=list(keywords))
        return {name: _text(dataset.get(name)) for name in keywords}
    except (OSError, DicomError):
        raise
    except Exception as error:  # a damaged file can fail anywhere in a parser of nested, typed elements
        raise DicomError("unreadable", f"damaged DICOM header ({type(error).__name__})") from None


def _text(value: Any) -> str:
    """A value as text; several are joined as the file has them."""
    several = isinstance(value, list | tuple | pydicom.multival.MultiValue)
    text = "\\".join(map(str, value)) if several else str(value if value is not None else "")
    return text.strip(" \0")


def kind_flags(data: bytes) -> tuple[str, ...]:
    """What a DICOM header says against a frontal radiograph, in fixed words; nothing of other files."""
    if data[128:132] != b"DICM":
        return ()
    header = read_header(io.BytesIO(data), ("Modality", "ViewPosition"))
    modality, view = header["Modality"].upper(), header["ViewPosition"].upper()
    other = bool(modality) and modality not in RADIOGRAPHS
    return (*((OTHER_MODALITY,) if other else ()), *((LATERAL,) if view in LATERALS else ()))
