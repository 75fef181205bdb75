"""The label table that a user describes in `prepare.table`: labels in columns or in a list, a split, strata."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from mpc.errors import UserError
from pipeline import storage
from pipeline.manifest import BLANK, NEGATIVE, POSITIVE
from pipeline.prepare_config import TableConfig
from pipeline.sources import tables
from pipeline.sources.tables import CODES, Csv

ENTRIES = {**CODES, "true": POSITIVE, "false": NEGATIVE}
SPLITS = {"train": "train", "val": "val", "valid": "val", "validate": "val", "test": "test"}
SEX = {"m": "M", "male": "M", "f": "F", "female": "F", "o": "O", "other": "O"}
MOST_FINDINGS = 512
"""A list with more distinct names is a wrong column or a wrong delimiter: reports, say, which must not get further."""


class Labelled(NamedTuple):
    """A label table, read."""

    table: Csv
    """Cells without blanks around them."""
    findings: tuple[str, ...]
    codes: NDArray[np.int8]
    """Label codes [N, K]."""
    about: dict[str, pa.Array]
    """`split`, `sex` and `age_band` of each row, those whose columns the user names."""


def read(
    root: str,
    config: TableConfig,
    wanted: Sequence[str] | None,
    filled: Sequence[str],
    others: Sequence[str | None] = (),
) -> Labelled:
    """Reads all columns that the configuration names, and makes labels of them.

    Args:
        root: the folder below which a relative `config.file` lies.
        config: names of the columns.
        wanted: `prepare.findings`, which name the label columns where the configuration does not.
        filled: columns in which every row must have something.
        others: further columns to read; None stands for one that the configuration does not name.

    Raises:
        UserError: no file or no labels named, missing columns, an empty id, a label or split that is none.
    """
    if config.file is None:
        raise UserError("prepare.table.file names no table; set it to a CSV or Parquet file below --root, or a URI")
    labels = _label_columns(config, wanted)
    names = (*filled, *(name for name in (*others, config.split, config.sex, config.age) if name), *labels.values())
    uri = place(root, config.file)
    remedy = "name the columns of your table in prepare.table"
    table = tables.read(uri, list(dict.fromkeys(names)), filled=filled, remedy=remedy)
    rows = pa.table({name: pc.utf8_trim_whitespace(table.rows[name]) for name in table.rows.column_names})
    table = table._replace(rows=rows)
    findings, codes = _listed(table, config) if config.labels is not None else _columns(table, labels)
    return Labelled(table, findings, codes, _about(table, config))


def place(root: str, path: str) -> str:
    """Where a path below `root`, an absolute path, or a URI leads."""
    return storage.absolute(path) if is_absolute(path) else storage.join(root, path)


def is_absolute(path: str) -> bool:
    """Whether a path does not depend on --root."""
    return "://" in path or path.startswith(("/", "~"))


def sex(text: str) -> str | None:
    """M, F or O; whatever else a cell holds stays out of the shards."""
    return SEX.get(text.lower())


def age_band(text: str) -> str | None:
    """Twenty years of age, from "63", "63.0" or "063Y"; None where it is not told."""
    return tables.age_band(text.partition(".")[0]) if text else None


def _label_columns(config: TableConfig, wanted: Sequence[str] | None) -> dict[str, str]:
    """Finding -> column; of a list, its one column."""
    if config.labels is not None:
        return {"": config.labels}
    if config.label_columns is not None:
        return config.label_columns
    if not wanted:
        raise UserError(
            "no labels are named; set prepare.table.label_columns (FINDING: COLUMN), prepare.table.labels (a column "
            "with a list), or prepare.findings where columns have the findings' names"
        )
    return {name: name for name in wanted}


def _columns(table: Csv, labels: dict[str, str]) -> tuple[tuple[str, ...], NDArray[np.int8]]:
    """Findings and codes of one column each."""
    return tuple(labels), tables.codes(table, list(labels.values()), ENTRIES)


def _listed(table: Csv, config: TableConfig) -> tuple[tuple[str, ...], NDArray[np.int8]]:
    """Findings and codes of a column of lists; every distinct list is parsed once."""
    assert config.labels is not None
    encoded = table.rows[config.labels].combine_chunks().dictionary_encode()
    lists = [
        {name for part in text.split(config.delimiter) if (name := part.strip())}
        for text in encoded.dictionary.to_pylist()
    ]
    findings = tuple(sorted(set().union(*lists)))
    if not 0 < len(findings) <= MOST_FINDINGS:
        raise UserError(
            f"{table.uri}: column {config.labels} lists {len(findings)} different findings, not 1 to {MOST_FINDINGS}; "
            f"check prepare.table.labels and prepare.table.delimiter, which is {config.delimiter!r}"
        )
    order = {name: position for position, name in enumerate(findings)}
    codes = np.full((len(lists), len(findings)), BLANK, dtype=np.int8)
    for position, names in enumerate(lists):
        codes[position, [order[name] for name in names]] = POSITIVE
    return findings, codes[encoded.indices.to_numpy()]


def _about(table: Csv, config: TableConfig) -> dict[str, pa.Array]:
    """The columns that a source table may have or not."""
    about = {}
    if config.split is not None:
        about["split"] = _splits(table, config.split)
    if config.sex is not None:
        about["sex"] = tables.mapped(table.rows[config.sex], sex)
    if config.age is not None:
        about["age_band"] = tables.mapped(table.rows[config.age], age_band)
    return about


def _splits(table: Csv, name: str) -> pa.Array:
    """The split of every row.

    Raises:
        UserError: a value that is none, with its row.
    """
    splits = tables.mapped(table.rows[name], lambda text: SPLITS.get(text.lower()))
    if splits.null_count:
        row = pc.index(pc.is_null(splits), True).as_py()
        value = table.rows[name][row].as_py()
        raise UserError(f"{table.uri}, row {table.row(row)}: {name} is {value!r}; the splits are {', '.join(SPLITS)}")
    return splits
