"""Single images of a prepared data set by their place in a split."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pyarrow.dataset as pads
from numpy.typing import NDArray

from pipeline import storage
from pipeline.card import DatasetCard
from pipeline.plain_types import refuse_extension_types
from pipeline.spans import images_of


class Stored(NamedTuple):
    """An image as the shards hold it."""

    image_id: str
    image: NDArray[np.uint8]
    view: str


def read_images(data: str, card: DatasetCard, split: str, positions: Sequence[int]) -> dict[int, Stored]:
    """Images of a split by their position in it; other row groups are not read.

    Raises:
        UserError: no such split.
    """
    filesystem, root = storage.resolve(data)
    paths = [f"{root}/{shard.path}" for shard in card.shards_of(split)]
    dataset = pads.dataset(paths, filesystem=filesystem, format="parquet")
    refuse_extension_types(dataset.schema, data)
    first = card.rows(split).start
    wanted = pads.field("row").isin([first + position for position in positions])
    table = dataset.to_table(columns=["row", "image_id", "view", "image"], filter=wanted).combine_chunks()
    images = images_of(table["image"], card.image_size)
    columns = (table[name].to_pylist() for name in ("row", "image_id", "view"))
    return {
        row - first: Stored(image_id, image, view or "")
        for row, image_id, view, image in zip(*columns, images, strict=True)
    }
