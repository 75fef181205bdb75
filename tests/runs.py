"""Tiny training runs that several test files share: settings, a plain process as host, equality of checkpoints."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from mpc.checkpoint import load_training_state, load_weights, read_info
from pipeline.config import RunConfig
from pipeline.host import Host, Metrics

TINY = {
    "model": {"backbone": "test_efficientnet_gn"},
    "loss": {"warmup_epochs": 0.2, "ramp_epochs": 0.5},
    "optim": {"lr": 0.003},
    "data": {"tasks": 1, "task_cpus": 0.25},
    "train": {"epochs": 2, "batch_size": 32, "worker_cpus": 0.5, "log_every": 7},
}


EXACT = {  # what N workers need to equal one: no batch statistics, no dropout, no optimiser that amplifies rounding
    "optim": {"name": "sgd", "lr": 0.01},
    "btc": {"scope": "global", "dropout": 0.0},
    "model": {"perturb": {"rate": 0.0}},
}


def tiny(**sections: dict[str, object]) -> RunConfig:
    return RunConfig.model_validate({k: {**TINY.get(k, {}), **sections.get(k, {})} for k in {*TINY, *sections}})


class PlainHost(Host):
    """A plain process as host of the loop; it keeps every checkpoint and may stop after its first one."""

    rank, world_size, device = 0, 1, torch.device("cpu")

    def __init__(self, out: Path, *, once: bool = False) -> None:
        self.out, self.once = out, once

    @contextmanager
    def last_checkpoint(self) -> Iterator[Path | None]:
        yield max(self.out.glob("step-*"), default=None)

    def report(self, metrics: Metrics, checkpoint: Path) -> None:
        checkpoint.rename(self.out / checkpoint.name)
        if self.once:
            raise KeyboardInterrupt

    def log(self, line: Metrics) -> None:
        assert 0 <= line["data_wait_share"] <= 1

    def leave(self, name: str, content: bytes) -> str:
        (self.out / name).write_bytes(content)
        return str(self.out / name)


def checkpoint_state(folder: Path) -> dict[str, object]:
    """All that a checkpoint continues with; seconds and rates are no part of it."""
    state = load_training_state(folder)
    return {"model": load_weights(folder, "model"), "ema": load_weights(folder, "ema"), **state}


TIMED = {"images_per_s", "data_wait_share", "seconds"}


def reproducible(metrics: Mapping[str, float]) -> dict[str, float]:
    """Metrics without those that a clock or the machine gives."""
    return {name: value for name, value in metrics.items() if name not in TIMED and not name.startswith("system/")}


def metrics_of(folder: Path) -> dict[str, float]:
    """The reproducible metrics of a checkpoint."""
    return reproducible(read_info(folder).metrics)


def assert_same(ours: Path, theirs: Path) -> None:
    """Bit for bit, with all that continues a run."""
    assert_equal(checkpoint_state(ours), checkpoint_state(theirs), ours.name)
    assert_equal(metrics_of(ours), metrics_of(theirs), ours.name)


def assert_close(ours: Path, theirs: Path) -> None:
    """To 1e-4: what is promised where the number of workers differs."""
    for kind in ("model", "ema"):
        left, right = load_weights(ours, kind), load_weights(theirs, kind)
        for name in right:
            torch.testing.assert_close(left[name], right[name], rtol=0, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
    assert metrics_of(ours) == pytest.approx(metrics_of(theirs), abs=1e-4)


def assert_equal(left: object, right: object, where: str = "") -> None:
    if isinstance(left, torch.Tensor):
        assert torch.equal(left, right), where
    elif isinstance(left, dict):
        assert left.keys() == right.keys(), where
        for key in left:
            assert_equal(left[key], right[key], f"{where}.{key}")
    elif isinstance(left, list):
        for i, pair in enumerate(zip(left, right, strict=True)):
            assert_equal(*pair, f"{where}[{i}]")
    else:
        assert left == right, where
