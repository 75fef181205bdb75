"""NIH ChestX-ray14: its table, its image folders and its official lists (Wang et al., CVPR 2017)."""

import hashlib

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
from numpy.typing import NDArray

from mpc.errors import MissingError, UserError
from pipeline import storage
from pipeline.manifest import QUARANTINE_SCHEMA, SourceTable, source_table
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
    table_name, content = _read_table(root)
    table = _parse(content, storage.join(root, table_name))
    images = _images(root)
    names = table["Image Index"].to_pylist()
    splits, digests = _official(root, names)
    digests[table_name] = hashlib.sha256(content).hexdigest()
    present = np.array([name in images for name in names], dtype=np.bool_)
    if not present.any():
        raise UserError(f"no image of {table_name} lies under {root}; expected images/*.png or images_*/images/*.png")
    labels = _labels(table["Finding Labels"], storage.join(root, table_name))
    missing = [name for name in names if name not in images]
    return SourceTable(
        table=source_table(_columns(table.filter(pa.array(present)), images, splits), labels[present]),
        findings=(*FINDINGS, NO_FINDING),
        name="nih",
        synthetic=False,
        digests=dict(sorted(digests.items())),
        quarantine=_faults(root, table_name, missing, set(images) - set(names), images),
        default_findings=FINDINGS,
    )


def _columns(rows: pa.Table, images: dict[str, str], splits: dict[str, str]) -> dict[str, list[str | None]]:
    """Text columns of the source table for the rows that have an image."""
    names = rows["Image Index"].to_pylist()
    ids: list[str | None] = [name.removesuffix(".png") for name in names]
    columns = {
        "image_id": ids,
        "patient_id": rows["Patient ID"].to_pylist(),
        "study_id": ids,  # the collection numbers images, not studies
        "view": rows["View Position"].to_pylist(),
        "uri": [images[name] for name in names],
        "split": [splits.get(name) for name in names],
    }
    if "Patient Gender" in rows.column_names:
        columns["sex"] = rows["Patient Gender"].to_pylist()
    if "Patient Age" in rows.column_names:
        columns["age_band"] = [_age_band(age) for age in rows["Patient Age"].to_pylist()]
    return columns


def _read_table(root: str) -> tuple[str, bytes]:
    """Name and bytes of the collection's table."""
    for name in TABLES:
        uri = storage.join(root, name)
        if storage.exists(uri):
            return name, storage.read_bytes(uri)
    raise MissingError(f"{root} holds no NIH table; expected {' or '.join(TABLES)}")


def _parse(content: bytes, uri: str) -> pa.Table:
    """The needed columns as text, by name.

    Raises:
        UserError: missing columns (named, with what was found), an unreadable file, no rows, an empty cell.
    """
    stream: pa.NativeFile = pa.BufferReader(content)
    if uri.endswith(".gz"):
        stream = pa.CompressedInputStream(stream, "gzip")
    try:
        raw = stream.read()
        header = pa.csv.open_csv(pa.BufferReader(raw)).schema.names
        missing = [name for name in COLUMNS if name not in header]
        if missing:
            raise UserError(f"{uri} lacks the column(s) {', '.join(missing)}; its header has {', '.join(header)}")
        wanted = [name for name in (*COLUMNS, *OPTIONAL) if name in header]
        convert = pa.csv.ConvertOptions(include_columns=wanted, column_types=dict.fromkeys(wanted, pa.string()))
        table = pa.csv.read_csv(pa.BufferReader(raw), convert_options=convert)
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{uri} is not a readable table: {' '.join(str(error).split())[:200]}") from None
    if not len(table):
        raise UserError(f"{uri} has a header but no rows; give the whole table")
    for name in COLUMNS[:3]:
        blank = pc.index(pc.equal(pc.utf8_trim_whitespace(table[name]), ""), True).as_py()
        if blank >= 0:
            raise UserError(f"{uri}, row {blank + 2}: {name} is empty; mend the table")
    return table


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


def _official(root: str, names: list[str]) -> tuple[dict[str, str], dict[str, str]]:
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


def _faults(root: str, table_name: str, missing: list[str], unlisted: set[str], images: dict[str, str]) -> pa.Table:
    """What never becomes a row, in the order of the table and then by name."""
    where = f"row of {table_name} without an image file"
    rows = [{"source": storage.join(root, "images", name), "reason": "missing", "detail": where} for name in missing]
    extra = f"image file without a row in {table_name}"
    rows += [{"source": images[name], "reason": "unlisted", "detail": extra} for name in sorted(unlisted)]
    return pa.Table.from_pylist(rows, schema=QUARANTINE_SCHEMA)


def _age_band(age: str) -> str | None:
    """Twenty years of age ("40-59"); the older table writes 058Y. Ages above 120 are typing errors: None."""
    digits = age.rstrip("YMD").lstrip("0") or "0"
    if not digits.isdigit() or int(digits) > 120:
        return None
    years = int(digits) if not age.endswith(("M", "D")) else 0
    return f"{years // 20 * 20}-{years // 20 * 20 + 19}"
