"""What sources with CSV tables share: headers checked by name, label codes, files against rows, what is left out."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq
from numpy.typing import NDArray

from mpc.errors import MissingError, UserError
from pipeline import storage
from pipeline.manifest import BLANK, NEGATIVE, POSITIVE, QUARANTINE_SCHEMA, UNCERTAIN

CODES = {
    "1.0": POSITIVE, "1": POSITIVE, "0.0": NEGATIVE, "0": NEGATIVE, "-1.0": UNCERTAIN, "-1": UNCERTAIN, "": BLANK,
}  # fmt: skip
"""How label tables of the CheXpert family write an entry."""
FRONTAL = ("", "AP", "PA", "FRONTAL")
"""Views that count as frontal; one that is not told does, since most radiographs are."""
LATERAL = ("LATERAL", "LAT", "LL", "RL", "LLD", "RLD", "XTABLE LATERAL")


class Csv(NamedTuple):
    """A table as it was read."""

    uri: str
    rows: pa.Table
    """The columns that were asked for, all of them text; an empty cell is ""."""
    digest: str
    """Hexadecimal SHA-256 of the file."""
    above: int = 1
    """Lines above the first row: the header of a CSV file, none of a Parquet file."""

    def row(self, position: int) -> int:
        """The number under which a person finds a row, from 1."""
        return position + self.above + 1


class LeftOut(NamedTuple):
    """Rows that do not enter the source table, and why."""

    mask: NDArray[np.bool_]
    """[N], true where the reason holds."""
    reason: str
    detail: str


def find(root: str, names: Sequence[str], what: str) -> str:
    """URI of the first of `names` that lies in `root`.

    Raises:
        MissingError: none does; `what` names the table in the message.
    """
    for name in names:
        uri = storage.join(root, name)
        if storage.exists(uri):
            return uri
    raise MissingError(f"{root} holds no {what}; expected {' or '.join(names)}")


def read(
    uri: str, columns: Sequence[str], optional: Sequence[str] = (), filled: Sequence[str] = (), remedy: str = ""
) -> Csv:
    """Reads `columns`, and those of `optional` that are there, by name and as text; CSV, packed (.gz) or not, Parquet.

    Args:
        uri: the file; Parquet is told by its first bytes.
        columns: names that the header must have.
        optional: names that it may have.
        filled: columns without empty cells.
        remedy: what to do about missing columns, for the message.

    Raises:
        UserError: missing columns (named, with what was found), one that is there twice, an unreadable file, a type
            that is neither text nor number, no rows, an empty cell in a column of `filled`.
    """
    content = storage.read_bytes(uri)
    parquet = content.startswith(b"PAR1")
    try:
        raw = content if parquet else _unpacked(uri, content)
        schema = pq.read_schema(pa.BufferReader(raw)) if parquet else pa.csv.open_csv(pa.BufferReader(raw)).schema
        wanted = _wanted(uri, schema.names, columns, optional, remedy)
        rows = _parquet(uri, raw, schema, wanted) if parquet else _csv(raw, wanted)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{uri} is not a readable table: {' '.join(str(error).split())[:200]}") from None
    if not len(rows):
        raise UserError(f"{uri} has a header but no rows; give the whole table")
    table = Csv(uri, rows, hashlib.sha256(content).hexdigest(), above=0 if parquet else 1)
    for name in filled:
        blank = pc.index(pc.equal(pc.utf8_trim_whitespace(rows[name]), ""), True).as_py()
        if blank >= 0:
            raise UserError(f"{uri}, row {table.row(blank)}: {name} is empty; mend the table")
    return table


def _unpacked(uri: str, content: bytes) -> bytes:
    """The bytes of a CSV file."""
    stream: pa.NativeFile = pa.BufferReader(content)
    if storage.name(uri).endswith(".gz"):
        stream = pa.CompressedInputStream(stream, "gzip")
    return bytes(stream.read())


def _wanted(
    uri: str, header: Sequence[str], columns: Sequence[str], optional: Sequence[str], remedy: str
) -> Sequence[str]:
    """The columns to read, once each.

    Raises:
        UserError: one is missing, or the header has it twice.
    """
    missing = [name for name in dict.fromkeys(columns) if name not in header]
    if missing:
        told = f"{uri} lacks the column(s) {', '.join(missing)}; its header has {', '.join(header)}"
        raise UserError(f"{told}; {remedy}" if remedy else told)
    wanted = [name for name in dict.fromkeys((*columns, *optional)) if name in header]
    twice = [name for name in wanted if header.count(name) > 1]
    if twice:
        raise UserError(f"{uri} has two columns {twice[0]!r}; rename one")
    return wanted


def _csv(raw: bytes, wanted: Sequence[str]) -> pa.Table:
    """Columns of a CSV file as they are written."""
    convert = pa.csv.ConvertOptions(include_columns=wanted, column_types=dict.fromkeys(wanted, pa.string()))
    return pa.csv.read_csv(pa.BufferReader(raw), convert_options=convert)


def _parquet(uri: str, raw: bytes, schema: pa.Schema, wanted: Sequence[str]) -> pa.Table:
    """Columns of a Parquet file as a CSV file would have them; types are looked at before a value is read."""
    for name in wanted:
        if not _plain(schema.field(name).type):
            raise UserError(
                f"{uri}: column {name} is of type {schema.field(name).type}; give text, numbers or booleans"
            )
    rows = pq.read_table(pa.BufferReader(raw), columns=list(wanted))
    return pa.table({name: _text(rows[name]) for name in wanted})


def _plain(kind: pa.DataType) -> bool:
    """Whether a type is text, number, boolean, empty, or a category of such."""
    if pa.types.is_dictionary(kind):
        return _plain(kind.value_type)
    texts = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
    numbers = (pa.types.is_integer, pa.types.is_floating, pa.types.is_boolean, pa.types.is_null)
    return any(test(kind) for test in (*texts, *numbers))


def _text(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """A column as text: 1.0 is "1", true is "true", null and NaN are ""."""
    if pa.types.is_floating(column.type):
        column = pc.if_else(pc.is_nan(column), None, column)
    return pc.fill_null(pc.cast(column, pa.string()), "")


def codes(table: Csv, findings: Sequence[str], meaning: Mapping[str, int] = CODES) -> NDArray[np.int8]:
    """Label codes [N, K] of the columns `findings`, by what each entry means in small letters.

    Raises:
        UserError: an entry that means nothing, with its row.
    """
    columns = []
    for name in findings:
        column = mapped(table.rows[name], lambda text: meaning.get(text.strip().lower()), pa.int8())
        if column.null_count:
            row = pc.index(pc.is_null(column), True).as_py()
            entry = table.rows[name][row].as_py()
            listed = "1, 0, -1 or empty" if UNCERTAIN in meaning.values() else "1, 0 or empty"
            raise UserError(f"{table.uri}, row {table.row(row)}: {name} is {entry!r}; labels are {listed}")
        columns.append(column.to_numpy())
    return np.stack(columns, axis=1)


def mapped(
    column: pa.Array | pa.ChunkedArray, function: Callable[[str], Any], kind: pa.DataType | None = None
) -> pa.Array:
    """`function` of every distinct text of a column, spread over its rows; text, unless `kind` says otherwise."""
    encoded = (column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column).dictionary_encode()
    values = pa.array([function(text) for text in encoded.dictionary.to_pylist()], kind or pa.string())
    return values.take(encoded.indices)


def once(table: Csv, what: str, values: pa.Array | pa.ChunkedArray) -> None:
    """Raises UserError that names the two rows of a table in which a value occurs that may occur once."""
    values = values.combine_chunks() if isinstance(values, pa.ChunkedArray) else values
    keys = values.dictionary_encode().indices.to_numpy()
    _, first, which = np.unique(keys, return_index=True, return_inverse=True)
    again = np.flatnonzero(first[which] < np.arange(len(keys)))
    if len(again):
        rows = f"rows {table.row(first[which][again[0]])} and {table.row(again[0])}"
        more = f" ({len(again)} rows repeat one)" if len(again) > 1 else ""
        raise UserError(f"{table.uri}, {rows}: the same {what}, {values[again[0]].as_py()!r}{more}; mend the table")


def age_band(age: str) -> str | None:
    """Twenty years of age ("40-59"); NIH's older table writes 058Y. Ages above 120 are typing errors: None."""
    digits = age.rstrip("YMD").lstrip("0") or "0"
    if not digits.isdigit() or int(digits) > 120:
        return None
    years = int(digits) if not age.endswith(("M", "D")) else 0
    return f"{years // 20 * 20}-{years // 20 * 20 + 19}"


def unwanted_views(view: pa.Array, views: Literal["frontal", "all"]) -> list[LeftOut]:
    """Of views in capitals, [N], those that are stated and not frontal; none where all views are wanted."""
    if views == "all":
        return []
    frontal, lateral = (np.asarray(pc.is_in(view, value_set=pa.array(names))) for names in (FRONTAL, LATERAL))
    why = "prepare.views=frontal keeps AP and PA alone"
    return [LeftOut(lateral, "lateral", why), LeftOut(~(frontal | lateral), "other_view", why)]


def below(root: str, paths: pa.Array | pa.ChunkedArray) -> pa.Array:
    """URIs of relative paths, as `storage.join` would make them one by one."""
    start, mark, options = root.partition("?") if storage.is_remote(root) else (root, "", "")
    if isinstance(paths, pa.ChunkedArray):
        paths = paths.combine_chunks()
    return pc.binary_join_element_wise(start.rstrip("/"), "/", paths, mark + options, "")


def files(folders: Sequence[str], suffixes: Sequence[str]) -> pa.Array:
    """URIs of all files below the folders, by one listing each; a folder that does not exist holds none."""
    found: list[str] = []
    for folder in folders:
        try:
            found += storage.list_files(folder, suffixes)
        except MissingError:
            continue
    return pa.array(found, pa.string())


def sift(
    uris: pa.Array, found: pa.Array, table: str, layout: str, left_out: Sequence[LeftOut] = ()
) -> tuple[pa.Array, pa.Table]:
    """Which rows of a table stay, and the quarantine of the others, each under the first reason that holds.

    After `left_out` come rows whose image was not found, as `missing`; last, images that no row names, as `unlisted`.

    Args:
        uris: where the image of each row lies or should lie, [N].
        found: the images that are there.
        table: name of the table, for the details.
        layout: where images are expected, for the error.
        left_out: reasons of the source's own, most important first.

    Raises:
        UserError: no row that should stay has an image.
    """
    there = np.asarray(pc.is_in(uris, value_set=found))
    absent = LeftOut(~there, "missing", f"row of {table} without an image file")
    stays = np.ones(len(uris), dtype=np.bool_)
    parts = []
    for fault in (*left_out, absent):
        parts.append(quarantine(uris.filter(pa.array(stays & fault.mask)), fault.reason, fault.detail))
        stays &= ~fault.mask
    if not stays.any():
        reasons = ", ".join(f"{part['reason'][0].as_py()} {len(part)}" for part in parts if len(part))
        raise UserError(f"no image of {table} lies under {layout}; all rows are left out ({reasons})")
    unlisted = found.filter(pc.invert(pc.is_in(found, value_set=uris)))
    parts.append(quarantine(unlisted, "unlisted", f"image file without a row in {table}"))
    return pa.array(stays), pa.concat_tables(parts)


def quarantine(sources: pa.Array, reason: str, detail: str | pa.Array) -> pa.Table:
    """Entries of a quarantine table, all for one reason."""
    size = len(sources)
    details = pa.repeat(detail, size) if isinstance(detail, str) else detail
    return pa.table([sources, pa.repeat(reason, size), details], schema=QUARANTINE_SCHEMA)
