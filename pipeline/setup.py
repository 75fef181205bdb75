"""What the training loop is put together from: network, optimiser, batches on the device."""

import math
import os
import shutil
from collections.abc import Iterable
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR

from mpc import update
from mpc.build import build_model
from mpc.config import NO_FILE
from mpc.device_views import DeviceViews
from mpc.errors import UserError
from mpc.method import Batch
from mpc.model import Classifier
from mpc.weights import read_tensors
from pipeline import storage
from pipeline.card import DatasetCard
from pipeline.config import RunConfig


class Timed:
    """A batch on the device, and how long it was waited for."""

    __slots__ = ("batch", "waited")

    def __init__(self, batch: Batch, waited: float) -> None:
        self.batch, self.waited = batch, waited


def located(run: RunConfig) -> RunConfig:
    """The run with its pretrained weights where processes that work in other folders find them, too."""
    if run.model.weights in NO_FILE:
        return run
    weights = storage.absolute(run.model.weights)
    return run.model_copy(update={"model": run.model.model_copy(update={"weights": weights})})


def make_model(run: RunConfig, card: DatasetCard) -> Classifier:
    """The network of a run, with its pretrained weights where `model.weights` names a file."""
    weights, tensors = run.model.weights, None
    if weights not in NO_FILE:
        tensors = read_tensors(storage.read_bytes(weights), weights)
    return build_model(run, len(card.findings), card.pixels, tensors=tensors, amp=run.train.amp)


def placed(model: Classifier, device: torch.device, *, channels_last: bool) -> Classifier:
    """The network on the device, its filters with channels innermost in memory if so configured; its maps follow."""
    model = model.to(device)
    return model.to(memory_format=torch.channels_last) if channels_last else model


def compile_backbone(model: Classifier) -> None:
    """Has torch compile the backbone at its first call; names of the weights stay as they are.

    The warm-up and what follows it differ in batch size, and are compiled once each.

    Raises:
        UserError: there is no compiler for what torch writes.
    """
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        raise UserError(
            f"train.compile needs a C++ compiler, {compiler} is not to be found; install it or set it false"
        )
    model.backbone.compile(dynamic=False)


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


def make_optimizer(run: RunConfig, groups: Iterable[dict[str, Any]], device: torch.device) -> torch.optim.Optimizer:
    """The optimiser of a run."""
    optim = run.optim
    return update.make_optimizer(optim.name, groups, lr=optim.lr, weight_decay=optim.weight_decay, device=device)


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
