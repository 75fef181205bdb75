"""The dataset card: what lies in a prepared data set, so that a reader knows it without opening a shard."""

import hashlib
import json
from collections.abc import Sequence
from typing import Literal

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import ValidationError

from mpc.config import Config, PixelSpec
from mpc.errors import MissingError, UserError
from pipeline import storage
from pipeline.manifest import matrix
from pipeline.prepare_config import PolicyConfig, SplitConfig

CARD_FILE = "dataset.json"
QUARANTINE_FILE = "quarantine.parquet"
NEAR_FILE = "near_duplicates.parquet"
SplitName = Literal["train", "val", "test", "unlabelled"]
SPLIT_ORDER: tuple[SplitName, ...] = ("train", "val", "test", "unlabelled")
"""Order of the splits by `row`."""
SHARD_FOLDER = "shards"


class Shard(Config):
    """One Parquet file of a data set."""

    path: str
    """Relative to the data set, with `/`."""
    split: SplitName
    rows: int
    row_start: int
    """Value of the `row` column in the first row; the others follow densely."""
    row_groups: tuple[int, ...]
    """Rows of each row group, in order."""
    bytes: int
    sha256: str


class SplitCounts(Config):
    """What one split holds."""

    images: int
    patients: int
    positives: dict[str, int]
    """Finding -> images with a known positive."""
    known: dict[str, int]
    """Finding -> images whose label is known, positive or negative."""


class RawCounts(Config):
    """How often one finding's raw codes occur in the source, before the policy."""

    positive: int
    negative: int
    uncertain: int
    blank: int


class DatasetCard(Config):
    """`dataset.json`: written last, so that its presence means the data set is whole."""

    schema_version: Literal[1] = 1
    name: str
    synthetic: bool
    findings: tuple[str, ...]
    image_size: int
    """Side in pixels; the `image` column holds image_size * image_size bytes."""
    fit: Literal["crop", "pad"]
    reduce_to: int | None = None
    """Longest side in pixels to which larger images were reduced before they were resized."""
    encoding: Literal["raw"] = "raw"
    policy: PolicyConfig
    split: SplitConfig
    strata: tuple[str, ...] = ()
    """Optional patient columns that the shards carry."""
    counts: dict[SplitName, SplitCounts]
    raw_labels: dict[str, RawCounts]
    quarantined: dict[str, int]
    """Reason -> entries of quarantine.parquet."""
    near_duplicates: int | None = None
    """Images of val and test that nearly equal one of another split: the entries of near_duplicates.parquet. None where
    an earlier version of the software did not look."""
    sources: dict[str, str]
    """Digests of what the labels came from."""
    versions: dict[str, str]
    """Software that decoded and wrote."""
    plan: str
    """Digest of configuration and source table: a resumed preparation must have the same."""
    shards: tuple[Shard, ...]
    digest: str
    """Hexadecimal SHA-256 over findings and shards: the identity of the data set."""

    @property
    def pixels(self) -> PixelSpec:
        """Pixel specification that a checkpoint trained on this data carries."""
        return PixelSpec(encoding=self.encoding, fit=self.fit, reduce_to=self.reduce_to)

    def shards_of(self, split: str) -> tuple[Shard, ...]:
        """The shards of one split in row order.

        Raises:
            UserError: the data set has no such split.
        """
        found = tuple(shard for shard in self.shards if shard.split == split)
        if not found:
            have = ", ".join(dict.fromkeys(shard.split for shard in self.shards))
            raise UserError(f"the data set {self.name!r} has no split {split!r}; it has {have}")
        return found

    def rows(self, split: str) -> range:
        """Values of the `row` column that belong to one split: always one dense range."""
        shards = self.shards_of(split)
        return range(shards[0].row_start, shards[-1].row_start + shards[-1].rows)


def count(manifest: pa.Table, findings: Sequence[str]) -> dict[SplitName, SplitCounts]:
    """Images, patients, positives and known labels of each split, in row order of the splits."""
    known = matrix(manifest["known"]).astype(bool)
    positive = matrix(manifest["labels"]).astype(bool) & known
    counts: dict[SplitName, SplitCounts] = {}
    for name in SPLIT_ORDER:
        chosen = pc.equal(manifest["split"], name)
        inside = chosen.to_numpy()
        if not inside.any():
            continue
        counts[name] = SplitCounts(
            images=int(inside.sum()),
            patients=pc.count_distinct(manifest["patient_id"].filter(chosen)).as_py(),
            positives=dict(zip(findings, map(int, positive[inside].sum(axis=0)), strict=True)),
            known=dict(zip(findings, map(int, known[inside].sum(axis=0)), strict=True)),
        )
    return counts


def digest(findings: Sequence[str], shards: Sequence[Shard]) -> str:
    """SHA-256 over the finding names in order and every shard's path and SHA-256."""
    content = {"findings": list(findings), "shards": [[shard.path, shard.sha256] for shard in shards]}
    return hashlib.sha256(json.dumps(content, separators=(",", ":")).encode()).hexdigest()


def write_card(data_uri: str, card: DatasetCard) -> None:
    """Writes `dataset.json`, which declares the data set complete."""
    storage.write_bytes(storage.join(data_uri, CARD_FILE), (card.model_dump_json(indent=2) + "\n").encode())


def read_card(data_uri: str) -> DatasetCard:
    """Reads the card of a prepared data set.

    Raises:
        UserError: nothing there, preparation unfinished, or a card that this version cannot read.
    """
    uri = storage.join(data_uri, CARD_FILE)
    try:
        content = storage.read_bytes(uri)
    except MissingError:
        raise MissingError(
            f"{data_uri} holds no {CARD_FILE}; give the folder that `mpc-cxr prepare` wrote, or finish it with --resume"
        ) from None
    try:
        return DatasetCard.model_validate_json(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise UserError(f"{uri} is not a dataset card: {where}: {first['msg']}; prepare the data set anew") from None
