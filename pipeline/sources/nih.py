"""NIH ChestX-ray14: its table, its image folders and its official lists (Wang et al., CVPR 2017)."""

import hashlib

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from mpc.errors import UserError
from pipeline import storage
from pipeline.manifest import Column, SourceTable, source_table
from pipeline.sources import tables
from pipeline.sources.phantom.labels import FINDINGS

NO_FINDING = "No Finding"
TABLES = ("Data_Entry_2017_v2020.csv", "Data_Entry_2017.csv", "Data_Entry_2017_v2020.csv.gz")
COLUMNS = ("Image Index", "Finding Labels", "Patient ID", "View Position")
OPTIONAL = ("Patient Age", "Patient Gender")
LISTS = {"train_val_list.txt": "train", "test_list.txt": "test"}


def source(root: str) -> SourceTable:
    """Reads the collection at `root`: a table of `TABLES`, `images/*.png` or `images_001/images/*.png` and so on.

    All images are found by one listing. A row without image is quarantined as `missing`, an image without row as
    `unlisted`. Where both lists are there, `split` holds train or test. Of the 15 findings, "No Finding" is kept only
    where the configuration names it.

    Raises:
        UserError: no table, a header without its columns, an unknown finding, an image twice, a row in no list.
    """
    table = tables.read(tables.find(root, TABLES, "NIH table"), COLUMNS, OPTIONAL, filled=COLUMNS[:3])
    name = storage.name(table.uri)
    images = _images(root)
    splits, digests = _official(root)
    listed = table.rows["Image Index"].to_pylist()
    uris = pa.array([images.get(image) or storage.join(root, "images", image) for image in listed], pa.string())
    found = pa.array(list(images.values()), pa.string())
    layout = f"{root}: expected images/*.png or images_*/images/*.png"
    labels = _labels(table.rows["Finding Labels"], table.uri)
    stays, quarantine = tables.sift(uris, found, name, layout)
    columns = _columns(table.rows.filter(stays), uris.filter(stays), splits)
    return SourceTable(
        table=source_table(columns, labels[np.asarray(stays)]),
        findings=(*FINDINGS, NO_FINDING),
        name="nih",
        synthetic=False,
        digests=dict(sorted({**digests, name: table.digest}.items())),
        quarantine=quarantine,
        default_findings=FINDINGS,
    )


def _columns(rows: pa.Table, uris: pa.Array, splits: dict[str, str]) -> dict[str, Column]:
    """Text columns of the source table for the rows that have an image."""
    names = rows["Image Index"].to_pylist()
    ids = [name.removesuffix(".png") for name in names]
    columns: dict[str, Column] = {
        "image_id": ids,
        "patient_id": rows["Patient ID"],
        "study_id": ids,  # the collection numbers images, not studies
        "view": rows["View Position"],
        "uri": uris,
        "split": [splits.get(name) for name in names],
    }
    if "Patient Gender" in rows.column_names:
        columns["sex"] = rows["Patient Gender"]
    if "Patient Age" in rows.column_names:
        columns["age_band"] = tables.mapped(rows["Patient Age"], tables.age_band)
    return columns


def _images(root: str) -> dict[str, str]:
    """File name -> URI of every PNG in a folder named `images`, by one listing."""
    found: dict[str, str] = {}
    for uri in storage.list_files(root, (".png",)):
        folder, _, name = uri.partition("?")[0].rpartition("/")
        if not folder.endswith("/images"):
            continue
        if name in found:
            raise UserError(f"image {name} lies in two folders, {found[name]} and {uri}; keep one")
        found[name] = uri
    return found


def _labels(column: pa.ChunkedArray, uri: str) -> NDArray[np.int8]:
    """[N, 15] in {0, 1} from `A|B|C`; every distinct combination is parsed once."""
    encoded = column.combine_chunks().dictionary_encode()
    order = {name: position for position, name in enumerate((*FINDINGS, NO_FINDING))}
    rows = np.zeros((len(encoded.dictionary), len(order)), dtype=np.int8)
    for position, combination in enumerate(encoded.dictionary.to_pylist()):
        names = combination.split("|")
        unknown = [name for name in names if name not in order]
        if unknown or (NO_FINDING in names and len(names) > 1):
            line = pc.index(encoded.indices, position).as_py() + 2
            what = f"unknown finding {unknown[0]!r}" if unknown else f"{NO_FINDING!r} beside a finding"
            raise UserError(f"{uri}, row {line}: {what} in {combination!r}; the names are {', '.join(order)}")
        rows[position, [order[name] for name in names]] = 1
    return np.asarray(rows[encoded.indices.to_numpy()], dtype=np.int8)


def _official(root: str) -> tuple[dict[str, str], dict[str, str]]:
    """Image name -> official split, and the digests of the lists; both empty where there are none."""
    present = {file: storage.exists(storage.join(root, file)) for file in LISTS}
    if not any(present.values()):
        return {}, {}
    if not all(present.values()):
        absent = next(file for file, there in present.items() if not there)
        raise UserError(f"{root} holds only one of {' and '.join(LISTS)}; add {absent} or move the other one away")
    splits: dict[str, str] = {}
    digests: dict[str, str] = {}
    for file, split in LISTS.items():
        content = storage.read_bytes(storage.join(root, file))
        digests[file] = hashlib.sha256(content).hexdigest()
        listed = content.decode("utf-8", errors="replace").split()
        both = next((name for name in listed if splits.get(name, split) != split), None)
        if both:
            raise UserError(f"{both} is in both {' and '.join(LISTS)} of {root}; mend the lists")
        splits.update(dict.fromkeys(listed, split))
    return splits, digests
