"""MIMIC-CXR-JPG: its tables of images, of labels and of splits, joined by id (Johnson et al., PhysioNet)."""

from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mpc.errors import UserError
from pipeline import storage
from pipeline.manifest import SourceTable, source_table
from pipeline.sources import tables
from pipeline.sources.chexpert import FINDINGS
from pipeline.sources.tables import Csv, LeftOut

IMAGE = ("subject_id", "study_id", "dicom_id")
STUDY = ("subject_id", "study_id")
SPLITS = {"train": "train", "validate": "val", "test": "test"}
FRONTAL = ("AP", "PA")
LATERAL = ("LATERAL", "LL", "XTABLE LATERAL")


def source(root: str, *, views: Literal["frontal", "all"], labeler: Literal["chexpert", "negbio"]) -> SourceTable:
    """Reads the collection at `root`: three tables beside `files/p10/p10000032/s50414267/<dicom_id>.jpg`.

    The tables are `mimic-cxr-2.0.0-metadata`, `-split` and the labeler's, each as .csv.gz or .csv. All images are found
    by one listing. Left out are lateral views (`lateral`), other views or none (`other_view`), and images of studies
    without a row of labels (`no_labels`). Findings have CheXpert's names and order; entries 1, 0, -1 (uncertain) and
    blank (not mentioned) stay codes for the policy.

    Args:
        root: local folder or s3:// URI.
        views: frontal images (AP and PA) alone, or all.
        labeler: whose labels of the reports are read.

    Raises:
        UserError: a table or a column is missing, ids that repeat, a label or split that is none, no image.
    """
    images = _table(root, "metadata", (*IMAGE, "ViewPosition"), filled=IMAGE)
    studies = _table(root, labeler, (*STUDY, *FINDINGS), filled=STUDY)
    official = _table(root, "split", (*IMAGE, "split"), filled=IMAGE)
    study = _lookup(images, studies, STUDY)
    columns = _columns(root, images.rows) | {"split": _splits(official).take(_lookup(images, official, IMAGE))}
    found = tables.files([storage.join(root, "files")], (".jpg",))
    layout = f"{root}: expected files/p10/p10000032/s50414267/*.jpg"
    stays, quarantine = tables.sift(
        columns["uri"], found, storage.name(images.uri), layout, _left_out(images.rows, study, views)
    )
    labels = tables.codes(studies, FINDINGS)[study.filter(stays).to_numpy()]
    return SourceTable(
        table=source_table({name: column.filter(stays) for name, column in columns.items()}, labels),
        findings=FINDINGS,
        name="mimic_cxr",
        synthetic=False,
        digests={storage.name(table.uri): table.digest for table in (studies, images, official)},
        quarantine=quarantine,
    )


def _table(root: str, name: str, columns: tuple[str, ...], filled: tuple[str, ...]) -> Csv:
    """One of the collection's tables."""
    names = [f"mimic-cxr-2.0.0-{name}.csv{end}" for end in (".gz", "")]
    return tables.read(tables.find(root, names, f"MIMIC-CXR table of {name}"), columns, filled=filled)


def _lookup(images: Csv, table: Csv, ids: tuple[str, ...]) -> pa.Array:
    """Row of `table` for each image, null where it has none.

    Raises:
        UserError: two rows of `table` have the same ids.
    """
    wanted, keys = (_keys(rows, ids) for rows in (images.rows, table.rows))
    counts = pc.value_counts(keys)
    doubled = counts.field("values").filter(pc.greater(counts.field("counts"), 1))
    if len(doubled):
        raise UserError(f"{table.uri} has {'/'.join(ids)} {doubled[0].as_py()} twice; mend the table")
    return pc.index_in(wanted, value_set=keys).combine_chunks()


def _keys(rows: pa.Table, ids: tuple[str, ...]) -> pa.ChunkedArray:
    """The ids of each row as one text."""
    return pc.binary_join_element_wise(*(rows[name] for name in ids), "/")


def _columns(root: str, rows: pa.Table) -> dict[str, pa.Array]:
    """Ids, view and the place of each image, built from the ids as the collection does."""
    dicom, subject, study, view = (rows[name].combine_chunks() for name in ("dicom_id", *STUDY, "ViewPosition"))
    group = pc.binary_join_element_wise("files/p", pc.utf8_slice_codeunits(subject, 0, 2), "")
    folder = pc.binary_join_element_wise(group, "/p", subject, "/s", study, "/", dicom, ".jpg", "")
    return {
        "image_id": dicom,
        "patient_id": subject,
        "study_id": study,
        "view": view,
        "uri": tables.below(root, folder),
    }


def _splits(official: Csv) -> pa.Array:
    """The official split of every row, by the names used here.

    Raises:
        UserError: a value that is none, with its row.
    """
    splits = tables.mapped(official.rows["split"], SPLITS.get)
    if splits.null_count:
        row = pc.index(pc.is_null(splits), True).as_py()
        value = official.rows["split"][row].as_py()
        raise UserError(f"{official.uri}, row {row + 2}: split is {value!r}; the splits are {', '.join(SPLITS)}")
    return splits


def _left_out(rows: pa.Table, study: pa.Array, views: str) -> list[LeftOut]:
    """Views that are not wanted, then studies whose report was not labelled."""
    reasons = []
    if views == "frontal":
        view = rows["ViewPosition"]
        lateral = np.asarray(pc.is_in(view, value_set=pa.array(LATERAL)))
        other = ~np.asarray(pc.is_in(view, value_set=pa.array((*FRONTAL, *LATERAL))))
        why = "prepare.views=frontal keeps AP and PA alone"
        reasons = [LeftOut(lateral, "lateral", why), LeftOut(other, "other_view", why)]
    bare = np.asarray(pc.is_null(study))
    return [*reasons, LeftOut(bare, "no_labels", "the table of labels has no row of its study")]
