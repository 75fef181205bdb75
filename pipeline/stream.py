"""From shards to batches: two augmented views for training through Ray Data, plain rows in order for evaluation.

Training reads in the order of `pipeline.plan`: a task takes a span of global batches, reads the row groups that hold
this rank's rows, draws the observed positives, makes both views and hands out one batch after the other. Each random
draw is a function of (seed, epoch, row), so the stream is the same for any number of tasks, ranks and restarts.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b
from typing import Any, NamedTuple

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.parquet as pq
import ray
from numpy.typing import NDArray
from ray.data import DataContext, Datasource, ExecutionResources, ReadTask
from ray.data.block import BlockMetadata

from mpc.config import ViewsConfig
from mpc.errors import UserError
from mpc.views import TwoViews
from pipeline import storage
from pipeline.card import DatasetCard
from pipeline.manifest import list_column, matrix
from pipeline.plan import Plan, RowGroup, Span
from pipeline.single_positive import draw

SPAN_ROWS = 1024  # rows of one task: reading its window again costs a few per cent of augmenting them
LEG_SPANS = 256  # tasks planned at a time, so that planning never grows with the data set
BLOCK_BYTES = 4 << 20  # tasks hand out blocks of this size, long before they end
COLUMNS = ("row", "image_id", "image", "labels", "known")


class Arrays(NamedTuple):
    """One rank's slice of a global batch, as `mpc.method.Batch` but in NumPy."""

    weak: NDArray[np.uint8]
    strong: NDArray[np.uint8] | None
    observed: NDArray[np.float32]
    labels: NDArray[np.float32]
    known: NDArray[np.bool_]
    row: NDArray[np.int64]


@dataclass(frozen=True)
class TrainingData:
    """What a training stream is made of.

    Args:
        uri: the prepared data set.
        card: its dataset card.
        views: strengths of both views.
        strong: whether strong views are made at all.
        augment: whether views are made here; else `weak` holds the stored images, for views on the device.
        seed: of the augmentation.
        draw_seed: of the observed positive.
        tasks: reading tasks at work at a time.
        task_cpus: CPUs that one asks of Ray.
    """

    uri: str
    card: DatasetCard
    views: ViewsConfig
    strong: bool = True
    augment: bool = True
    seed: int = 0
    draw_seed: int = 0
    tasks: int = 2
    task_cpus: float = 0.5


def batches(
    data: TrainingData, plan: Plan, rank: int, world_size: int, start_step: int, stop_step: int
) -> Iterator[Arrays]:
    """The rank's batches for the global steps [start_step, stop_step), in order, read ahead by Ray Data."""
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
            yield _arrays(table, data.card.image_size)


class SpanReader:
    """Reads and augments spans of a plan; runs in any process.

    Args:
        data: what to read and how to augment it.
        plan: the order.
        rank: whose share.
        world_size: number of ranks.
    """

    def __init__(self, data: TrainingData, plan: Plan, rank: int, world_size: int) -> None:
        self.data, self.plan, self.rank, self.world_size = data, plan, rank, world_size

    def __call__(self, span: Span) -> Iterator[pa.Table]:
        """One table a batch of the span."""
        cv2.setNumThreads(0)  # OpenCV would take every core of the machine inside a task that asked for a part of one
        two_views = TwoViews(self.data.views, self.data.card.image_size, strong=self.data.strong)
        share = self.plan.share(span, self.rank, self.world_size)
        rows = _read_rows(self.data.uri, self.plan.holding(share.reshape(-1)), share.reshape(-1))
        epoch = span.step // self.plan.steps_per_epoch
        size = share.shape[1]
        for start in range(0, len(rows), size):
            yield self._augmented(rows.slice(start, size), epoch, two_views)

    def _augmented(self, rows: pa.Table, epoch: int, two_views: TwoViews) -> pa.Table:
        numbers = rows["row"].to_numpy()
        images = images_of(rows["image"], self.data.card.image_size)
        views: list[tuple[NDArray[np.uint8], ...]] = [(image,) for image in images]
        if self.data.augment:
            views = [two_views(image, self._seed(epoch, row)) for image, row in zip(images, numbers, strict=True)]
        labels, known = matrix(rows["labels"]), matrix(rows["known"])
        columns = {
            "row": numbers,
            "weak": list_column(np.stack([weak.reshape(-1) for weak, *_ in views])),
            "observed": list_column(draw(rows["image_id"].to_pylist(), labels, known, self.data.draw_seed)),
            "labels": list_column(labels),
            "known": list_column(known),
        }
        if self.data.strong and self.data.augment:
            columns["strong"] = list_column(np.stack([np.concatenate(strong, axis=None) for _, *strong in views]))
        return pa.table(columns)

    def _seed(self, epoch: int, row: int) -> int:
        text = f"{self.data.seed}:{epoch}:{row}"
        return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "big")


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


def _read_rows(uri: str, groups: tuple[RowGroup, ...], wanted: NDArray[np.int64]) -> pa.Table:
    """The wanted rows in the wanted order; one row group is in memory at a time beside them."""
    parts, files = [], {}
    for group in groups:
        if group.path not in files:
            filesystem, path = storage.resolve(storage.join(uri, group.path))
            files[group.path] = pq.ParquetFile(filesystem.open_input_file(path))
        table = files[group.path].read_row_group(group.number, columns=list(COLUMNS))
        inside = wanted[(wanted >= group.start) & (wanted < group.start + group.rows)]
        parts.append(table.take(pa.array(inside - group.start)))
    rows = pa.concat_tables(parts)
    position = {row: i for i, row in enumerate(rows["row"].to_pylist())}
    return rows.take(pa.array([position[row] for row in wanted.tolist()])).combine_chunks()


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


def images_of(column: pa.Array | pa.ChunkedArray, size: int) -> NDArray[np.uint8]:
    """[N, size, size] from a column of raw bytes, without a copy where the column is one chunk."""
    chunk = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    if isinstance(chunk, pa.ChunkedArray):
        chunk = chunk.chunk(0) if chunk.num_chunks else pa.array([], pa.large_binary())
    offsets = np.frombuffer(chunk.buffers()[1], dtype=np.int64)[chunk.offset : chunk.offset + len(chunk) + 1]
    if len(chunk) and (np.diff(offsets) != size * size).any():
        raise UserError(f"an image of the shards is not {size} x {size} bytes; prepare the data set again")
    values = np.frombuffer(chunk.buffers()[2], dtype=np.uint8)
    return values[offsets[0] : offsets[0] + len(chunk) * size * size].reshape(-1, size, size)


def _arrays(table: pa.Table, size: int) -> Arrays:
    def images(name: str) -> NDArray[np.uint8]:
        """The views of a row lie behind each other in it; in a batch, view by view."""
        return matrix(table[name]).reshape(len(table), -1, size, size).swapaxes(0, 1).reshape(-1, 1, size, size)

    return Arrays(
        weak=images("weak"),
        strong=images("strong") if "strong" in table.column_names else None,
        observed=matrix(table["observed"]).astype(np.float32),
        labels=matrix(table["labels"]).astype(np.float32),
        known=matrix(table["known"]),
        row=table["row"].to_numpy(),
    )
