"""Training steps on one held batch: those of our loop, and those that one writes by hand for the same network.

A function of a row trains until its stopwatch, which it calls after every step, says stop.
"""

import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import timm
import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from mpc.model import AMP_DTYPES
from mpc.transfer import Transfer
from pipeline.card import DatasetCard, Shard, read_card
from pipeline.config import RunConfig
from pipeline.host import Host, Metrics, Notice
from pipeline.loop import Loop
from pipeline.prepare_config import PolicyConfig, SplitConfig
from pipeline.setup import Timed, relative_rate
from pipeline.spans import Arrays

FINDINGS, IMAGES, WARM_STEPS = 14, 1_000_000, 3
TERMS = {"AN": (0.0, 0.0, 0.0), "IPC": (1.0, 0.0, 0.0), "MPC": (1.0, 0.5, 0.5)}
"""Weights of instance-, feature- and batch-level consistency."""


class Case(NamedTuple):
    """What one row trains."""

    row: str
    backbone: str
    side: int
    """Pixels."""
    batch: int
    """Images of a rank, before the second view."""
    device: str
    amp: str
    stretch: int
    """Steps between two looks at the clock; on a GPU a look waits for it."""
    data: str = ""
    """A prepared data set to train on; empty for one held batch."""


class Stretch(NamedTuple):
    """Some steps one after the other."""

    ms: float
    """Of one of them."""
    waited: float
    """Share of the time that went by waiting for batches."""


class Stopwatch:
    """Times stretches of steps after the first steps, which allocate and compile.

    A held batch on a CPU is never waited for: there CPU time is counted, which other processes disturb less.

    Args:
        case: how many steps, on which device.
        ask: gets a stretch that is over, None at the beginning; says, at once or when there is time, whether to go on.
        together: other processes of the benchmark run at the same time, and are waited for.
    """

    def __init__(self, case: Case, ask: Callable[[Stretch | None], bool], *, together: bool = False) -> None:
        self.case, self.ask, self.step = case, ask, 0
        self.clock = time.perf_counter if case.data or case.device == "cuda" or together else time.process_time
        self.begun, self.waited = 0.0, 0.0

    def __call__(self) -> bool:
        """Takes note of a step that was done; whether to go on."""
        self.step += 1
        timed = self.step - WARM_STEPS
        if timed < 0 or timed % self.case.stretch:
            return True
        if self.case.device == "cuda":
            torch.cuda.synchronize()
        seconds = self.clock() - self.begun
        over = Stretch(1e3 * seconds / self.case.stretch, self.waited / seconds) if timed else None
        more = self.ask(over)
        self.begun, self.waited = self.clock(), 0.0
        return more

    def timed(self, source: Iterator[Any]) -> Iterator[Any]:
        """Batches of a source; counts how long they are waited for."""
        while True:
            start = self.clock()
            found = next(source)
            self.waited += self.clock() - start
            yield found


class TimedHost(Host):
    """A plain process as host of the loop; checkpoints go nowhere.

    Args:
        watch: says after which step the loop ends.
        rank: of this process.
        world_size: number of processes.
    """

    def __init__(self, watch: Stopwatch, rank: int = 0, world_size: int = 1) -> None:
        self.watch, self.rank, self.world_size = watch, rank, world_size
        self.device = torch.device(watch.case.device)

    @contextmanager
    def last_checkpoint(self) -> Iterator[Path | None]:
        """Begins anew."""
        yield None

    def report(self, metrics: Metrics, checkpoint: Path) -> None:
        """Keeps nothing."""

    def log(self, line: Metrics) -> None:
        """Shows nothing."""

    def leave(self, name: str, content: bytes) -> str:
        """Leaves nothing."""
        return name

    def notice(self, step: int) -> Notice:
        """Ends the loop when the stopwatch has enough."""
        return "go" if self.watch() else "stop"


class BenchLoop(Loop):
    """Our loop: with the same batch in every step, or on a data set."""

    def incoming(self) -> Iterator[Timed]:
        """Arrays on the host, as the stream yields them, onto the device."""
        host = self.host
        assert isinstance(host, TimedHost)
        if self.data:
            yield from host.watch.timed(super().incoming())
        share = self.run.train.batch_size // host.world_size
        arrays, transfer = held(share, self.card.image_size, strong=self.method.needs_strong), Transfer(host.device)
        while True:
            yield Timed(transfer(arrays), 0.0)


def held(batch: int, side: int, *, strong: bool) -> Arrays:
    """Random images with one label each."""
    images = np.random.default_rng(0).integers(0, 256, (2, batch, 1, side, side), np.uint8)
    observed = np.eye(FINDINGS, dtype=np.float32)[np.arange(batch) % FINDINGS]
    return Arrays(images[0], images[1] if strong else None, observed, observed, observed >= 0, np.arange(batch))


def card_of(side: int) -> DatasetCard:
    """Of a data set that is large enough for no epoch to end; it need not exist."""
    shard = Shard(path="", split="train", rows=IMAGES, row_start=0, row_groups=(IMAGES,), bytes=0, sha256="")
    nothing: dict[str, Any] = {"counts": {}, "raw_labels": {}, "quarantined": {}, "sources": {}, "versions": {}}
    return DatasetCard(
        name="held",
        synthetic=True,
        findings=tuple(f"finding {k}" for k in range(FINDINGS)),
        image_size=side,
        fit="pad",
        policy=PolicyConfig(),
        split=SplitConfig(),
        plan="",
        shards=(shard,),
        digest="",
        **nothing,
    )


def run_of(case: Case, terms: str, world_size: int = 1, /, **sections: dict[str, Any]) -> RunConfig:
    """A run of MPC with some of its terms, from the first step on with their full weight."""
    ipc, fpc, btc = TERMS[terms]
    weights = {"lambda_ipc": ipc, "lambda_fpc": fpc, "lambda_btc": btc, "warmup_epochs": 0, "ramp_epochs": 0}
    given: dict[str, dict[str, Any]] = {
        "model": {"backbone": case.backbone, "weights": "none"},
        "views": {"place": "auto" if case.data else "stream"},  # a held batch lies there augmented
        "loss": weights,
        "train": {"epochs": 1000, "batch_size": world_size * case.batch, "num_workers": world_size, "amp": case.amp},
    }
    return RunConfig.model_validate({k: given.get(k, {}) | sections.get(k, {}) for k in {*given, *sections}})


def ours(case: Case, watch: Stopwatch, terms: str, **sections: dict[str, Any]) -> None:
    """Our loop, whole: what `mpc-cxr train` runs in a worker."""
    card = read_card(case.data) if case.data else card_of(case.side)
    BenchLoop(run_of(case, terms, **sections), case.data, card, TimedHost(watch)).fit()


def by_hand(case: Case, watch: Stopwatch, *, whole: bool, source: Iterator[Any] | None = None) -> None:
    """What one writes by hand with the fastest settings of PyTorch: forward, BCE, backward, fused AdamW.

    Args:
        case: the network and the batch.
        watch: called after every step.
        whole: with what training well needs besides: clipping, a schedule, timm's average of the weights.
        source: of other batches (images, labels) than the held one.
    """
    torch.manual_seed(0)
    device, arrays = torch.device(case.device), held(case.batch, case.side, strong=False)
    same = itertools.repeat((torch.from_numpy(arrays.weak), torch.from_numpy(arrays.observed)))
    model = timm.create_model(case.backbone, in_chans=1, num_classes=FINDINGS).train()
    model = model.to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(relative_rate, warmup=100, total=10**6))
    scaler = torch.amp.GradScaler(case.device, enabled=case.amp == "fp16")
    average = ModelEmaV3(model, decay=0.999) if whole else None
    for step, batch in enumerate(watch.timed(source or same), start=1):
        images, observed = (tensor.to(device, non_blocking=True) for tensor in batch)
        torch.autograd.backward(scaler.scale(loss_of(model, images, observed, AMP_DTYPES.get(case.amp))))
        if average is not None:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if average is not None:
            schedule.step()
            average.update(model, step=step)
        if not watch():
            return


def loss_of(model: nn.Module, images: Tensor, observed: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Every unobserved finding counts as negative."""
    with torch.autocast(images.device.type, dtype=dtype, enabled=dtype is not None):
        logits = model((images.float() / 255.0 - 0.449) / 0.226)
    return nn.functional.binary_cross_entropy_with_logits(logits.float(), observed)
