"""VinDr-CXR 1.0.0: its two tables of image labels and the images they name (Nguyen et al., Scientific Data 2022)."""

from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from mpc.errors import UserError
from pipeline import storage
from pipeline.manifest import BLANK, NEGATIVE, POSITIVE, UNCERTAIN, SourceTable, source_table
from pipeline.sources import tables
from pipeline.sources.tables import Csv

FINDINGS = (
    "Aortic enlargement", "Atelectasis", "Calcification", "Cardiomegaly", "Clavicle fracture", "Consolidation", "Edema",
    "Emphysema", "Enlarged PA", "ILD", "Infiltration", "Lung Opacity", "Lung cavity", "Lung cyst", "Mediastinal shift",
    "Nodule/Mass", "Pleural effusion", "Pleural thickening", "Pneumothorax", "Pulmonary fibrosis", "Rib fracture",
    "Other lesion", "COPD", "Lung tumor", "Pneumonia", "Tuberculosis", "Other diseases", "No finding",
)  # fmt: skip
"""The 22 findings and 6 impressions, in the order of its tables."""
OTHER = ("Other diseases", "Other disease")
"""One finding: the table of training images writes the first, that of test images the second."""
VOTES = {"1": POSITIVE, "1.0": POSITIVE, "0": NEGATIVE, "0.0": NEGATIVE, "": BLANK}
"""What a reader, or the consensus, says; an empty cell, which copies have, is no vote."""
SPLITS = ("train", "test")
SUFFIXES = (".dicom", ".dcm", ".png", ".jpg", ".jpeg")
"""The collection has .dicom; copies of it are given out as pictures too."""
VIEW = "PA"


def source(root: str) -> SourceTable:
    """Reads the collection at `root`: `annotations/image_labels_{train,test}.csv` beside `train` and `test`.

    A training image has a row for each of its readers: a finding has the value of the strict majority of those who
    voted, a tie is uncertain, no vote is blank. A test image has one row, the consensus of five. The collection tells
    no patients: every image counts as a patient and a study of its own. All of its images are PA.

    Args:
        root: local folder or s3:// URI.

    Raises:
        UserError: a table or a column is missing, a vote that is none, a reader who votes twice on an image, an image
            in both tables or in two files, no image.
    """
    lists = [_train(root), _test(root)]
    ids = pa.concat_arrays([read.ids for read in lists])
    splits = pa.concat_arrays([pa.repeat(split, len(read.ids)) for split, read in zip(SPLITS, lists, strict=True)])
    both = lists[1].ids.filter(pc.is_in(lists[1].ids, value_set=lists[0].ids))
    if len(both):
        raise UserError(f"image {both[0].as_py()!r} is in {' and '.join(read.name for read in lists)}; mend the tables")
    uris, found = _images(root, ids, splits)
    layout = f"{root}: expected train/*.dicom and test/*.dicom"
    stays, quarantine = tables.sift(uris, found, " and ".join(read.name for read in lists), layout)
    columns = {"image_id": ids, "patient_id": ids, "study_id": ids, "uri": uris, "split": splits}
    columns["view"] = pa.repeat(VIEW, len(ids))
    labels = np.concatenate([read.labels for read in lists])
    return SourceTable(
        table=source_table({name: column.filter(stays) for name, column in columns.items()}, labels[np.asarray(stays)]),
        findings=FINDINGS,
        name="vindr",
        synthetic=False,
        digests={read.name: read.digest for read in sorted(lists)},
        quarantine=quarantine,
    )


class _List(NamedTuple):
    """One split, an entry an image."""

    name: str
    digest: str
    ids: pa.Array
    labels: NDArray[np.int8]
    """Codes [N, 28]."""


def _train(root: str) -> _List:
    """The training images, their readers' votes counted."""
    table, votes = _read(root, "train", ("image_id", "rad_id"))
    pairs = pc.binary_join_element_wise(table.rows["image_id"], table.rows["rad_id"], " by reader ")
    tables.once(table, "image and reader", pairs)
    encoded = table.rows["image_id"].combine_chunks().dictionary_encode()
    labels = majority(votes, encoded.indices.to_numpy(), len(encoded.dictionary))
    return _List(storage.name(table.uri), table.digest, encoded.dictionary, labels)


def _test(root: str) -> _List:
    """The test images, one row each."""
    table, labels = _read(root, "test", ("image_id",))
    tables.once(table, "image", table.rows["image_id"])
    return _List(storage.name(table.uri), table.digest, table.rows["image_id"].combine_chunks(), labels)


def _read(root: str, split: str, ids: tuple[str, ...]) -> tuple[Csv, NDArray[np.int8]]:
    """A table, and its entries [N, 28] in the order of `FINDINGS`."""
    folder = storage.join(root, "annotations")
    uri = tables.find(folder, (f"image_labels_{split}.csv",), f"VinDr-CXR table of {split} images")
    plain = [name for name in FINDINGS if name not in OTHER]
    table = tables.read(uri, (*ids, *plain), OTHER, filled=ids)
    named = [name for name in OTHER if name in table.rows.column_names]
    if len(named) != 1:
        raise UserError(f"{uri} has {len(named)} columns for {OTHER[0]!r}; expected one of {' and '.join(OTHER)}")
    return table, tables.codes(table, [named[0] if name in OTHER else name for name in FINDINGS], VOTES)


def majority(votes: NDArray[np.int8], image: NDArray[np.integer], images: int) -> NDArray[np.int8]:
    """What most readers say: codes [images, K] from votes [R, K] in {1, 0, blank}, row `r` on image `image[r]`."""
    counts = np.zeros((2, images, votes.shape[1]), dtype=np.int64)
    for count, vote in zip(counts, (POSITIVE, NEGATIVE), strict=True):
        np.add.at(count, image, votes == vote)
    ayes, noes = counts
    decided = np.where(ayes > noes, POSITIVE, np.where(ayes < noes, NEGATIVE, UNCERTAIN))
    return np.where(ayes + noes == 0, BLANK, decided).astype(np.int8)


def _images(root: str, ids: pa.Array, splits: pa.Array) -> tuple[pa.Array, pa.Array]:
    """Where each image lies or should lie, and all images that are there, by one listing a split."""
    found: dict[tuple[str, str], str] = {}
    for split in SPLITS:
        for uri in tables.files([storage.join(root, split)], SUFFIXES).to_pylist():
            key = (split, storage.name(uri).rpartition(".")[0])
            if key in found:
                raise UserError(f"image {key[1]} of {split} lies in two files, {found[key]} and {uri}; keep one")
            found[key] = uri
    uris = [
        found.get((split, image)) or storage.join(root, split, f"{image}.dicom")
        for image, split in zip(ids.to_pylist(), splits.to_pylist(), strict=True)
    ]
    return pa.array(uris, pa.string()), pa.array(list(found.values()), pa.string())
