"""A folder of DICOM files, local or on object storage, and the user's table of their labels."""

import posixpath
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from mpc.errors import UserError
from pipeline import headers, storage
from pipeline.manifest import Column, SourceTable, source_table
from pipeline.prepare_config import DicomConfig, TableConfig
from pipeline.sources import labels, tables
from pipeline.sources.labels import Labelled
from pipeline.sources.tables import LeftOut

IDS = {"image_id": "SOPInstanceUID", "patient_id": "PatientID", "study_id": "StudyInstanceUID"}
KEYS = {
    "sop_instance_uid": "SOPInstanceUID",
    "study_instance_uid": "StudyInstanceUID",
    "patient_id": "PatientID",
    "accession_number": "AccessionNumber",
}
"""Choices of `prepare.dicom.key` that are values of the header."""
STRATA = {"sex": ("PatientSex", labels.sex), "age_band": ("PatientAge", labels.age_band)}
VIEWS = (*tables.FRONTAL, *tables.LATERAL)
OTHER = "OTHER"


def source(
    root: str,
    *,
    table: TableConfig,
    dicom: DicomConfig,
    findings: tuple[str, ...] | None,
    views: Literal["frontal", "all"],
    strata: tuple[str, ...],
    task_cpus: float,
) -> SourceTable:
    """Reads the headers of all files below `root`, and joins them to the rows of the table `table.file`.

    Of a header come SOPInstanceUID, StudyInstanceUID, PatientID, Modality, ViewPosition, the key, and sex and age where
    `strata` asks for them and the table does not tell; nothing else. Left out are other modalities (`other_modality`),
    lateral and other stated views under `views="frontal"`, files without a row (`no_labels`) and further files of an
    image (`duplicate`). Not usable are files that are no DICOM (`unsupported`), headers that cannot be read
    (`unreadable`), files without PatientID (`no_patient`), and rows that no file matches (`missing`).

    Args:
        root: local folder or s3:// URI.
        table: the table of labels; its column `image` holds keys.
        dicom: what a key is, and which modalities are radiographs.
        findings: `prepare.findings`.
        views: frontal images alone, or all.
        strata: `prepare.strata`.
        task_cpus: CPUs that each task, which reads 256 headers, asks of Ray.

    Raises:
        UserError: what `labels.read` refuses, a key twice, no file, no image that stays, storage that fails.
    """
    told = labels.read(root, table, findings, [table.image])
    keys = _table_keys(told, table.image, dicom.key)
    tables.once(told.table, table.image, keys)
    read, unread = _headers(root, told.table.uri, _keywords(dicom, strata, told), task_cpus)
    own = _below(root, read["uri"]) if dicom.key == "file" else read[KEYS[dicom.key]].combine_chunks()
    seen = pa.concat_arrays([own, _below(root, unread["source"])]) if dicom.key == "file" else own
    row = pc.index_in(own, value_set=keys)
    view = pc.utf8_upper(read["ViewPosition"]).combine_chunks()
    uris = read["uri"].combine_chunks()
    name = storage.name(told.table.uri)
    left_out = _left_out(read, view, row, views, dicom)
    layout = f"{root}: expected DICOM files whose {dicom.key} is in column {table.image}"
    stays, quarantine = tables.sift(uris, uris, name, layout, left_out)
    row, view, read = row.filter(stays), view.filter(stays), read.filter(stays)
    columns: dict[str, Column] = {kind: read[keyword] for kind, keyword in IDS.items()}
    columns |= {"uri": read["uri"], "view": pc.if_else(pc.is_in(view, value_set=pa.array(VIEWS)), view, OTHER)}
    columns |= {kind: column.take(row) for kind, column in told.about.items()}
    columns |= _strata(read, strata, told)
    return SourceTable(
        table=source_table(columns, told.codes[row.to_numpy()]),
        findings=told.findings,
        name="dicom",
        synthetic=False,
        digests={name: told.table.digest},
        quarantine=pa.concat_tables([unread, quarantine, _unmatched(told, keys, seen)]),
    )


def _table_keys(told: Labelled, name: str, key: str) -> pa.Array:
    """The key of each row of the table; a path as a listing writes it."""
    keys = told.table.rows[name].combine_chunks()
    return tables.mapped(keys, posixpath.normpath) if key == "file" else keys


def _keywords(dicom: DicomConfig, strata: tuple[str, ...], told: Labelled) -> list[str]:
    """What is read of each header."""
    wanted = [*IDS.values(), "Modality", "ViewPosition"]
    wanted += [KEYS[dicom.key]] if dicom.key in KEYS else []
    wanted += [STRATA[name][0] for name in strata if name not in told.about]
    return list(dict.fromkeys(wanted))


def _headers(root: str, table: str, keywords: list[str], cpus: float) -> tuple[pa.Table, pa.Table]:
    """Headers that could be read, and the quarantine of the other files; neither counts the table itself.

    Raises:
        UserError: no file there, or none that is DICOM.
    """
    files = [uri for uri in storage.list_files(root) if uri != table and _is_candidate(storage.name(uri))]
    if not files:
        raise UserError(f"{root} holds no files beside the table; give the folder of the DICOM files as --root")
    found = headers.read_headers(files, keywords, cpus)
    nameless = pc.and_(pc.equal(found["reason"], ""), pc.equal(found["SOPInstanceUID"], ""))
    reason = pc.if_else(nameless, "unreadable", found["reason"])
    detail = pc.if_else(nameless, "its header has no SOPInstanceUID", found["detail"])
    good = pc.equal(reason, "")
    if not pc.any(good).as_py():
        first = f"{storage.name(files[0])}: {detail[0].as_py()}"
        raise UserError(
            f"{root}: none of its {len(files)} files has a readable DICOM header (first {first}); mend --root"
        )
    faults = pa.table({"source": found["uri"], "reason": reason, "detail": detail})
    return found.filter(good), faults.filter(pc.invert(good))


def _is_candidate(name: str) -> bool:
    """Whether a file may be an image: not hidden, and not the index of a DICOM medium."""
    return not name.startswith(".") and name.upper() != "DICOMDIR"


def _below(root: str, uris: pa.ChunkedArray) -> pa.Array:
    """Paths relative to the root."""
    base = root.partition("?")[0].rstrip("/") + "/"
    return pa.array([uri.partition("?")[0].removeprefix(base) for uri in uris.to_pylist()], pa.string())


def _left_out(
    read: pa.Table, view: pa.Array, row: pa.Array, views: Literal["frontal", "all"], dicom: DicomConfig
) -> list[LeftOut]:
    """Why files do not become images, most important first; of files that else would, the first of an image stays."""
    modality = pc.utf8_upper(read["Modality"])
    wanted = pa.array([name.upper() for name in dicom.modalities], pa.string())
    foreign = ~np.asarray(pc.is_in(modality, value_set=wanted))
    reasons = [
        LeftOut(foreign, "other_modality", f"its Modality is none of {', '.join(dicom.modalities)}"),
        *tables.unwanted_views(view, views),
        LeftOut(np.asarray(pc.is_null(row)), "no_labels", f"the table of labels has no row of its {dicom.key}"),
        LeftOut(np.asarray(pc.equal(read["PatientID"], "")), "no_patient", "its header has no PatientID"),
    ]
    usable = ~np.any([reason.mask for reason in reasons], axis=0)
    again = LeftOut(_again(read["SOPInstanceUID"], usable), "duplicate", "same SOPInstanceUID as an earlier file")
    return [*reasons, again]


def _again(ids: pa.ChunkedArray, usable: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Rows among the usable ones whose id an earlier of them has, [N]."""
    indices = ids.combine_chunks().dictionary_encode().indices.to_numpy()[usable]
    _, first, which = np.unique(indices, return_index=True, return_inverse=True)
    again = np.zeros(len(usable), dtype=np.bool_)
    again[usable] = first[which] < np.arange(len(indices))
    return again


def _strata(read: pa.Table, strata: tuple[str, ...], told: Labelled) -> dict[str, pa.Array]:
    """Patient fields that are asked for and that the table does not tell."""
    wanted = {name: STRATA[name] for name in strata if name not in told.about}
    return {name: tables.mapped(read[keyword], function) for name, (keyword, function) in wanted.items()}


def _unmatched(told: Labelled, keys: pa.Array, seen: pa.Array) -> pa.Table:
    """Rows of the table that no file matches, by their number: a key may name a patient."""
    bare = np.flatnonzero(~np.asarray(pc.is_in(keys, value_set=seen)))
    sources = pa.array([f"{told.table.uri}, row {told.table.row(int(position))}" for position in bare], pa.string())
    return tables.quarantine(sources, "missing", "row of the table of labels without a DICOM file")
