"""Templates of the pages, and how they write numbers."""

from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

DASH, MINUS = "–", "−"


def environment() -> Environment:
    """The templates, with the filters that they use."""
    made = Environment(
        loader=PackageLoader("tuning.report", "template"),
        autoescape=True,  # names of findings, trials and folders are the user's
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters.update(score=_score, percent=_percent, count=_count, words=_words, value=_value)
    made.filters.update(interval=_interval, percents=_percents, signed=_signed, place=_place)
    made.filters.update(signed_interval=_signed_interval, breakable=_breakable, duration=_duration)
    return made


def _score(value: float | None, digits: int = 3) -> str:
    return DASH if value is None else f"{value:.{digits}f}"


def _percent(value: float | None, digits: int = 0) -> str:
    return DASH if value is None else f"{100 * value:.{digits}f} %"


def _signed(value: float | None, digits: int = 3) -> str:
    return DASH if value is None else f"{value:+.{digits}f}".replace("-", MINUS)


def _interval(bounds: list[float]) -> str:
    return f"{bounds[0]:.3f}{DASH}{bounds[1]:.3f}"


def _percents(bounds: list[float]) -> str:
    return f"{100 * bounds[0]:.0f}{DASH}{100 * bounds[1]:.0f}"


def _signed_interval(bounds: list[float]) -> str:
    return f"{_signed(bounds[0])} to {_signed(bounds[1])}"


def _place(value: float, low: float, high: float) -> float:
    """Where a value lies between two ends, in per cent; what lies outside is at the end."""
    return round(100 * min(1.0, max(0.0, (value - low) / (high - low))), 1)


def _count(value: int) -> str:
    return f"{value:,}"


def _words(name: str) -> str:
    return name.replace("_", " ")


def _breakable(path: str) -> str:
    """A dotted path that a narrow column may break (zero-width spaces)."""
    return path.replace(".", ".\u200b").replace("_", "_\u200b")


def _value(value: Any) -> str:
    """A setting of a trial: three significant digits."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _duration(seconds: float) -> str:
    """Hours, minutes or seconds, whatever says most."""
    if seconds >= 5400:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 60:.1f} min" if seconds >= 90 else f"{seconds:.0f} s"
