"""predictions.parquet: one row an image with what the model says and what is known; and the groups beside it."""

import io
import json
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.parquet as pq
from numpy.typing import NDArray
from scipy.special import expit

from mpc.errors import UserError
from pipeline import storage
from pipeline.card import DatasetCard
from pipeline.manifest import list_column, matrix
from pipeline.plain_types import refuse_extension_types
from pipeline.scoring import Scored

PREDICTIONS_FILE, GROUPS_FILE = "predictions.parquet", "groups.parquet"
UNKNOWN = "unknown"
Origin = dict[str, Any]
"""What was scored with what: `split`, `data_digest`, and `checkpoint`; equal origins have equal predictions."""


@dataclass(frozen=True)
class Predictions:
    """Rows in the order of the split."""

    findings: tuple[str, ...]
    image_id: list[str]
    patient_id: list[str]
    logits: NDArray[np.float32]
    """[N, K]."""
    labels: NDArray[np.int8]
    """[N, K] in {0, 1}, read where `known`."""
    known: NDArray[np.bool_]
    origin: Origin
    observed: NDArray[np.int8] | None = None
    """[N, K]: what training saw of the labels, where the images are some of its own."""
    row: NDArray[np.int64] | None = None
    """[N]: which rows these are, where they are not a whole split."""

    @cached_property
    def probabilities(self) -> NDArray[np.float64]:
        """[N, K] in (0, 1)."""
        return np.asarray(expit(self.logits.astype(np.float64)))

    @property
    def judged(self) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any], tuple[str, ...]]:
        """Probabilities, labels, known and findings: what `mpc.metrics.score` takes."""
        return self.probabilities, self.labels, self.known, self.findings

    @classmethod
    def of(
        cls, scored: Scored, findings: tuple[str, ...], origin: Origin, observed: NDArray[np.int8] | None = None
    ) -> "Predictions":
        """What `pipeline.scoring` gathered of a split, or of some training images with what training observed."""
        ids = (scored.image_id.tolist(), scored.patient_id.tolist())
        row = None if observed is None else scored.row
        return cls(findings, *ids, scored.logits, scored.labels, scored.known, origin, observed, row)

    def table(self) -> pa.Table:
        """One row an image: ids, and lists of K logits, probabilities (float32), labels, known, in findings order."""
        columns: dict[str, Any] = {
            "image_id": pa.array(self.image_id, pa.string()),
            "patient_id": pa.array(self.patient_id, pa.string()),
            "logits": list_column(self.logits),
            "probabilities": list_column(self.probabilities.astype(np.float32)),
            "labels": list_column(self.labels),
            "known": list_column(self.known),
        }
        if self.observed is not None:
            columns |= {"observed": list_column(self.observed), "row": self.row}
        about = {"findings": json.dumps(self.findings), "origin": json.dumps(self.origin, sort_keys=True)}
        return pa.table(columns).replace_schema_metadata(about)

    def write(self, uri: str) -> None:
        """Writes the table."""
        write_table(self.table(), uri)

    @classmethod
    def read(cls, uri: str) -> "Predictions":
        """What `write` wrote.

        Raises:
            MissingError: no such file.
            UserError: no predictions of ours.
        """
        table = read_table(uri)
        missing = sorted({"image_id", "patient_id", "logits", "labels", "known"} - set(table.column_names))
        if missing:
            raise UserError(f"{uri} has no column {missing[0]}; evaluate again")
        about = table.schema.metadata or {}
        return cls(
            tuple(json.loads(about.get(b"findings", b"[]"))),
            table["image_id"].to_pylist(),
            table["patient_id"].to_pylist(),
            matrix(table["logits"]),
            matrix(table["labels"]),
            matrix(table["known"]).astype(bool),
            json.loads(about.get(b"origin", b"{}")),
            matrix(table["observed"]) if "observed" in table.column_names else None,
            table["row"].to_numpy() if "row" in table.column_names else None,
        )


def groups_of(uri: str, card: DatasetCard, split: str) -> pa.Table:
    """`image_id`, `view` and the strata that the data set carries, of every row of a split; pixels are not read."""
    filesystem, root = storage.resolve(uri)
    paths = [f"{root}/{shard.path}" for shard in card.shards_of(split)]
    dataset = pads.dataset(paths, filesystem=filesystem, format="parquet")
    refuse_extension_types(dataset.schema, uri)
    return dataset.to_table(columns=["row", "image_id", "view", *card.strata]).sort_by("row").drop_columns(["row"])


def values_of(groups: pa.Table) -> dict[str, NDArray[np.str_]]:
    """Each column of groups as texts [N]; what is not told is `unknown`."""
    names = [name for name in groups.column_names if name != "image_id"]
    return {name: np.array([value or UNKNOWN for value in groups[name].to_pylist()]) for name in names}


def write_table(table: pa.Table, uri: str) -> None:
    """A Parquet file, whole or absent."""
    with storage.open_output(uri) as stream:
        pq.write_table(table, stream, compression="zstd")


def read_table(uri: str) -> pa.Table:
    """A Parquet file of plain types.

    Raises:
        MissingError: no such file.
        UserError: not Parquet, or columns of other types.
    """
    content = storage.read_bytes(uri)
    try:
        file = pq.ParquetFile(io.BytesIO(content))
    except pa.ArrowInvalid:
        raise UserError(f"{uri} is not a Parquet file; evaluate again") from None
    refuse_extension_types(file.schema_arrow, uri)
    return file.read()
