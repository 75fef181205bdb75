"""Ctrl-C in a search: Tune writes its state first, then the interruption goes on to whoever asked for the search."""

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_asked = threading.Event()  # of this process's search, as its listeners are


def cut_short() -> bool:
    """Whether this process's search ends before its time, by Ctrl-C or an error, and is to go on with --resume.

    Tune tells its callbacks of an end by an error in the driver, too: while it handles that error.
    """
    return _asked.is_set() or sys.exception() is not None


@contextmanager
def interruptible() -> Iterator[None]:
    """While it lasts, a first Ctrl-C lets Tune save and return, and is raised at the end; a second one at once.

    Tune's own handler would return from a Ctrl-C as if the search had ended, so `pipeline.environment` switches it off;
    SIGUSR1 is the other signal at which it saves. Until Tune listens to that, either is raised at once.
    """
    _asked.clear()
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGUSR1)}

    def first(number: int, frame: Any) -> None:
        _asked.set()
        signal.raise_signal(signal.SIGUSR1)  # Tune puts back what it had seen, which is this one
        signal.signal(signal.SIGINT, before[signal.SIGINT])

    signal.signal(signal.SIGUSR1, signal.default_int_handler)
    if before[signal.SIGINT] is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, first)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if _asked.is_set():
        raise KeyboardInterrupt


def heed() -> None:
    """Called once Tune listens to SIGUSR1: then one from elsewhere counts as a Ctrl-C, too."""
    save = signal.getsignal(signal.SIGUSR1)
    if threading.current_thread() is not threading.main_thread() or not callable(save):
        return

    def asked(number: int, frame: Any) -> None:
        _asked.set()
        save(number, frame)

    signal.signal(signal.SIGUSR1, asked)
