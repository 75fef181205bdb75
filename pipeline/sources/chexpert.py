"""CheXpert: its lists train.csv, valid.csv and test.csv and the images they name (Irvin et al., AAAI 2019)."""

from typing import Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from mpc.errors import MissingError, UserError
from pipeline import storage
from pipeline.manifest import Column, SourceTable, source_table
from pipeline.sources import tables
from pipeline.sources.tables import LeftOut

FINDINGS = (
    "No Finding", "Enlarged Cardiomediastinum", "Cardiomegaly", "Lung Opacity", "Lung Lesion", "Edema",
    "Consolidation", "Pneumonia", "Atelectasis", "Pneumothorax", "Pleural Effusion", "Pleural Other", "Fracture",
    "Support Devices",
)  # fmt: skip
"""The 14 labels of the CheXpert labeler, in the order of its tables."""
FOLDERS = ("CheXpert-v1.0", "CheXpert-v1.0-small")
"""Names under which the collection is given out; paths in its tables start with one of them."""
OFFICIAL = ("valid", "test")
ABOUT = ("Sex", "Age", "Frontal/Lateral", "AP/PA")
"""Columns that train.csv and valid.csv must have; the published test.csv has Path and findings alone."""
PATH = (
    r"(?:^|/)(?P<file>(?:train|valid|test)/(?P<patient>patient\d+)/(?P<study>study\d+)/"
    r"(?P<view>view\d+_(?P<side>frontal|lateral))\.jpg)$"
)
SEX = {"Male": "M", "Female": "F"}


def source(
    root: str, *, views: Literal["frontal", "all"], official_test: Literal["valid", "test"] | None, by_hash: bool
) -> SourceTable:
    """Reads the collection at `root`, which is its folder or the folder around it.

    Training images come from train.csv alone. One official list is the test split, the other is left out as
    `official_valid` or `official_test`: the two are labelled by different readers and are never mixed nor trained on.
    Split by hash, train.csv is all there is to split and both are left out. Lateral views are left out as `lateral`.
    Entries 1, 0, -1 (uncertain) and blank (not mentioned) stay codes for the policy.

    Args:
        root: local folder or s3:// URI.
        views: frontal images alone, or all.
        official_test: the list that becomes the test split; None takes test.csv where it is, else valid.csv.
        by_hash: whether the split ignores official lists.

    Raises:
        UserError: no table, a header without its columns, a path or label that is none, no image.
    """
    base = _base(root)
    lists = {name: _read(base, name) for name in ("train", *OFFICIAL) if storage.exists(_csv(base, name))}
    tested = None if by_hash else _tested(base, set(lists), official_test)
    rows = pa.concat_tables([read.rows for read in lists.values()]).combine_chunks()
    labels = np.concatenate([read.labels for read in lists.values()])
    folders = [storage.join(base, name) for name in ("train", tested) if name]
    layout = f"{base}: expected train/patient*/study*/*.jpg"
    stays, quarantine = tables.sift(
        rows["uri"].combine_chunks(), tables.files(folders, (".jpg",)), "train.csv", layout,
        _left_out(rows, tested, views),
    )  # fmt: skip
    chosen = rows.filter(stays)
    return SourceTable(
        table=source_table({name: chosen[name] for name in chosen.column_names}, labels[np.asarray(stays)]),
        findings=FINDINGS,
        name="chexpert",
        synthetic=False,
        digests={f"{name}.csv": read.digest for name, read in sorted(lists.items())},
        quarantine=quarantine,
    )


def _csv(base: str, name: str) -> str:
    """URI of a list."""
    return storage.join(base, f"{name}.csv")


def _base(root: str) -> str:
    """The folder in which train.csv lies."""
    places = [root, *(storage.join(root, folder) for folder in FOLDERS)]
    found = [place for place in places if storage.exists(storage.join(place, "train.csv"))]
    if not found:
        raise MissingError(f"{root} holds no CheXpert table; expected train.csv in it, or in {' or '.join(FOLDERS)}")
    if len(found) > 1:
        raise UserError(f"{root} holds several copies of CheXpert; give one of {', '.join(found)} as --root")
    return found[0]


def _tested(base: str, present: set[str], asked: str | None) -> str:
    """The list that becomes the test split."""
    tested = asked or ("test" if "test" in present else "valid")
    if tested not in present:
        raise MissingError(
            f"{base} holds no {tested}.csv, the list of the test split; add it, name another prepare.official_test, "
            f"or set prepare.split.by=hash"
        )
    return tested


class _List(NamedTuple):
    """One list, read."""

    rows: pa.Table
    """Text columns of a source table, and `list` and `side`, which decide what is left out."""
    labels: NDArray[np.int8]
    digest: str


def _read(base: str, name: str) -> _List:
    """One list in full."""
    required = ("Path", *FINDINGS, *(ABOUT if name != "test" else ()))
    table = tables.read(_csv(base, name), required, ABOUT, filled=("Path",))
    parts = pc.extract_regex(table.rows["Path"].combine_chunks(), PATH)
    if parts.null_count:
        row = pc.index(pc.is_null(parts), True).as_py()
        raise UserError(
            f"{table.uri}, row {row + 2}: Path is {table.rows['Path'][row].as_py()!r}; expected "
            f"{name}/patient00001/study1/view1_frontal.jpg, with or without a folder before it"
        )
    split = "train" if name == "train" else "test"
    constant = {"list": pa.repeat(name, len(parts)), "split": pa.repeat(split, len(parts))}
    rows = pa.table({**_columns(table.rows, parts), **constant, "uri": tables.below(base, _field(parts, "file"))})
    return _List(rows, tables.codes(table, FINDINGS), table.digest)


def _columns(rows: pa.Table, parts: pa.StructArray) -> dict[str, Column]:
    """Ids from the path, the view, and the strata; what a list does not tell is null."""
    patient, study, view = (_field(parts, name) for name in ("patient", "study", "view"))
    told = {name: rows[name] if name in rows.column_names else pa.repeat("", len(rows)) for name in ABOUT}
    side = pc.if_else(pc.equal(told["Frontal/Lateral"], ""), _field(parts, "side"), told["Frontal/Lateral"])
    side = pc.utf8_lower(side)
    return {
        "image_id": pc.binary_join_element_wise(patient, study, view, "_"),
        "patient_id": patient,
        "study_id": pc.binary_join_element_wise(patient, study, "_"),
        "view": pc.if_else(pc.equal(told["AP/PA"], ""), side, told["AP/PA"]),
        "side": side,
        "sex": tables.mapped(told["Sex"], SEX.get),
        "age_band": tables.mapped(told["Age"], lambda age: tables.age_band(age) if age else None),
    }


def _field(parts: pa.StructArray, name: str) -> pa.StringArray:
    """One part of the path."""
    return pc.struct_field(parts, name)


def _left_out(rows: pa.Table, tested: str | None, views: str) -> list[LeftOut]:
    """Official lists that do not test, then lateral views."""
    reasons = [
        LeftOut(
            np.asarray(pc.equal(rows["list"], name)),
            f"official_{name}",
            f"row of {name}.csv, which is not this data set's test split",
        )
        for name in OFFICIAL
        if name != tested
    ]
    if views == "frontal":
        lateral = np.asarray(pc.not_equal(rows["side"], "frontal"))
        reasons.append(LeftOut(lateral, "lateral", "prepare.views=frontal leaves lateral views out"))
    return reasons
