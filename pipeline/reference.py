"""Describes a data set's images for a checkpoint, so that predictions can tell images unlike those of its training."""

import numpy as np
from ray.train import Checkpoint

from mpc.reference import FILE, Described, Reference
from pipeline import storage
from pipeline.card import DatasetCard, read_card
from pipeline.checkpoints import opened
from pipeline.config import ReferenceConfig
from pipeline.inference import LoadedModel, best_device, load_model
from pipeline.stored import read_images

RUN = 64  # neighbours in the shards that are read together: single rows would cost their row group each


def attach(checkpoint: str, data: str, config: ReferenceConfig) -> Reference | None:
    """Writes reference.safetensors into a checkpoint; None, and nothing, if `reference.images` is 0.

    Args:
        checkpoint: its URI.
        data: URI of the data set that it was trained on.
        config: how many images, and the rate of false alarms.
    """
    if not config.images:
        return None
    filesystem, path = storage.resolve(checkpoint)
    with opened(Checkpoint(path, filesystem)) as folder:
        assert folder is not None
        loaded, card = load_model(folder, best_device()), read_card(data)
    train, held_out = (_described(loaded, data, card, split, config.images) for split in ("train", "val"))
    found = Reference.of(train, held_out, config.false_alarms)
    storage.write_bytes(storage.join(checkpoint, FILE), found.to_bytes())
    return found


def _described(loaded: LoadedModel, data: str, card: DatasetCard, split: str, limit: int) -> Described:
    """At most about `limit` images of a split, in runs that are evenly spread over it."""
    parts = []
    for run in runs_of(len(card.rows(split)), limit):
        stored = read_images(data, card, split, run)
        images = np.stack([found.image for _, found in sorted(stored.items())])
        parts.append(Described.of(loaded.outputs(images)[1], images))
    return Described._make(np.concatenate(columns) for columns in zip(*parts, strict=True))


def runs_of(total: int, limit: int) -> list[range]:
    """About `limit` of `total` places at most, in runs that are evenly spread over all."""
    starts = range(0, total, RUN)
    number = min(len(starts), -(-limit // RUN))
    return [
        range(start, min(start + RUN, total)) for start in (starts[i * len(starts) // number] for i in range(number))
    ]
