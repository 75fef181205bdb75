"""Any CSV or Parquet table of images, its columns named by the user in `prepare.table`."""

import posixpath
from pathlib import PurePosixPath
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mpc.errors import UserError
from pipeline import storage
from pipeline.images import SUFFIXES
from pipeline.manifest import Column, SourceTable, source_table
from pipeline.prepare_config import TableConfig
from pipeline.sources import labels, tables
from pipeline.sources.tables import Csv


def source(
    root: str, *, columns: TableConfig, findings: tuple[str, ...] | None, views: Literal["frontal", "all"]
) -> SourceTable:
    """Reads the table `columns.file` and finds its images below `root` by one listing.

    A row whose path leads to no file is `missing`, a picture or DICOM file that no row names `unlisted`; absolute paths
    and URIs are left to the decoder. With a column of views, `views="frontal"` leaves out lateral ones (`lateral`) and
    others that are stated (`other_view`).

    Args:
        root: local folder or s3:// URI.
        columns: the table's file, and the names of its columns.
        findings: `prepare.findings`.
        views: frontal images alone, or all.

    Raises:
        UserError: what `labels.read` refuses, an image or an id twice, a path that leaves `root`, no image.
    """
    filled = [name for name in (columns.image, columns.image_id, columns.patient) if name]
    told = labels.read(root, columns, findings, filled, (columns.study, columns.view))
    rows = told.table.rows
    paths = _paths(told.table, columns.image)
    tables.once(told.table, columns.image, paths)
    if columns.image_id:
        tables.once(told.table, columns.image_id, rows[columns.image_id])
    uris, found = _places(root, paths)
    view = pc.utf8_upper(rows[columns.view]).combine_chunks() if columns.view else None
    left_out = [] if view is None else tables.unwanted_views(view, views)
    layout = f"{root}: expected the paths in column {columns.image}"
    name = storage.name(told.table.uri)
    stays, quarantine = tables.sift(uris, found, name, layout, left_out)
    made: dict[str, Column] = {
        "image_id": rows[columns.image_id] if columns.image_id else paths,
        "patient_id": rows[columns.patient],
        "uri": uris,
        **{kind: rows[column] for kind, column in (("study_id", columns.study), ("view", columns.view)) if column},
        **told.about,
    }
    return SourceTable(
        table=source_table(made, told.codes).filter(stays),
        findings=told.findings,
        name="table",
        synthetic=False,
        digests={name: told.table.digest},
        quarantine=quarantine,
    )


def _paths(table: Csv, name: str) -> pa.Array:
    """Paths as a listing writes them: without `./` and `//`; absolute ones and URIs stay.

    Raises:
        UserError: one that leads out of the root.
    """
    paths = tables.mapped(table.rows[name], _path)
    if paths.null_count:
        row = pc.index(pc.is_null(paths), True).as_py()
        value = table.rows[name][row].as_py()
        raise UserError(f"{table.uri}, row {table.row(row)}: {name} is {value!r}, which leaves --root; give a URI")
    return paths


def _path(text: str) -> str | None:
    """One path; None where it leads out of the root."""
    if labels.is_absolute(text):
        return storage.absolute(text)
    path = posixpath.normpath(text)
    return None if path.split("/")[0] == ".." else path


def _places(root: str, paths: pa.Array) -> tuple[pa.Array, pa.Array]:
    """URI of each path, and all files that are images by their suffix or by the table."""
    absolute = pa.array([labels.is_absolute(path) for path in paths.to_pylist()])
    uris = pc.if_else(absolute, paths, tables.below(root, paths))
    there = pa.array(storage.list_files(root), pa.string())
    known = np.array([_is_image(storage.name(uri)) for uri in there.to_pylist()], dtype=np.bool_)
    found = there.filter(pa.array(known | np.asarray(pc.is_in(there, value_set=uris))))
    return uris, pa.concat_arrays([found, uris.filter(absolute)])


def _is_image(name: str) -> bool:
    """Whether a file is an image by its name."""
    return PurePosixPath(name).suffix.lower() in SUFFIXES and not name.startswith(".")
