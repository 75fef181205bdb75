"""One row an image: what every source yields, what policy and split make of it, and the checks on it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from mpc.errors import UserError

SPLITS = ("train", "val", "test")
UNLABELLED = "unlabelled"
"""Split of training images without a known positive: kept and counted, never trained on."""
POSITIVE, NEGATIVE, UNCERTAIN, BLANK = 1, 0, -1, -2
"""Label codes of a source table; past the policy only 1 and 0 remain, with a mask."""
STRATA = ("sex", "age_band", "collection")
"""Optional: patient fields, and the root of an image; they reach the shards only where the configuration asks."""
TEXT_COLUMNS = ("image_id", "patient_id", "study_id", "view", "uri")
Column: TypeAlias = Sequence[str | None] | pa.Array | pa.ChunkedArray
"""Texts of a column: a sequence, or what Arrow already holds."""
LEFT_OUT = frozenset(
    {"duplicate", "lateral", "other_view", "other_modality", "no_labels", "official_valid", "official_test"}
)
"""Quarantine reasons of entries that are not wanted, rather than not usable: `prepare.max_bad` does not count them."""
QUARANTINE_SCHEMA = pa.schema([("source", pa.string()), ("reason", pa.string()), ("detail", pa.string())])


@dataclass(frozen=True)
class SourceTable:
    """A collection as its source reads it, before policy and split.

    `table` holds the columns of `source_schema`: `labels` in {1, 0, -1 uncertain, -2 blank}, `split` null or official.
    """

    table: pa.Table
    findings: tuple[str, ...]
    """Names of the label columns, in their order."""
    name: str
    synthetic: bool
    digests: dict[str, str] = field(default_factory=dict)
    """What the labels came from: file name or parameter -> sha256 in hexadecimal or value."""
    quarantine: pa.Table = field(default_factory=QUARANTINE_SCHEMA.empty_table)
    """Entries that never became rows: `source`, `reason`, `detail` (a table row without image, say)."""
    default_findings: tuple[str, ...] = ()
    """What is kept where the configuration names no findings; empty means all."""

    def with_table(self, table: pa.Table) -> "SourceTable":
        """The same source with another table."""
        return replace(self, table=table)


def source_schema(num_findings: int, strata: Sequence[str] = ()) -> pa.Schema:
    """Columns of a source table: int8 label codes, a nullable split, no mask yet."""
    fields = [pa.field(name, pa.string(), nullable=False) for name in TEXT_COLUMNS]
    fields += [pa.field("split", pa.string()), pa.field("labels", pa.list_(pa.int8(), num_findings), nullable=False)]
    return pa.schema(fields + [pa.field(name, pa.string()) for name in strata])


def schema(num_findings: int, strata: Sequence[str] = ()) -> pa.Schema:
    """Columns of a manifest: `labels` in {0, 1} and the mask `known`, both lists of `num_findings`."""
    fields = [pa.field(name, pa.string(), nullable=False) for name in (*TEXT_COLUMNS, "split")]
    fields += [
        pa.field("labels", pa.list_(pa.int8(), num_findings), nullable=False),
        pa.field("known", pa.list_(pa.bool_(), num_findings), nullable=False),
    ]
    return pa.schema(fields + [pa.field(name, pa.string()) for name in strata])


def matrix(column: pa.Array | pa.ChunkedArray) -> NDArray[Any]:
    """A fixed-size list column as an array [N, K]; int8 and bool keep their type."""
    width = column.type.list_size
    flat = pc.list_flatten(column)
    return np.asarray(flat.to_numpy(zero_copy_only=False), dtype=column.type.value_type.to_pandas_dtype()).reshape(
        len(column), width
    )


def list_column(values: NDArray[Any]) -> pa.FixedSizeListArray:
    """An array [N, K] of int8 or bool as a fixed-size list column."""
    flat = pa.array(np.ascontiguousarray(values).reshape(-1))
    return pa.FixedSizeListArray.from_arrays(flat, values.shape[1])


def source_table(columns: Mapping[str, Column], labels: NDArray[np.int8]) -> pa.Table:
    """Builds a source table from text columns (those of `source_schema`, strata optional) and labels [N, K].

    `study_id` and `view` may be left out or hold None (stored as ""), `split` may be left out (stored as null).
    """
    rows = len(labels)
    strata = [name for name in STRATA if name in columns]
    built: list[pa.Array | pa.ChunkedArray] = []
    for name in TEXT_COLUMNS:
        values = _texts(columns[name] if name in columns else [""] * rows)
        built.append(pc.fill_null(values, "") if name in ("study_id", "view") else values)
    built.append(_texts(columns["split"]) if "split" in columns else pa.nulls(rows, pa.string()))
    built.append(list_column(np.asarray(labels, dtype=np.int8)))
    built += [_texts(columns[name]) for name in strata]
    return pa.table(built, schema=source_schema(labels.shape[1], strata))


def _texts(column: Column) -> pa.Array | pa.ChunkedArray:
    """The column as Arrow strings."""
    return column if isinstance(column, pa.Array | pa.ChunkedArray) else pa.array(column, pa.string())


def keep_findings(source: SourceTable, findings: Sequence[str] | None) -> SourceTable:
    """The source with the named findings only, in that order; None keeps all.

    Raises:
        UserError: a finding that the source does not have, or one named twice.
    """
    if findings is None:
        return source
    unknown = [name for name in findings if name not in source.findings]
    if unknown or not findings:
        raise UserError(
            f"prepare.findings names {unknown or 'nothing'}, which {source.name} does not have; "
            f"choose from {', '.join(source.findings)}"
        )
    if len(set(findings)) != len(findings):
        raise UserError(f"prepare.findings names a finding twice: {', '.join(findings)}; name each once")
    order = [source.findings.index(name) for name in findings]
    labels = list_column(matrix(source.table["labels"])[:, order])
    position = source.table.schema.get_field_index("labels")
    wanted = pa.field("labels", labels.type, nullable=False)
    return replace(source, table=source.table.set_column(position, wanted, labels), findings=tuple(findings))


def check(table: pa.Table, findings: Sequence[str]) -> None:
    """Verifies a manifest: columns, unique ids, label and mask values, one split a patient.

    Raises:
        UserError: the first fault, with the value that shows it.
    """
    strata = [name for name in STRATA if name in table.column_names]
    wanted = schema(len(findings), strata)
    if not table.schema.equals(wanted):
        raise UserError(
            f"manifest columns are {table.schema.names}, expected {wanted.names} with {len(findings)} labels"
        )
    for name in (*TEXT_COLUMNS[:2], "uri", "split"):
        if table[name].null_count or pc.any(pc.equal(table[name], "")).as_py():
            raise UserError(f"manifest has rows without {name}; every image needs one")
    check_unique(table["image_id"])
    labels, known = matrix(table["labels"]), matrix(table["known"])
    if not np.isin(labels, (0, 1)).all():
        raise UserError(
            f"manifest labels hold {sorted(set(np.unique(labels).tolist()) - {0, 1})}; apply the label policy first"
        )
    if (labels.astype(bool) & ~known.astype(bool)).any():
        raise UserError("manifest has positive labels that are not known; unknown entries carry label 0")
    foreign = sorted(set(pc.unique(table["split"]).to_pylist()) - {*SPLITS, UNLABELLED})
    if foreign:
        raise UserError(f"manifest has split {foreign[0]!r}; splits are {', '.join(SPLITS)}")
    check_patients(table)


def check_unique(image_ids: pa.ChunkedArray) -> None:
    """Raises UserError that names the first image id which occurs twice."""
    counts = pc.value_counts(image_ids.combine_chunks())
    doubled = pc.filter(counts.field("values"), pc.greater(counts.field("counts"), 1))
    if len(doubled):
        raise UserError(
            f"image id {doubled[0].as_py()!r} occurs twice or more ({len(doubled)} such ids); mend the table"
        )


def check_patients(table: pa.Table) -> None:
    """Raises UserError that names a patient whose images lie in two splits (`unlabelled` belongs to `train`)."""
    leaked = leaked_patients(table["patient_id"], table["split"])
    if leaked:
        patient, splits = next(iter(sorted(leaked.items())))
        raise UserError(
            f"patient {patient!r} has images in {' and '.join(splits)} ({len(leaked)} such patients); "
            f"a patient belongs to one split: use split.by=hash or mend the lists"
        )


def leaked_patients(patients: pa.ChunkedArray, splits: pa.ChunkedArray) -> dict[str, list[str]]:
    """Patient id -> the splits it appears in, for patients in more than one; `unlabelled` counts as `train`."""
    effective = pc.if_else(pc.equal(splits, UNLABELLED), "train", splits)
    pairs = pa.table({"patient": patients, "split": effective}).group_by(["patient", "split"]).aggregate([])
    per_patient = pairs.group_by("patient").aggregate([("split", "count")])
    several = per_patient.filter(pc.greater(per_patient["split_count"], 1))["patient"]
    found = pairs.filter(pc.is_in(pairs["patient"], value_set=several.combine_chunks()))
    leaked: dict[str, list[str]] = {}
    for patient, split in zip(found["patient"].to_pylist(), found["split"].to_pylist(), strict=True):
        leaked.setdefault(patient, []).append(split)
    return {patient: sorted(names) for patient, names in leaked.items()}
