"""From shards to batches: two augmented views for training, plain rows in order for evaluation.

Training reads in the order of `pipeline.plan`: a task takes a span of global batches and hands out one batch after the
other (`pipeline.spans`). The tasks run on Ray Data, or, where one machine is all there is, in a DataLoader
(`pipeline.loader`); what they yield is the same.
"""

import gc
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from threading import Timer
from typing import Any

import pyarrow as pa
import pyarrow.dataset as pads
import ray
from ray.data import Datasource, ReadTask
from ray.data.block import BlockMetadata

from pipeline import runtime, storage
from pipeline.card import DatasetCard
from pipeline.plain_types import refuse_extension_types
from pipeline.plan import Plan, Span
from pipeline.spans import SPAN_ROWS, Arrays, SpanReader, TrainingData, arrays_of

log = logging.getLogger(__name__)

STARVED_SECONDS = 60.0
"""After so long without a first batch it is said that the cluster may have no CPU left for reading."""
FIRST_LEG, LEG_SPANS = 16, 256  # tasks planned at a time: few at first, which is soon done; never all of a large run
BLOCK_BYTES = 4 << 20  # tasks hand out blocks of about this size, long before they end


def batches(
    data: TrainingData, plan: Plan, rank: int, world_size: int, start_step: int, stop_step: int
) -> Iterator[Arrays]:
    """The rank's batches for the global steps [start_step, stop_step), in order, read ahead by `data.backend`."""
    run = _by_ray
    if data.backend == "torch":
        from pipeline.loader import loaded as run  # reading tasks import this module, and have no use for torch
    stream = run(data, plan, rank, world_size, start_step, stop_step)
    with _told_if_starved(data):
        first = next(stream, None)
    if first is not None:
        yield first
    yield from stream


@contextmanager
def _told_if_starved(data: TrainingData) -> Iterator[None]:
    """Says why it may take so long, should it: tasks wait without end, and without a word, for a CPU to become free."""
    said = f"no batch for {STARVED_SECONDS:g} s: {data.tasks} reading tasks wait for data or for {data.task_cpus:g} CPU"
    timer = Timer(STARVED_SECONDS, log.warning, [f"{said} each; see `ray status` for who holds the cluster's CPUs"])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _by_ray(
    data: TrainingData, plan: Plan, rank: int, world_size: int, start_step: int, stop_step: int
) -> Iterator[Arrays]:
    """The rank's batches by Ray Data, one leg of tasks after the other."""
    share = plan.batch_size // world_size
    for spans in _legs(plan.spans(start_step, stop_step, SPAN_ROWS // share)):
        source = _Planned(SpanReader(data, plan, rank, world_size), spans)
        planned = ray.data.read_datasource(source, override_num_blocks=len(source.spans), num_cpus=data.task_cpus)
        cpus = data.tasks * data.task_cpus
        dataset = runtime.configured(planned, ordered=True, cpus=cpus, block_bytes=source.block_bytes)
        for table in dataset.iter_batches(batch_size=share, batch_format="pyarrow", prefetch_batches=2):
            yield arrays_of(table, data.card.image_size)


def _legs(spans: list[Span]) -> Iterator[list[Span]]:
    """The spans in order, 16 at first, then twice as many each time up to 256."""
    start, length = 0, FIRST_LEG
    while start < len(spans):
        yield spans[start : start + length]
        start, length = start + length, min(2 * length, LEG_SPANS)


class _Planned(Datasource):  # type: ignore[misc]
    """The spans of a plan as Ray Data read tasks, in their order."""

    def __init__(self, reader: SpanReader, spans: list[Span]) -> None:
        super().__init__()
        self.reader, self.spans = reader, spans
        data = reader.data
        strong_views = data.views.strong.count if data.strong and data.augment else 0
        self.row_bytes = data.card.image_size**2 * (1 + strong_views)
        self.share = reader.plan.batch_size // reader.world_size

    @property
    def block_bytes(self) -> int:
        """Ray hands out a block once it is larger than this: as soon as it holds so many whole batches.

        A block that ends inside a batch would be cut and put together again, which copies every image twice.
        """
        a_batch = self.share * self.row_bytes
        return int((max(1, BLOCK_BYTES // a_batch) - 0.25) * a_batch)

    def estimate_inmemory_data_size(self) -> int | None:
        return None

    def get_read_tasks(self, parallelism: int, *args: Any, **kwargs: Any) -> list[ReadTask]:
        reader = ray.put(self.reader)  # once: a task carries its span alone
        return [
            ReadTask(partial(_read_span, reader, span), BlockMetadata(rows, rows * self.row_bytes, None, None))
            for span in self.spans
            if (rows := span.steps * self.share)
        ]


def _read_span(reader: "ray.ObjectRef[SpanReader]", span: Span) -> Iterator[pa.Table]:
    gc.freeze()  # what a process has imported need not be searched for garbage: 5 % of augmenting
    yield from ray.get(reader)(span)


def scan(
    uri: str, card: DatasetCard, split: str, batch_size: int = 128, rank: int = 0, world_size: int = 1
) -> Iterator[pa.RecordBatch]:
    """Rows of a split in their order, each exactly once over all ranks; memory does not grow with the split.

    A rank takes every `world_size`-th row group. Batches hold at most `batch_size` rows.

    Raises:
        UserError: the data set has no such rows, or a column of a type that is not plain.
    """
    shards = card.shards_of(split)
    filesystem, root = storage.resolve(uri)
    dataset = pads.dataset([f"{root}/{shard.path}" for shard in shards], filesystem=filesystem, format="parquet")
    refuse_extension_types(dataset.schema, uri)
    groups = [part for fragment in dataset.get_fragments() for part in fragment.split_by_row_group()]
    own = pads.FileSystemDataset(groups[rank::world_size], dataset.schema, dataset.format, filesystem)
    scanner = own.scanner(batch_size=batch_size, batch_readahead=2, fragment_readahead=1)
    yield from (batch for batch in scanner.to_batches() if len(batch))
