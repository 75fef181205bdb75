"""The verb explain: for each image the findings that are called, as pictures of where the evidence lies."""

import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.csv as pcsv
from numpy.typing import NDArray
from scipy.special import expit, logit

from mpc.errors import UserError
from mpc.saliency import Saliency
from pipeline import pixels, storage
from pipeline.card import read_card
from pipeline.config import ExplainConfig
from pipeline.decode import DecodeError
from pipeline.images import find_images, plain
from pipeline.inference import best_device, load_model, pack, thresholds, version_of
from pipeline.overlay import Caption, picture
from pipeline.pairing import check_pixels
from pipeline.predict import Progress
from pipeline.stored import read_images

LIST_FILE = "explanations.csv"
READ = 16  # images of a data set read at a time
SCHEMA = pa.schema(
    [
        ("source", pa.string()),
        ("finding", pa.string()),
        ("probability", pa.float64()),
        ("threshold", pa.float64()),
        ("positive", pa.bool_()),
        ("picture", pa.string()),
        ("model_version", pa.string()),
        ("error", pa.string()),
    ]
)


class ExplainSummary(NamedTuple):
    """What an explanation did."""

    images: int
    """Images looked at, unreadable ones included."""
    left_out: int
    """Images beyond `explain.limit`."""
    failed: int
    pictures: int
    out: str
    """The list of all pictures."""
    how: str
    """Method and layer."""


Source = tuple[str, NDArray[np.uint8] | DecodeError]
"""Name of an image, and its pixels or why there are none."""


def explain(
    checkpoint: Path,
    out: str,
    *,
    images: str | None = None,
    data: str | None = None,
    split: str = "test",
    config: ExplainConfig | None = None,
    progress: Progress | None = None,
) -> ExplainSummary:
    """Writes a PNG for each explained finding of each image, and explanations.csv, which lists them all.

    An image that cannot be read is a row with its error.

    Args:
        checkpoint: local folder.
        out: folder or s3:// prefix.
        images: what `pipeline.images.find_images` understands; or
        data: URI of a prepared data set, of which `split` is explained.
        split: of `data`.
        config: findings, layer, limits.
        progress: called with (images done, all, text).

    Raises:
        UserError: neither or both of images and data, no image there, unknown findings or layer.
    """
    if (images is None) == (data is None):
        raise UserError("explain needs one of --images and --data; give exactly one")
    config = config or ExplainConfig()
    painter = _Painter(checkpoint, out, config)
    total, sources = _from_data(data, split, painter, config) if data else _from_files(images or "", painter, config)
    shown, rows = min(total, config.limit), []
    for number, (name, image) in enumerate(sources, 1):
        rows += painter.rows(number, name, image)
        if progress:
            progress(number, shown, name)
    _write(rows, storage.join(out, LIST_FILE))
    failed = sum(row.get("error") is not None for row in rows)
    return ExplainSummary(shown, total - shown, failed, len(rows) - failed, storage.join(out, LIST_FILE), painter.how)


class _Painter:
    """Draws the findings of one image after the other.

    Args:
        checkpoint: local folder.
        out: where pictures go.
        config: which findings, and how.
    """

    def __init__(self, checkpoint: Path, out: str, config: ExplainConfig) -> None:
        self.loaded = load_model(checkpoint, best_device())
        self.checkpoint, self.out, self.config = checkpoint, out, config
        info = self.loaded.info
        unknown = next((name for name in config.findings or () if name not in info.findings), None)
        if unknown is not None:
            raise UserError(f"explain.findings: {unknown!r} is none of the model's: {', '.join(info.findings)}")
        self.saliency = Saliency(
            self.loaded.model, info.image_size, method=config.method, layer=config.layer, cells=config.cells
        )
        self.limits = thresholds(info)[0]
        self.version = version_of(checkpoint, info, pack(checkpoint))
        self.how = f"{config.method} at {self.saliency.layer}"

    def rows(self, number: int, name: str, image: NDArray[np.uint8] | DecodeError) -> list[dict[str, Any]]:
        """Draws the findings of an image; a row for each, or one with the error."""
        if isinstance(image, DecodeError):
            return [{"source": name, "model_version": self.version, "error": str(image)}]
        logits = self.loaded.logits(image[None])[0].astype(np.float64)
        return [self._row(number, name, image, k, float(expit(logits[k]))) for k in self._chosen(logits)]

    def _chosen(self, logits: NDArray[np.float64]) -> list[int]:
        """Outputs to draw: those that are asked for, else the called ones or the nearest to being called."""
        findings = self.loaded.info.findings
        if self.config.findings is not None:
            return [findings.index(name) for name in self.config.findings]
        margins = logits - logit(np.clip(self.limits, 1e-9, 1 - 1e-9))
        ranked: list[int] = np.argsort(-margins, kind="stable").tolist()
        return [k for k in ranked if margins[k] >= 0][: self.config.per_image] or ranked[:1]

    def _row(self, number: int, name: str, image: NDArray[np.uint8], k: int, probability: float) -> dict[str, Any]:
        finding, limit = self.loaded.info.findings[k], float(self.limits[k])
        caption = Caption(finding, probability, limit, name, self.version, self.how)
        file = f"{number:04d}-{_plain(PurePosixPath(name).stem)}-{_plain(finding)}.png"
        found = self.saliency.maps(image[None], [k])[0]
        storage.write_bytes(storage.join(self.out, file), picture(image, found, caption))
        return {
            "source": name,
            "finding": finding,
            "probability": probability,
            "threshold": limit,
            "positive": probability >= limit,
            "picture": file,
            "model_version": self.version,
        }


def _from_files(images: str, painter: _Painter, config: ExplainConfig) -> tuple[int, Iterator[Source]]:
    """How many files there are, and those within the limit."""
    found, info = find_images(images), painter.loaded.info

    def load(uri: str) -> NDArray[np.uint8] | DecodeError:
        try:
            return pixels.load(uri, info.image_size, info.pixels.fit, info.pixels.reduce_to)
        except DecodeError as error:
            return error

    return len(found), ((plain(found[place]), load(found[place])) for place in _spread(len(found), config.limit))


def _from_data(data: str, split: str, painter: _Painter, config: ExplainConfig) -> tuple[int, Iterator[Source]]:
    """How many images a split has, and those within the limit."""
    card = read_card(data)
    check_pixels(painter.loaded.info, card, f"checkpoint {painter.checkpoint}", data)
    total = len(card.rows(split))
    places = _spread(total, config.limit)

    def images() -> Iterator[Source]:
        for start in range(0, len(places), READ):
            for _, stored in sorted(read_images(data, card, split, places[start : start + READ]).items()):
                yield stored.image_id, stored.image

    return total, images()


def _spread(total: int, limit: int) -> list[int]:
    """At most `limit` of `total` places, evenly spread."""
    number = min(total, limit)
    return [place * total // number for place in range(number)]


def _plain(text: str) -> str:
    """A part of a file name: letters, digits, - and _ alone."""
    return re.sub(r"[^A-Za-z0-9_-]+", "_", text)[-60:]


def _write(rows: list[dict[str, Any]], uri: str) -> None:
    with storage.open_output(uri) as stream:
        pcsv.write_csv(pa.Table.from_pylist(rows, schema=SCHEMA), stream)
