"""Training on a data set that is read and augmented meanwhile: our loop, and one written by hand with a DataLoader."""

import os
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import ray
from steps import Case, Stopwatch, by_hand, ours
from stream import PROCESSES, OfShards
from stream import Case as StreamCase
from torch.utils.data import DataLoader

from pipeline import runtime


def by_loader(case: Case, watch: Stopwatch) -> None:
    """The hand-written loop, fed by the hand-written data set of benchmarks/stream.py with weak views alone."""
    dataset = OfShards(StreamCase("", case.data, "", strong=False, images=0))

    def endless() -> Iterator[Any]:
        loader = DataLoader(dataset, batch_size=None, num_workers=PROCESSES, persistent_workers=True)
        while True:
            yield from ((images[:, None], labels.float()) for images, labels in loader)

    by_hand(case, watch, whole=False, source=endless())


def by_ray(case: Case, watch: Stopwatch, terms: str) -> None:
    """Our loop, fed by Ray Data on the cores that this machine has."""
    runtime.start(num_cpus=PROCESSES)
    ray.get([ray.remote(lambda: os.getpid()).remote() for _ in range(PROCESSES)])  # its worker processes are up
    ours(case, watch, terms, data={"tasks": PROCESSES, "task_cpus": 0.5})


def by_processes(case: Case, watch: Stopwatch, terms: str) -> None:
    """Our loop, fed by the processes of a DataLoader."""
    ours(case, watch, terms, data={"tasks": PROCESSES, "backend": "torch"})


STREAMED: dict[str, Callable[[Case, Stopwatch], None]] = {
    "AN, by hand, DataLoader": by_loader,
    "AN, data.backend=torch": partial(by_processes, terms="AN"),
    "AN, data.backend=ray": partial(by_ray, terms="AN"),
    "MPC, data.backend=torch": partial(by_processes, terms="MPC"),
    "MPC, data.backend=ray": partial(by_ray, terms="MPC"),
}
