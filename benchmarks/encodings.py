"""Encodings of pixels in a shard: `python benchmarks/encodings.py [--side 224] [--images FOLDER] [--count 512]`.

Bytes, CPU milliseconds to write and to read one image, for raw pixels under the codecs of Parquet and for PNG and JPEG
(lossy) in an uncompressed column. One core, CPU time, files in memory: a disk or a network would favour what is small.
A round goes through all rows, so that another load on the machine falls on every row alike. Without `--images` the
images are phantoms (synthetic), else files that `prepare` would read.
"""

import argparse
import io
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

os.environ.setdefault("OMP_NUM_THREADS", "1")

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.images import find_images
from pipeline.pixels import load
from pipeline.sources.phantom.table import uri

ROUNDS, ROW_GROUP = 7, 256
Image = NDArray[np.uint8]


@dataclass(frozen=True)
class Encoding:
    """How pixels become the bytes of a cell, and what Parquet does with the column."""

    compression: str
    level: int | None = None
    encode: Callable[[Image], bytes] = lambda image: image.tobytes()
    decode: Callable[[pa.Buffer, int], Image] = lambda cell, side: np.frombuffer(cell, np.uint8).reshape(side, side)


def compressed(suffix: str, *options: int) -> Encoding:
    """An image file in each cell, through OpenCV."""

    def encode(image: Image) -> bytes:
        return cv2.imencode(suffix, image, options)[1].tobytes()

    def decode(cell: pa.Buffer, side: int) -> Image:
        return np.asarray(cv2.imdecode(np.frombuffer(cell, np.uint8), cv2.IMREAD_GRAYSCALE), np.uint8)

    return Encoding("none", None, encode, decode)


OURS = "raw, lz4 (ours)"
ENCODINGS = {
    "raw, none": Encoding("none"),
    OURS: Encoding("lz4"),
    "raw, zstd 1": Encoding("zstd", 1),
    "raw, zstd 3": Encoding("zstd", 3),
    "PNG": compressed(".png"),
    "JPEG 95 (lossy)": compressed(".jpg", cv2.IMWRITE_JPEG_QUALITY, 95),
}


def written(images: list[Image], encoding: Encoding) -> bytes:
    """A Parquet file with one column and row groups as in a shard."""
    cells = pa.array([encoding.encode(image) for image in images], pa.large_binary())
    sink = io.BytesIO()
    pq.write_table(
        pa.table({"image": cells}), sink, row_group_size=ROW_GROUP, use_dictionary=False, write_statistics=False,
        compression=encoding.compression, compression_level=encoding.level,
    )  # fmt: skip
    return sink.getvalue()


def read(file: bytes, encoding: Encoding, side: int) -> Image:
    """All images of such a file as uint8 [N, side, side]."""
    cells = pq.read_table(pa.BufferReader(file), use_threads=False)["image"]
    return np.stack([encoding.decode(cell.as_buffer(), side) for cell in cells])


def checked(images: list[Image], side: int) -> dict[str, bytes]:
    """A file of each encoding that gives back what went in, exactly but for JPEG."""
    files = {name: written(images, encoding) for name, encoding in ENCODINGS.items()}
    for name, file in files.items():
        if "lossy" not in name and not np.array_equal(read(file, ENCODINGS[name], side), images):
            raise ValueError(f"{name} does not give back the pixels that it was given")
    return files


def milliseconds(action: Callable[[], object], images: int) -> float:
    """CPU time of this process for one image."""
    start = time.process_time()
    action()
    return 1000 * (time.process_time() - start) / images


def times(images: list[Image], files: dict[str, bytes], side: int) -> dict[str, list[tuple[float, float]]]:
    """Milliseconds an image to write and to read it, for each encoding and round."""
    measured: dict[str, list[tuple[float, float]]] = {name: [] for name in ENCODINGS}
    for _ in range(ROUNDS):
        for name, encoding in ENCODINGS.items():
            write = milliseconds(partial(written, images, encoding), len(images))
            back = milliseconds(partial(read, files[name], encoding, side), len(images))
            measured[name].append((write, back))
    return measured


def main() -> None:
    """Prints a table, one line an encoding."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=224, help="of the square images, pixels")
    parser.add_argument("--images", help="folder, glob or table of real files; phantoms without it")
    parser.add_argument("--count", type=int, default=512, help="images at most")
    arguments = parser.parse_args()
    cv2.setNumThreads(1)
    uris = find_images(arguments.images) if arguments.images else [uri(0, i, "dense") for i in range(arguments.count)]
    images = [load(address, arguments.side, "pad") for address in uris[: arguments.count]]
    files = checked(images, arguments.side)
    measured = times(images, files, arguments.side)
    kind = "files" if arguments.images else "phantoms (synthetic)"
    print(f"{len(images)} {kind}, side {arguments.side} px; median of {ROUNDS} rounds, CPU ms an image")
    print(f"{'':24}{'bytes':>9}{'of raw':>8}{'write ms':>10}{'read ms':>9}")
    for name, rounds in measured.items():
        size, (write, back) = len(files[name]) / len(images), np.median(rounds, axis=0)
        print(f"{name:24}{size:9.0f}{size / arguments.side**2:8.2f}{write:10.3f}{back:9.3f}")


if __name__ == "__main__":
    main()
