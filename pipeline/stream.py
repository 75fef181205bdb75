"""From shards to batches: two augmented views for training, plain rows in order for evaluation.

Training reads in the order of `pipeline.plan`: a task takes a span of global batches and hands out one batch after the
other (`pipeline.spans`). The tasks run on Ray Data, or, where one machine is all there is, in a DataLoader
(`pipeline.loader`); what they yield is the same.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.dataset as pads
import ray
from ray.data import DataContext, Datasource, ExecutionResources, ReadTask
from ray.data.block import BlockMetadata

from mpc.errors import UserError
from pipeline import storage
from pipeline.card import DatasetCard
from pipeline.loader import loaded
from pipeline.plan import Plan, Span
from pipeline.spans import SPAN_ROWS, Arrays, SpanReader, TrainingData, arrays_of

LEG_SPANS = 256  # tasks planned at a time, so that planning never grows with the data set
BLOCK_BYTES = 4 << 20  # tasks hand out blocks of this size, long before they end


def batches(
    data: TrainingData, plan: Plan, rank: int, world_size: int, start_step: int, stop_step: int
) -> Iterator[Arrays]:
    """The rank's batches for the global steps [start_step, stop_step), in order, read ahead by `data.backend`."""
    run = loaded if data.backend == "torch" else _by_ray
    yield from run(data, plan, rank, world_size, start_step, stop_step)


def _by_ray(
    data: TrainingData, plan: Plan, rank: int, world_size: int, start_step: int, stop_step: int
) -> Iterator[Arrays]:
    """The rank's batches by Ray Data, one leg of tasks after the other."""
    share = plan.batch_size // world_size
    spans = plan.spans(start_step, stop_step, SPAN_ROWS // share)
    for leg in range(0, len(spans), LEG_SPANS):
        source = _Planned(SpanReader(data, plan, rank, world_size), spans[leg : leg + LEG_SPANS])
        context = DataContext.get_current()
        context.execution_options.preserve_order = True
        context.execution_options.resource_limits = ExecutionResources(cpu=data.tasks * data.task_cpus)
        context.target_max_block_size = BLOCK_BYTES
        dataset = ray.data.read_datasource(source, override_num_blocks=len(source.spans), num_cpus=data.task_cpus)
        for table in dataset.iter_batches(batch_size=share, batch_format="pyarrow", prefetch_batches=2):
            yield arrays_of(table, data.card.image_size)


class _Planned(Datasource):  # type: ignore[misc]
    """The spans of a plan as Ray Data read tasks, in their order."""

    def __init__(self, reader: SpanReader, spans: list[Span]) -> None:
        super().__init__()
        self.reader, self.spans = reader, spans

    def estimate_inmemory_data_size(self) -> int | None:
        return None

    def get_read_tasks(self, parallelism: int, *args: Any, **kwargs: Any) -> list[ReadTask]:
        reader = ray.put(self.reader)  # once: a task carries its span alone
        share = self.reader.plan.batch_size // self.reader.world_size
        data = self.reader.data
        strong_views = data.views.strong.count if data.strong and data.augment else 0
        row_bytes = data.card.image_size**2 * (1 + strong_views)
        return [
            ReadTask(partial(_read_span, reader, span), BlockMetadata(rows, rows * row_bytes, None, None))
            for span in self.spans
            if (rows := span.steps * share)
        ]


def _read_span(reader: "ray.ObjectRef[SpanReader]", span: Span) -> Iterator[pa.Table]:
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


def refuse_extension_types(schema: pa.Schema, where: str) -> None:
    """Raises UserError on any type that is not plain Arrow, before a value of it is read."""
    for field in schema:
        if isinstance(field.type, pa.BaseExtensionType) or (field.metadata or {}).get(b"ARROW:extension:name"):
            raise UserError(
                f"{where}: column {field.name} has extension type {field.type}; shards hold plain types only"
            )
