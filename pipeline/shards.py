"""Source to shards: every image decoded once, on Ray Data, one task a shard, resumable at any point.

Row numbers have to be dense although only decoding shows which images are bad. Each shard is therefore written with
the numbers it has if every image is good; when all counts are known, the shards behind a quarantined image get their
`row` column rewritten without decoding again. With no bad image, which is the common case, nothing is written twice.
"""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mpc.errors import UserError
from pipeline import identity, near, policy, shard_file, split, storage, tasks
from pipeline.card import (
    CARD_FILE,
    NEAR_FILE,
    QUARANTINE_FILE,
    SHARD_FOLDER,
    SPLIT_ORDER,
    DatasetCard,
    RawCounts,
    SplitCounts,
    SplitName,
    count,
    digest,
    read_card,
    write_card,
)
from pipeline.manifest import LEFT_OUT, QUARANTINE_SCHEMA, SourceTable, check, matrix
from pipeline.prepare_config import PrepareConfig, SplitConfig
from pipeline.shard_file import WORK_FOLDER, ShardJob, ShardRecord
from pipeline.sources import PRIVATE, Roots, open_source

Progress = Callable[[int, int], None]
"""Called with (images done, images in all) whenever a shard is finished."""
FEWEST_SHARDS = 8
"""Small splits are still cut into this many shards where row groups allow it: work for several tasks."""
RECORDED_VERSIONS = (
    "mpc-cxr", "ray", "pyarrow", "numpy", "opencv-python-headless", "pillow", "pydicom", "imagecodecs", "pyjpegls",
    "pylibjpeg-openjpeg",
)  # fmt: skip
NOT_IN_PLAN: dict[str, bool | set[str]] = {
    "max_bad": True, "task_cpus": True, "key_file": True, "table": {"file"}, "split": {"file"},
}  # fmt: skip


@dataclass(frozen=True)
class Survey:
    """Everything that is known before the first pixel is decoded."""

    source: SourceTable
    """As it was read, with its own ids: it stays in memory."""
    manifest: pa.Table
    """In row order: train, val, test, unlabelled; inside each by the hash of the image id."""
    raw_labels: dict[str, RawCounts]
    counts: dict[SplitName, SplitCounts]

    @property
    def unusable(self) -> Counter[str]:
        """Reason -> entries that never became rows, without those left out on purpose."""
        reasons = Counter(self.source.quarantine["reason"].to_pylist())
        return Counter({reason: times for reason, times in reasons.items() if reason not in LEFT_OUT})


def survey(config: PrepareConfig, roots: Roots) -> Survey:
    """Source, policy and split, without decoding or writing anything.

    The manifest holds keyed hashes in place of the ids of a private source. They come after the split, which so does
    not depend on the key, and whose errors name the user's own ids.

    Raises:
        UserError: whatever is wrong with source, policy, split or key.
    """
    key = identity.find_key(config.key_file) if config.source in PRIVATE else None
    source = open_source(config, roots)
    table, codes = policy.apply(source, config.policy)
    table = split.set_apart(split.assign(table, config.split))
    manifest = _ordered(identity.hidden(table, key) if key else table)
    if config.split.file:
        listed = hashlib.sha256(storage.read_bytes(config.split.file)).hexdigest()
        source = replace(source, digests=source.digests | {"split": listed})
    check(manifest, source.findings)
    absent = [name for name in config.strata if name not in manifest.column_names]
    if absent:
        raise UserError(f"prepare.strata asks for {absent[0]}, which {source.name} does not have; leave it out")
    split.require_all(manifest["split"], config.split)
    raw = {finding: RawCounts(**found.as_dict()) for finding, found in codes.items()}
    return Survey(source, manifest, raw, count(manifest, source.findings))


def prepare(
    config: PrepareConfig,
    roots: Roots,
    out: str,
    resume: bool = False,
    progress: Progress | None = None,
    announce: Callable[[Survey], None] | None = None,
) -> DatasetCard:
    """Writes `shards/*.parquet`, `quarantine.parquet` and, last, `dataset.json`.

    Equal configuration and source give equal bytes. A run that was killed goes on with `resume=True`; finished shards
    are kept, and a finished data set is returned as it is.

    Args:
        config: what to prepare.
        roots: folder or s3:// URI of the collection, or several; None for the synthetic source.
        out: folder or s3:// URI; must be empty unless `resume`.
        resume: continue an earlier run of the same configuration and source.
        progress: called after each shard.
        announce: called with the survey before anything is written.

    Raises:
        UserError: bad source or configuration, `out` not empty, too many bad images, storage that fails.
    """
    out = storage.absolute(out)
    found = survey(config, roots)
    if announce:
        announce(found)
    plan = _plan_digest(config, found)
    _limit(found.unusable, len(found.manifest) + found.unusable.total(), config.max_bad)
    if _open_output(out, plan, resume):
        return read_card(out)
    jobs = _jobs(config, found, out, plan)
    records = _written(config, found, jobs, progress)
    records = _numbered(config, jobs, records)
    return _finish(config, found, out, plan, [records[job.path] for job in jobs])


def _ordered(table: pa.Table) -> pa.Table:
    """Rows by split, then by a hash of the image id: no shard is sorted by patient or disease."""
    rank = {name: position for position, name in enumerate(SPLIT_ORDER)}
    ranks = np.array([rank[name] for name in table["split"].to_pylist()])
    keys = [hashlib.blake2b(i.encode(), digest_size=8, person=b"order").digest() for i in table["image_id"].to_pylist()]
    return table.take(np.lexsort((np.array([int.from_bytes(key, "big") for key in keys], np.uint64), ranks)))


def _plan_digest(config: PrepareConfig, found: Survey) -> str:
    """SHA-256 over what determines the shards; paths are left out, so that a collection may move."""
    content = config.model_dump(mode="json", exclude=NOT_IN_PLAN) | {"rows": len(found.manifest)}
    sha = hashlib.sha256(json.dumps(content, sort_keys=True).encode())
    sha.update(json.dumps(found.source.findings).encode())
    for name in found.manifest.column_names:
        column = found.manifest[name]
        if name == "uri":
            continue
        plain = matrix(column).tobytes() if pa.types.is_fixed_size_list(column.type) else None
        sha.update(plain if plain is not None else json.dumps(column.to_pylist()).encode())
    return sha.hexdigest()


def _open_output(out: str, plan: str, resume: bool) -> bool:
    """Claims the output folder; True where an earlier run of this plan has already finished everything."""
    storage.make_dirs(out)
    marker = storage.join(out, WORK_FOLDER, "plan.json")
    if storage.is_empty(out):
        storage.write_bytes(marker, json.dumps({"plan": plan}).encode())
        return False
    if not resume:
        raise UserError(f"{out} is not empty; choose another --out, or continue what lies there with --resume")
    complete = storage.exists(storage.join(out, CARD_FILE))
    if not complete and not storage.exists(marker):
        raise UserError(f"{out} holds something else than an unfinished preparation; choose another --out")
    earlier = read_card(out).plan if complete else json.loads(storage.read_bytes(marker))["plan"]
    if earlier != plan:
        raise UserError(f"{out} was prepared from another configuration or source table; choose another --out")
    if complete:
        storage.delete(storage.join(out, WORK_FOLDER))
    return complete


def _jobs(config: PrepareConfig, found: Survey, out: str, plan: str) -> dict[ShardJob, pa.Table]:
    """Every shard with its rows of the manifest, in row order."""
    limit = int(config.shard_mib * 2**20 / config.image_size**2)
    jobs: dict[ShardJob, pa.Table] = {}
    start = 0
    for name, counts in found.counts.items():
        spread = math.ceil(counts.images / FEWEST_SHARDS / config.row_group) * config.row_group
        rows = max(config.row_group, min(limit // config.row_group * config.row_group, spread))
        for index, offset in enumerate(range(0, counts.images, rows)):
            length = min(rows, counts.images - offset)
            job = ShardJob(
                out=out, path=f"{SHARD_FOLDER}/{name}-{index:05d}.parquet", split=name, row_start=start, plan=plan,
                findings=found.source.findings, strata=config.strata, size=config.image_size, fit=config.fit,
                row_group=config.row_group, reduce_to=config.reduce_to,
            )  # fmt: skip
            jobs[job] = found.manifest.slice(start, length)
            start += length
    return jobs


def _written(
    config: PrepareConfig, found: Survey, jobs: dict[ShardJob, pa.Table], progress: Progress | None
) -> dict[str, ShardRecord]:
    """Decodes what no earlier run has; stops as soon as too many images are bad."""
    records = {job.path: record for job in jobs if (record := shard_file.finished(job))}
    total = len(found.manifest)
    reasons = found.unusable
    entries = total + reasons.total()
    for record in records.values():
        reasons.update(fault.reason for fault in record.faults)
    _limit(reasons, entries, config.max_bad)
    done = sum(len(jobs[job]) for job in jobs if job.path in records)
    if progress and done:
        progress(done, total)
    pending = {job: rows for job, rows in jobs.items() if job.path not in records}
    items = [tasks.write_item(job, rows) for job, rows in pending.items()]
    for record in tasks.run(tasks.write_task, items, config.task_cpus):
        records[record.shard.path] = record
        reasons.update(fault.reason for fault in record.faults)
        done += record.shard.rows + len(record.faults)
        if progress:
            progress(done, total)
        _limit(reasons, entries, config.max_bad)
    return records


def _numbered(
    config: PrepareConfig, jobs: dict[ShardJob, pa.Table], records: dict[str, ShardRecord]
) -> dict[str, ShardRecord]:
    """Rewrites the `row` column of the shards that lie behind a quarantined image."""
    start, items = 0, []
    for job in jobs:
        record = records[job.path]
        if record.shard.rows and record.shard.row_start != start:
            items.append(tasks.renumber_item(shard_file.at(job, start), record))
        start += record.shard.rows
    return records | {record.shard.path: record for record in tasks.run(tasks.renumber_task, items, config.task_cpus)}


def _finish(config: PrepareConfig, found: Survey, out: str, plan: str, records: Sequence[ShardRecord]) -> DatasetCard:
    """Quarantine table and card, then the work folder goes."""
    source, manifest = found.source, found.manifest
    good = np.ones(len(manifest), dtype=bool)
    faults, start = [], 0
    for record in records:
        for fault in record.faults:
            good[start + fault.row] = False
            uri = manifest["uri"][start + fault.row].as_py()
            faults.append({"source": uri, "reason": fault.reason, "detail": fault.detail})
        start += record.shard.rows + len(record.faults)
    kept = manifest.filter(pa.array(good))
    split.require_all(kept["split"], config.split)
    quarantine = pa.concat_tables([source.quarantine, pa.Table.from_pylist(faults, schema=QUARANTINE_SCHEMA)])
    resembling = _near(kept, records)
    for name, table in ((QUARANTINE_FILE, quarantine), (NEAR_FILE, resembling)):
        with storage.open_output(storage.join(out, name)) as stream:
            pq.write_table(table, stream)
    for leftover in storage.list_files(storage.join(out, SHARD_FOLDER), (storage.TEMPORARY,)):
        storage.delete(leftover)
    shards = tuple(record.shard for record in records if record.shard.rows)
    card = DatasetCard(
        name=source.name, synthetic=source.synthetic, findings=source.findings, image_size=config.image_size,
        fit=config.fit, reduce_to=config.reduce_to, policy=config.policy, split=_named(config.split),
        strata=config.strata, counts=count(kept, source.findings), raw_labels=found.raw_labels,
        quarantined=dict(sorted(Counter(quarantine["reason"].to_pylist()).items())), near_duplicates=len(resembling),
        sources=source.digests,
        versions={name: version(name) for name in RECORDED_VERSIONS}, plan=plan, shards=shards,
        digest=digest(source.findings, shards),
    )  # fmt: skip
    write_card(out, card)
    storage.delete(storage.join(out, WORK_FOLDER))
    return card


def _near(kept: pa.Table, records: Sequence[ShardRecord]) -> pa.Table:
    """Images of val and test that nearly equal one of another split."""
    fingerprints = near.unpacked([record.fingerprints for record in records])
    return near.table(kept, list(near.across_splits(fingerprints, np.array(kept["split"].to_pylist()))))


def _named(split: SplitConfig) -> SplitConfig:
    """The split without the folder of its file, which is nobody's business."""
    return split.model_copy(update={"file": storage.name(split.file)}) if split.file else split


def _limit(reasons: Counter[str], entries: int, max_bad: float) -> None:
    """Raises UserError once the share of unusable entries is past the limit."""
    bad = reasons.total()
    if bad > max_bad * entries:
        reason, times = reasons.most_common(1)[0]
        raise UserError(
            f"{bad} of {entries} images are unusable, more than prepare.max_bad={max_bad:g} allows; most are "
            f"{reason!r} ({times}); mend the collection, or raise prepare.max_bad and use --resume"
        )
