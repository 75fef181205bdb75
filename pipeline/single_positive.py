"""The drawn positive: which one label of an image training may see, from nothing but seed and image id."""

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def draw(
    image_ids: Sequence[str], labels: NDArray[np.int8], known: NDArray[np.bool_], draw_seed: int
) -> NDArray[np.int8]:
    """Observed labels [N, K]: one 1 in each row that has a known positive, else none.

    Args:
        image_ids: N unique ids.
        labels: [N, K] in {0, 1}.
        known: [N, K]; a positive that is not known is never drawn.
        draw_seed: another seed gives another, independent draw.

    Each row is drawn uniformly from its known positives, in findings order, at the index blake2b("seed:id", 8 bytes,
    big-endian) modulo their number: fixed over epochs and independent of order, shards and world size.
    """
    eligible = labels.astype(bool) & known.astype(bool)
    if len(image_ids) != len(eligible):
        raise ValueError(f"{len(image_ids)} image ids for {len(eligible)} rows of labels")
    observed = np.zeros(eligible.shape, dtype=np.int8)
    for row, image_id in enumerate(image_ids):
        positives = np.flatnonzero(eligible[row])
        if positives.size:
            observed[row, positives[_hash(draw_seed, image_id) % positives.size]] = 1
    return observed


def _hash(draw_seed: int, image_id: str) -> int:
    """64 bits of BLAKE2b."""
    return int.from_bytes(hashlib.blake2b(f"{draw_seed}:{image_id}".encode(), digest_size=8).digest(), "big")
