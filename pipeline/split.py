"""Train, val and test by patient: a salted hash, a table of the user's, or the collection's own lists.

The collection's lists know no `val`; it is carved from their training patients.
"""

import hashlib

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from mpc.errors import UserError
from pipeline.manifest import SPLITS, UNLABELLED, check_patients, leaked_patients, matrix
from pipeline.prepare_config import SplitConfig
from pipeline.sources import tables

FILE_KEYS = ("patient_id", "image_id")
"""Columns by which a table of splits may name its rows."""


def assign(table: pa.Table, split: SplitConfig) -> pa.Table:
    """Fills the `split` column; every patient lies in one split, whatever the order of the rows.

    `official` keeps the source's own values; where those have no `val`, the share `split.val` of the training patients
    becomes it. A source without lists, and `hash`, splits all patients by hash. With `split.folds` above 1 the test
    split is the fold `split.fold` of the hash, and `val` the share `split.val` of the other patients. `file` takes all
    splits from `split.file` as they stand there.

    Raises:
        UserError: some rows without official split or missing in the file, a patient in two splits, or an empty split.
    """
    official = table["split"]
    if split.file is not None:
        assigned = _listed(table, split.file)
    elif split.by == "hash" or official.null_count == len(official):
        assigned = _by_hash(table["patient_id"], split)
    else:
        assigned = _official(table, split)
    position = table.schema.get_field_index("split")
    table = table.set_column(position, pa.field("split", pa.string(), nullable=False), assigned)
    check_patients(table)
    require_all(table["split"], split)
    return table


def set_apart(table: pa.Table) -> pa.Table:
    """Moves training rows without a known positive to the split `unlabelled`: they carry nothing to train on."""
    positive = (matrix(table["labels"]).astype(bool) & matrix(table["known"]).astype(bool)).any(axis=1)
    bare = pc.and_(pc.equal(table["split"], "train"), pa.array(~positive))
    position = table.schema.get_field_index("split")
    return table.set_column(position, table.schema.field(position), pc.if_else(bare, UNLABELLED, table["split"]))


def require_all(splits: pa.ChunkedArray, split: SplitConfig) -> None:
    """Raises UserError where train, val or test has no image."""
    present = set(pc.unique(splits).to_pylist())
    empty = [name for name in SPLITS if name not in present]
    if empty and split.file:
        raise UserError(f"split {empty[0]!r} is empty ({len(splits)} images; {split.file}); list images for it there")
    if empty:
        tested = f"fold={split.fold} of {split.folds}" if split.folds > 1 else f"test={split.test}"
        raise UserError(
            f"split {empty[0]!r} is empty ({len(splits)} images; split.by={split.by}, val={split.val}, {tested}); "
            f"raise its share, use another split.salt or more patients with a finding"
        )


def unit_hash(salt: str, key: str) -> float:
    """A number in [0, 1) that depends on nothing but salt and key."""
    digest = hashlib.blake2b(f"{salt}:{key}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2.0**64


def _by_hash(patients: pa.ChunkedArray, split: SplitConfig) -> pa.Array:
    """Test below `test`, val in the next `val`, train above, by the patient's hash; or one fold of it as test."""
    draw = _patient_hash(patients, split.salt)
    if split.folds > 1:
        # the hash that cuts the folds is used up: below the first fold's edge it could carve no val from the others
        carved = _patient_hash(patients, f"{split.salt}:val:{split.fold}") < split.val
        fold = np.minimum(np.floor(draw * split.folds), split.folds - 1)  # a draw may round up to 1
        return pa.array(np.where(fold == split.fold, "test", np.where(carved, "val", "train")), pa.string())
    edges = [split.test, split.test + split.val]
    return pa.array(np.array(["test", "val", "train"])[np.digitize(draw, edges)], pa.string())


def _official(table: pa.Table, split: SplitConfig) -> pa.ChunkedArray:
    """The source's own split, completed by a `val` where it has none."""
    official = table["split"]
    if official.null_count:
        first = table["image_id"].filter(pc.is_null(official))[0].as_py()
        raise UserError(
            f"{official.null_count} of {len(official)} images are in no official list, first {first!r}; "
            f"complete the lists or set split.by=hash"
        )
    if pc.any(pc.equal(official, "val")).as_py():
        return official
    carved = pa.array(_patient_hash(table["patient_id"], split.salt) < split.val)
    return pc.if_else(pc.and_(pc.equal(official, "train"), carved), "val", official)


def _listed(table: pa.Table, uri: str) -> pa.Array:
    """The split of every row as a table of patients or images says."""
    listed = tables.read(uri, ("split",), FILE_KEYS, filled=("split",)).rows
    keys = [name for name in FILE_KEYS if name in listed.column_names]
    if len(keys) != 1:
        raise UserError(
            f"{uri}, the table of splits, has {' and '.join(keys) or 'none'} of the columns "
            f"{' and '.join(FILE_KEYS)}; give it exactly one"
        )
    named, splits = listed[keys[0]].combine_chunks(), listed["split"].combine_chunks()
    strange = pc.index(pc.invert(pc.is_in(splits, value_set=pa.array(SPLITS))), True).as_py()
    if strange >= 0:
        raise UserError(f"{uri}, row {strange + 2}: split is {splits[strange].as_py()!r}; write {', '.join(SPLITS)}")
    both = leaked_patients(named, splits)
    if both:
        raise UserError(f"{uri} puts {keys[0]} {min(both)!r} into {' and '.join(both[min(both)])}; mend the table")
    rows = pc.index_in(table[keys[0]], value_set=named)
    if rows.null_count:
        first = table[keys[0]].filter(pc.is_null(rows))[0].as_py()
        raise UserError(f"{uri} lacks {rows.null_count} of {len(table)} images, first {keys[0]} {first!r}; add them")
    return splits.take(rows.combine_chunks())


def _patient_hash(patients: pa.ChunkedArray, salt: str) -> NDArray[np.float64]:
    """One draw a patient, spread over his images: [N] in [0, 1)."""
    encoded = patients.combine_chunks().dictionary_encode()
    draws = np.array([unit_hash(salt, patient) for patient in encoded.dictionary.to_pylist()])
    return np.asarray(draws[encoded.indices.to_numpy()], dtype=np.float64)
