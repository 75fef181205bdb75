"""Which images a person means: a file, a folder, a glob, a bucket's prefix, or a table of URIs."""

import fnmatch
import io
from pathlib import PurePosixPath

import pyarrow as pa
import pyarrow.csv as pcsv
import pyarrow.parquet as pq

from mpc.errors import MissingError, UserError
from pipeline import storage
from pipeline.plain_types import refuse_extension_types

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".dcm", ".dicom"})
TABLES = (".csv", ".parquet")
COLUMNS = ("uri", "path", "source")
WILDCARDS = "*[?"


def find_images(images: str) -> list[str]:
    """URIs of the images that `images` means, sorted.

    Of a folder: all files below it with a suffix of PNG, JPEG or DICOM, without a suffix, or with digits for one, as
    DICOM archives name them. Of a glob (`*`, `?`, `[...]`; on s3:// without `?`): what matches. Of a .csv or .parquet
    table: its column `uri` or `path`, relative to the table's folder. Anything else is one file.

    Raises:
        UserError: nothing there, no image among it, or a table without such a column.
    """
    path, _, _ = images.partition("?") if storage.is_remote(images) else (images, "", "")
    if path.startswith("phantom://"):
        return [images]
    if any(sign in path for sign in WILDCARDS):
        found = _matching(images, path)
    elif path.lower().endswith(TABLES):
        found = _listed(images)
    elif storage.size(images) is not None:
        found = [images]
    elif storage.exists(images):
        found = [uri for uri in storage.list_files(images) if _is_image(storage.name(uri))]
    else:
        raise MissingError(f"--images {images} does not exist; give a folder, a file, a glob or a table")
    if not found:
        raise UserError(f"--images {images}: no PNG, JPEG or DICOM file there; check the folder or the pattern")
    return sorted(found)


def _is_image(name: str) -> bool:
    """Whether a file's name may be that of an image."""
    suffix = PurePosixPath(name).suffix.lower()
    hidden = name.startswith(".") or name.upper() == "DICOMDIR"
    return not hidden and (suffix in SUFFIXES or not suffix or suffix[1:].isdigit())


def _matching(images: str, path: str) -> list[str]:
    """Files below the fixed part of a pattern that match all of it."""
    parts = path.split("/")
    fixed = next(i for i, part in enumerate(parts) if any(sign in part for sign in WILDCARDS))
    folder = "/".join(parts[:fixed]) or ("/" if path.startswith("/") else ".")
    pattern = path if storage.is_remote(images) else storage.absolute(path)
    folder += images[len(path) :]
    if not storage.exists(folder):
        raise MissingError(f"--images {images}: {folder} does not exist; check the pattern")
    return [uri for uri in storage.list_files(folder) if fnmatch.fnmatchcase(plain(uri), pattern)]


def _listed(images: str) -> list[str]:
    """The URIs in a table, resolved against its folder."""
    content = storage.read_bytes(images)
    try:
        if content[:4] == b"PAR1":
            refuse_extension_types(pq.read_schema(io.BytesIO(content)), f"--images {images}")
            table = pq.read_table(io.BytesIO(content))
        else:
            table = pcsv.read_csv(io.BytesIO(content))
    except pa.ArrowInvalid as error:
        raise UserError(f"--images {images}: not a readable table ({str(error).splitlines()[0][:120]})") from None
    column = next((name for name in COLUMNS if name in table.column_names), None)
    if column is None:
        raise UserError(f"--images {images}: no column {' or '.join(COLUMNS)}; it has {', '.join(table.column_names)}")
    values = table[column].to_pylist()
    if None in values or not all(isinstance(value, str) for value in values):
        row = next(i for i, value in enumerate(values) if not isinstance(value, str))
        raise UserError(f"--images {images}: row {row + 1} of column {column} is no text; remove or mend it")
    return [_against(images, value) for value in values]


def _against(table: str, value: str) -> str:
    """`value` as it stands if absolute, else relative to the table's folder."""
    if "://" in value or value.startswith(("/", "~")):
        return value
    path, mark, options = table.partition("?") if storage.is_remote(table) else (table, "", "")
    return storage.join(str(path.rpartition("/")[0] or ".") + mark + options, value)


def plain(uri: str) -> str:
    """A URI for people and patterns: without the options of s3://."""
    return uri.partition("?")[0] if storage.is_remote(uri) else uri
