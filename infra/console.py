"""What a person sees: tables, one-line messages, and progress that is a bar on a terminal and plain lines elsewhere."""

import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

PLAIN_WIDTH = 120
LINE_SECONDS = 10.0


def console() -> Console:
    """A console on stdout; made anew each time, so that redirected output is honoured."""
    plain = not sys.stdout.isatty()
    return Console(file=sys.stdout, width=PLAIN_WIDTH if plain else None, highlight=False, soft_wrap=plain)


def say(text: str) -> None:
    """One line (or several) on stdout, never wrapped nor read as markup, so that paths can be copied."""
    console().print(text, markup=False, soft_wrap=True)


def fault(kind: str, text: str) -> None:
    """Exactly one line on stderr: `mpc-cxr: KIND: TEXT`."""
    print(f"mpc-cxr: {kind}: {' '.join(text.split())}", file=sys.stderr)


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """A table on stdout; columns whose values are numbers are aligned to the right."""
    cells = [["" if value is None else str(value) for value in row] for row in rows]
    shown = Table(title=title, title_justify="left", title_style="bold", header_style="bold")
    for index, name in enumerate(columns):
        numbers = bool(cells) and all(_is_number(row[index]) for row in cells)
        shown.add_column(name, justify="right" if numbers else "left", overflow="fold")
    for row in cells:
        shown.add_row(*[escape(cell) for cell in row])
    console().print(shown)


class Display(Protocol):
    """A report that can also leave a line behind, above the bar."""

    def __call__(self, done: int, total: int, text: str) -> None:
        """Work done so far, all of it (0 = unknown), and what is being done."""
        ...

    def line(self, text: str) -> None:
        """Prints `text` for good."""
        ...


@contextmanager
def progress(title: str, seconds: float = LINE_SECONDS) -> Iterator[Display]:
    """A bar with count and time left on a terminal; elsewhere plain lines, `seconds` apart, and one at the end."""
    if sys.stdout.isatty():
        with BarDisplay(title) as bar:
            yield bar
    else:
        yield PlainDisplay(title, seconds)


class BarDisplay:
    """Progress as a bar with count and time left."""

    def __init__(self, title: str) -> None:
        columns = (
            SpinnerColumn(),
            TextColumn("{task.fields[title]}", style="bold"),
            BarColumn(bar_width=32),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.description}", style="dim"),
        )
        self.bar = Progress(*columns, console=console(), refresh_per_second=4, speed_estimate_period=600)
        self.task = self.bar.add_task("", total=None, title=title)

    def __enter__(self) -> "BarDisplay":
        self.bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.bar.stop()

    def __call__(self, done: int, total: int, text: str) -> None:
        """Moves the bar."""
        self.bar.update(self.task, completed=done, total=total or None, description=escape(text))

    def line(self, text: str) -> None:
        """Prints `text` above the bar."""
        self.bar.console.print(text, markup=False, soft_wrap=True)


class PlainDisplay:
    """Progress as lines for logs and pipes: the first call, then one every so many seconds, and the last one."""

    def __init__(self, title: str, seconds: float = LINE_SECONDS) -> None:
        self.title, self.seconds, self.shown = title, seconds, float("-inf")
        self.first: tuple[float, int] | None = None

    def __call__(self, done: int, total: int, text: str) -> None:
        """Prints a line unless one was printed a moment ago; the last step always prints."""
        now = time.monotonic()
        self.first = self.first or (now, done)  # what came before is start-up, or was done by an earlier run
        if now - self.shown < self.seconds and (not total or done < total):
            return
        self.shown = now
        share = f" ({100 * done // total} %{self._left(done, total, now)})" if total else ""
        print(f"{self.title}: {done:,}{f'/{total:,}' if total else ''}{share} {text}".rstrip(), flush=True)

    def line(self, text: str) -> None:
        """Prints `text`."""
        print(text, flush=True)

    def _left(self, done: int, total: int, now: float) -> str:
        """Time left at the pace so far."""
        assert self.first is not None
        since, before = self.first
        if not before < done < total:
            return ""
        return f", about {(now - since) * (total - done) / (done - before):.0f} s left"


def _is_number(text: str) -> bool:
    """Whether a cell reads as a figure: digits with signs, separators, percent, or nothing."""
    return not text.strip("0123456789.,+-% –±/") or text in {"nan", "inf"}
