"""What the training loop is put together from: network, optimiser, batches on the device."""

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from mpc.build import build_model
from mpc.device_views import DeviceViews
from mpc.method import Batch
from mpc.model import Classifier
from mpc.weights import read_tensors
from pipeline import storage
from pipeline.card import DatasetCard
from pipeline.config import RunConfig
from pipeline.spans import Arrays


class Timed:
    """A batch on the device, and how long it was waited for."""

    __slots__ = ("batch", "waited")

    def __init__(self, batch: Batch, waited: float) -> None:
        self.batch, self.waited = batch, waited


def to_device(arrays: Arrays, device: torch.device) -> Batch:
    """NumPy arrays as tensors on the device; pinned and asynchronous where it is a GPU."""

    def move(array: np.ndarray[Any, Any]) -> Tensor:
        tensor = torch.from_numpy(np.array(array))  # a copy: Ray's arrays are read-only views of shared memory
        return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor

    return Batch._make(None if array is None else move(array) for array in arrays)


def make_model(run: RunConfig, card: DatasetCard) -> Classifier:
    """The network of a run, with its pretrained weights where `model.weights` names a file."""
    weights, tensors = run.model.weights, None
    if weights not in ("none", "imagenet"):
        tensors = read_tensors(storage.read_bytes(weights), weights)
    return build_model(run, len(card.findings), card.pixels, tensors=tensors, amp=run.train.amp)


def make_views(run: RunConfig, card: DatasetCard, device: torch.device, *, strong: bool) -> DeviceViews | None:
    """Views on the device where `views.place` puts them there; None where the stream makes them."""
    place = run.views.place
    if place == "stream" or (place == "auto" and device.type == "cpu"):
        return None
    return DeviceViews(run.views, card.image_size, run.views.strong.count if strong else 0)


def augmented(batch: Batch, views: DeviceViews, seed: int) -> Batch:
    """A batch of stored images as views, drawn from `seed`."""
    weak, strong = views(batch.weak, torch.Generator(batch.weak.device).manual_seed(seed))
    return batch._replace(weak=weak, strong=strong)


def make_optimizer(run: RunConfig, groups: Iterable[dict[str, Any]]) -> torch.optim.Optimizer:
    """AdamW, or SGD with Nesterov momentum 0.9."""
    optim = run.optim
    if optim.name == "sgd":
        return torch.optim.SGD(groups, lr=optim.lr, momentum=0.9, nesterov=True, weight_decay=optim.weight_decay)
    return torch.optim.AdamW(groups, lr=optim.lr, weight_decay=optim.weight_decay)


def relative_rate(step: int, *, warmup: int, total: int) -> float:
    """Learning rate relative to its peak: linear over `warmup` steps, then a cosine to zero at step `total`."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return 0.5 * (1.0 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def set_rates(
    optimizer: torch.optim.Optimizer, schedule: LambdaLR, peaks: Iterable[float], weight_decay: float
) -> None:
    """Gives the groups of an optimiser other peak rates, at the point of the schedule where it stands."""
    schedule.base_lrs = list(peaks)
    factors = [factor(schedule.last_epoch) for factor in schedule.lr_lambdas]
    for group, peak, factor in zip(optimizer.param_groups, schedule.base_lrs, factors, strict=True):
        group.update(initial_lr=peak, lr=peak * factor, weight_decay=weight_decay)
