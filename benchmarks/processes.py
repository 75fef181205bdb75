"""What benchmarks ask of a process and all below it: CPU time, memory, and to be alone."""

import multiprocessing
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import psutil


def tree() -> list[psutil.Process]:
    """The process and all below it."""
    return [psutil.Process(), *psutil.Process().children(recursive=True)]


def cpu_seconds() -> float:
    """CPU time of the tree so far, ended children included."""
    return cpu_of(psutil.Process())


def cpu_of(process: psutil.Process) -> float:
    """CPU time of a process and all below it so far, ended children included."""
    total = 0.0
    for one in [process, *process.children(recursive=True)]:
        try:
            times = one.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system + times.children_user + times.children_system
    return total


class Peak(threading.Thread):
    """Watches the proportional set size of the tree: shared memory counts once."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self._mib, self._over = 0.0, threading.Event()

    def run(self) -> None:
        """Looks at once and then every second."""
        over = False
        while not over:
            self._mib = max(self._mib, sum(map(_pss, tree())) / 2**20)
            over = self._over.wait(1.0)

    def end(self) -> float:
        """The highest that was seen, in MiB."""
        self._over.set()
        self.join()
        return self._mib


def _pss(process: psutil.Process) -> int:
    try:
        return int(process.memory_full_info().pss)
    except psutil.Error:  # it has ended
        return 0


def alone(function: Callable[..., Any], *arguments: Any) -> Any:
    """The function's result, from a process of its own that may have children and ends with it."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()
