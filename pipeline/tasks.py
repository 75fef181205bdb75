"""Runs jobs as Ray Data tasks, one block and so one task a job; arguments of tasks are text and plain bytes."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

import pyarrow as pa

from mpc.errors import UserError
from pipeline import runtime, shard_file
from pipeline.shard_file import ShardJob, ShardRecord

Item = dict[str, Any]


def write_item(job: ShardJob, rows: pa.Table) -> Item:
    """The job of decoding and writing one shard, with its rows and no others."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, rows.schema) as writer:
        writer.write_table(rows)
    return {"job": json.dumps(asdict(job)), "rows": sink.getvalue().to_pybytes()}


def renumber_item(job: ShardJob, record: ShardRecord) -> Item:
    """The job of giving a written shard the row numbers of `job`."""
    return {"job": json.dumps(asdict(job)), "record": record.model_dump_json()}


def write_task(item: Item) -> Item:
    """In the worker: `shard_file.write`."""
    rows = pa.ipc.open_stream(item["rows"]).read_all()
    return _reported(lambda: shard_file.write(_job(item), rows))


def renumber_task(item: Item) -> Item:
    """In the worker: `shard_file.renumber`."""
    record = ShardRecord.model_validate_json(item["record"])
    return _reported(lambda: shard_file.renumber(_job(item), record))


def run(task: Callable[[Item], Item], items: Sequence[Item], cpus: float) -> Iterator[ShardRecord]:
    """Yields each shard's record as soon as its task ends, in any order.

    Raises:
        UserError: as `results`.
    """
    for row in results(task, items, cpus):
        yield ShardRecord.model_validate_json(row["record"])


def results(task: Callable[[Item], Item], items: Sequence[Item], cpus: float) -> Iterator[Item]:
    """Yields what each task returns as soon as it ends, in any order; starts Ray if nobody has.

    Args:
        task: returns a row whose `error` is "" or the line of a UserError.
        items: one a task.
        cpus: what each task asks of Ray.

    Raises:
        UserError: a task met one (its first line is passed on), or no machine offers `cpus`.
    """
    if not items:
        return
    import ray

    runtime.start()
    largest = max((node["Resources"].get("CPU", 0.0) for node in ray.nodes() if node["Alive"]), default=0.0)
    if 0 < largest < cpus:
        raise UserError(f"prepare.task_cpus={cpus:g}, but no machine offers more than {largest:g} CPUs; lower it")
    dataset = ray.data.from_items(list(items), override_num_blocks=len(items)).map(task, num_cpus=cpus)
    for row in runtime.configured(dataset, ordered=False).iter_rows():
        if row["error"]:
            raise UserError(row["error"])
        yield row


def _reported(work: Callable[[], ShardRecord]) -> Item:
    """The record, or the user's error as a value: an exception would reach the driver wrapped in traces."""
    try:
        return {"record": work().model_dump_json(), "error": ""}
    except UserError as error:
        return {"record": "", "error": str(error)}


def _job(item: Item) -> ShardJob:
    """The job as it was before it became text."""
    fields = json.loads(item["job"])
    return ShardJob(**fields | {"findings": tuple(fields["findings"]), "strata": tuple(fields["strata"])})
