"""Images of the scored split: examples in both views, and the errors that lie farthest from their threshold."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import NamedTuple

import cv2
import numpy as np
import pyarrow.dataset as pads
from numpy.typing import NDArray

from mpc.errors import UserError
from mpc.views import TwoViews
from pipeline import storage
from pipeline.plain_types import refuse_extension_types
from pipeline.spans import images_of
from tuning.report.files import Inputs

Image = NDArray[np.uint8]

EXAMPLES, ERRORS, CALLS = 6, 6, 5
MAX_SIDE = 224  # pixels of an embedded image: keeps the page below 3 MB


class Picture(NamedTuple):
    """An image of the page."""

    caption: str
    uri: str


@dataclass(frozen=True)
class Call:
    """One finding of one image, as the model sees it and as it is."""

    finding: str
    probability: float
    threshold: float
    outcome: str
    """`found`, `missed`, `false alarm`, `rightly absent`; `called` or `not called` where the truth is unknown."""
    margin: float
    """Log-odds above the threshold."""
    bar: float
    """Margin as a share of the bar's half, in [-1, 1]; the scale is the same for the whole page."""


@dataclass(frozen=True)
class Example:
    """An image with its findings."""

    image_id: str
    view: str
    true: list[str]
    called: list[str]
    calls: list[Call]
    pictures: list[Picture]


class Stored(NamedTuple):
    """An image as the shards hold it."""

    image: Image
    view: str


def examples(inputs: Inputs) -> list[Example]:
    """Some images of the split, chosen by a hash of their id and not by how well the model does."""
    order = sorted(range(len(inputs.scores.image_id)), key=lambda i: _hash(inputs.scores.image_id[i]))
    rows = sorted(order[:EXAMPLES])
    stored = _read(inputs, rows)
    return [_example(inputs, row, stored[row], _views(inputs, row, stored[row].image)) for row in rows]


def errors(inputs: Inputs, *, missed: bool) -> list[tuple[Call, Example]]:
    """The most confident errors: of each finding its worst, of those the worst few, each image once.

    Args:
        inputs: what was read.
        missed: positives that were not called; else negatives that were.
    """
    scores = inputs.scores
    wrong = scores.known & (scores.labels == (1 if missed else 0)) & (scores.called != missed)
    distance = np.where(wrong, np.abs(scores.margins), -1.0)
    worst: list[tuple[int, int]] = []
    used: set[int] = set()
    for _ in range(ERRORS):
        free = distance.copy()
        free[list(used), :] = -1.0
        free[:, [k for _, k in worst]] = -1.0
        row, k = divmod(int(free.argmax()), free.shape[1])
        if free.size == 0 or free[row, k] < 0:
            break
        worst.append((row, k))
        used.add(row)
    stored = _read(inputs, [row for row, _ in worst])
    return [
        (_call(inputs, row, k), _example(inputs, row, stored[row], [Picture("as stored", _png(stored[row].image))]))
        for row, k in worst
    ]


def uses_strong(inputs: Inputs) -> bool:
    """Whether training saw strong views at all."""
    return inputs.run.train.method == "mpc" and inputs.run.loss.needs_strong


def _views(inputs: Inputs, row: int, image: Image) -> list[Picture]:
    """The image as stored and as one training step would have seen it."""
    two_views = TwoViews(inputs.run.views, inputs.card.image_size, strong=uses_strong(inputs))
    weak, *strong = two_views(image, _hash(inputs.scores.image_id[row]))
    pictures = [Picture("as stored", _png(image)), Picture("weak view", _png(weak))]
    return [*pictures, *(Picture("strong view", _png(view)) for view in strong)]


def _example(inputs: Inputs, row: int, stored: Stored, pictures: list[Picture]) -> Example:
    """Lists as calls all true findings and, up to CALLS, those that lie highest above their threshold."""
    scores, findings = inputs.scores, inputs.card.findings
    true = [k for k in range(len(findings)) if scores.known[row, k] and scores.labels[row, k] == 1]
    ranked = sorted(range(len(findings)), key=lambda k: -float(scores.margins[row, k]))
    chosen = set(true) | set(ranked[: max(0, CALLS - len(true))])
    return Example(
        scores.image_id[row],
        stored.view,
        [findings[k] for k in true],
        [findings[k] for k in range(len(findings)) if scores.called[row, k]],
        [_call(inputs, row, k) for k in ranked if k in chosen],
        pictures,
    )


def _call(inputs: Inputs, row: int, k: int) -> Call:
    scores = inputs.scores
    called, present = bool(scores.called[row, k]), bool(scores.labels[row, k])
    margin = float(scores.margins[row, k])
    if not scores.known[row, k]:
        outcome = "called" if called else "not called"
    elif present:
        outcome = "found" if called else "missed"
    else:
        outcome = "false alarm" if called else "rightly absent"
    return Call(
        inputs.card.findings[k],
        float(scores.probabilities[row, k]),
        float(scores.thresholds[k]),
        outcome,
        margin,
        max(-1.0, min(1.0, margin / inputs.scores.margin_scale)),
    )


def _read(inputs: Inputs, positions: Sequence[int]) -> dict[int, Stored]:
    """Images of the split by their position in it; other row groups are not read."""
    data, card, split = inputs.places["data"], inputs.card, inputs.metrics["split"]
    filesystem, root = storage.resolve(data)
    paths = [f"{root}/{shard.path}" for shard in card.shards_of(split)]
    dataset = pads.dataset(paths, filesystem=filesystem, format="parquet")
    refuse_extension_types(dataset.schema, data)
    first = card.rows(split).start
    wanted = pads.field("row").isin([first + position for position in positions])
    table = dataset.to_table(columns=["row", "image_id", "view", "image"], filter=wanted).combine_chunks()
    found = {}
    images = images_of(table["image"], card.image_size)
    for row, image_id, view, image in zip(
        table["row"].to_pylist(), table["image_id"].to_pylist(), table["view"].to_pylist(), images, strict=True
    ):
        found[row - first] = Stored(image, view or "")
        if inputs.scores.image_id[row - first] != image_id:
            raise UserError(f"{inputs.places['evaluation']} holds other rows than {data}; evaluate again")
    return found


def _png(image: Image) -> str:
    """A `data:` URI; large images are made smaller."""
    side = max(image.shape)
    if side > MAX_SIDE:
        image = cv2.resize(image, (MAX_SIDE, MAX_SIDE), interpolation=cv2.INTER_AREA).astype(np.uint8)
    done, encoded = cv2.imencode(".png", image, [cv2.IMWRITE_PNG_COMPRESSION, 9])
    assert done, "a grey image can always be written as PNG"
    return "data:image/png;base64," + base64.b64encode(encoded.tobytes()).decode()


def _hash(image_id: str) -> int:
    return int.from_bytes(blake2b(f"report:{image_id}".encode(), digest_size=8).digest(), "big")
