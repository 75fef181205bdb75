"""What a task of the training stream does: read a span of the plan, draw the observed positives, make both views.

Each random draw is a function of (seed, epoch, row), so the stream is the same for any number of tasks, ranks and
restarts, whoever runs the tasks.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from typing import Literal, NamedTuple

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from mpc.config import ViewsConfig
from mpc.errors import UserError
from mpc.views import TwoViews
from pipeline import storage
from pipeline.card import DatasetCard
from pipeline.manifest import list_column, matrix
from pipeline.plain_types import refuse_extension_types
from pipeline.plan import Plan, RowGroup, Span
from pipeline.single_positive import draw

SPAN_ROWS = 2048
"""Rows of one task, half a window: a task reads every row group of its window, so half as many rows would cost twice as
much reading (0.2 instead of 0.1 ms an image of 224 px, beside 0.7 ms for both views)."""
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
        backend: who runs the tasks.
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
    backend: Literal["ray", "torch"] = "ray"


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

    def __call__(self, span: Span, part: slice = slice(None)) -> Iterator[pa.Table]:
        """One table a batch of the span, or of `part` of its batches."""
        cv2.setNumThreads(0)  # OpenCV would take every core of the machine inside a task that asked for a part of one
        two_views = TwoViews(self.data.views, self.data.card.image_size, strong=self.data.strong)
        share = self.plan.share(span, self.rank, self.world_size)[part]
        if not share.size:
            return
        size = self.data.card.image_size
        rows, images = read_rows(self.data.uri, self.plan.holding(share.reshape(-1)), share.reshape(-1), size)
        epoch = span.step // self.plan.steps_per_epoch
        length = share.shape[1]
        for start in range(0, len(rows), length):
            yield self._augmented(rows.slice(start, length), images[start : start + length], epoch, two_views)

    def _augmented(self, rows: pa.Table, images: NDArray[np.uint8], epoch: int, two_views: TwoViews) -> pa.Table:
        numbers = rows["row"].to_numpy()
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


def read_rows(
    uri: str, groups: tuple[RowGroup, ...], wanted: NDArray[np.int64], size: int
) -> tuple[pa.Table, NDArray[np.uint8]]:
    """The wanted rows in the wanted order, without their pixels, and these apart as [N, size, size].

    One row group is in memory at a time beside them, and every image is copied to its place at once.

    Args:
        uri: the data set.
        groups: row groups that hold the rows, in row order.
        wanted: [N], row numbers.
        size: side of the images in pixels.
    """
    order = np.argsort(wanted)
    images = np.empty((len(wanted), size, size), np.uint8)
    parts, files = [], {}
    for group in groups:
        if group.path not in files:
            filesystem, path = storage.resolve(storage.join(uri, group.path))
            files[group.path] = pq.ParquetFile(filesystem.open_input_file(path))
            refuse_extension_types(files[group.path].schema_arrow, path)
        table = files[group.path].read_row_group(group.number, columns=list(COLUMNS))
        low, high = np.searchsorted(wanted, (group.start, group.start + group.rows), sorter=order)
        inside = wanted[order[low:high]] - group.start
        parts.append(table.drop_columns("image").take(pa.array(inside)))
        images[order[low:high]] = images_of(table["image"], size)[inside]
    return pa.concat_tables(parts).combine_chunks().take(pa.array(np.argsort(order))), images


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


def arrays_of(table: pa.Table, size: int) -> Arrays:
    """A batch of `SpanReader` as arrays."""

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
