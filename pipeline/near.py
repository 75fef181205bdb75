"""Near-identical images in different splits, found by perceptual hash: a repeated image would be trained and tested on.

A hash is one bit for each of the 16 x 16 lowest coefficients of the discrete cosine transform of the image at 64 x 64
pixels: whether it lies above their median (pHash; Zauner, "Implementation and Benchmarking of Perceptual Image Hash
Functions", 2010). Over the 1.1 million pairs of the 1,525 radiographs this was measured on, images of different
patients differ in 52 bits or more; the same image saved as JPEG of quality 75, halved in size, with noise or a gamma of
0.8 differs in 22 or less.
"""

import base64
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import cv2
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

SIDE = 16
BYTES = SIDE * SIDE // 8
LIMIT = 24
"""Bits in which two hashes may differ for their images to count as near-identical."""
AGAINST = {"val": ("train", "unlabelled", "test"), "test": ("train", "unlabelled", "val")}
"""What the images of a split are compared with."""
SCHEMA = pa.schema(
    [(name, pa.string()) for name in ("image_id", "split", "near_image_id", "near_split")] + [("bits", pa.int16())]
)


class Near(NamedTuple):
    """An image, the nearest image of another split, and in how many bits their hashes differ."""

    row: int
    other: int
    bits: int


def fingerprint(image: NDArray[np.uint8]) -> bytes:
    """The perceptual hash of a grey image [H, W]: 32 bytes."""
    small = cv2.resize(image, (4 * SIDE, 4 * SIDE), interpolation=cv2.INTER_AREA).astype(np.float32)
    low = cv2.dct(small)[:SIDE, :SIDE]
    return np.packbits(low > np.median(low)).tobytes()


def packed(fingerprints: Sequence[bytes]) -> str:
    """Fingerprints as text, for JSON."""
    return base64.b64encode(b"".join(fingerprints)).decode()


def unpacked(texts: Sequence[str]) -> NDArray[np.uint64]:
    """Fingerprints [N, 4] of texts that `packed` made, one behind the other."""
    return np.frombuffer(b"".join(map(base64.b64decode, texts)), np.uint64).reshape(-1, BYTES // 8)


def across_splits(fingerprints: NDArray[np.uint64], splits: NDArray[np.str_]) -> Iterator[Near]:
    """For each image of val and test its nearest image in another split, where that is within `LIMIT` bits.

    All pairs are compared, about 300 million a second on one core: 7 s for the 112,120 images of the NIH collection.
    Memory: a few bytes an image.

    Args:
        fingerprints: [N, 4].
        splits: [N], the name of each image's split.
    """
    for split, against in AGAINST.items():
        others = np.flatnonzero(np.isin(splits, against))
        words = np.ascontiguousarray(fingerprints[others].T)
        for row in np.flatnonzero(splits == split) if len(others) else ():
            bits = np.bitwise_count(words[0] ^ fingerprints[row, 0]).astype(np.uint16)  # up to 256
            for word, own in zip(words[1:], fingerprints[row, 1:], strict=True):
                bits += np.bitwise_count(word ^ own)
            nearest = int(bits.argmin())
            if bits[nearest] <= LIMIT:
                yield Near(int(row), int(others[nearest]), int(bits[nearest]))


def table(manifest: pa.Table, found: Sequence[Near]) -> pa.Table:
    """The pairs with their image ids and splits, nearest first."""
    ordered = sorted(found, key=lambda near: (near.bits, near.row))
    rows, others = ([near[position] for near in ordered] for position in (0, 1))
    columns = [manifest[name].take(pa.array(at, pa.int64())) for at in (rows, others) for name in ("image_id", "split")]
    return pa.table([*columns, pa.array([near.bits for near in ordered], pa.int16())], schema=SCHEMA)
