"""Charts of a search: its trials over all settings at once, over one, over two, over time and against their cost."""

import math
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure

from tuning.domains import CHOICE, KINDS, Dimension
from tuning.report.charts import ACCENT, GREY, GRID, INK, STATUS_COLOURS, Chart, style, svg
from tuning.report.learned import Expected, Found

SCALE = LinearSegmentedColormap.from_list("values", ["#e9d8a6", "#94c9b4", ACCENT, "#062f3a"])
"""Bad to good: light to dark, so that it is read without colours too."""
MOST_TICKS = 6
POINTS = 25
"""Of an expected curve, and of each side of an expected surface."""
Trials = Sequence[Mapping[str, Any]]


def parallel(found: Found) -> Chart:
    """A line a trial through all its settings to its value; one that a trial did not search leaves a gap."""
    dimensions, level = found.dimensions, found.level
    ranked = sorted(found.ranked, key=lambda trial: -found.sign * level[trial["trial_id"]])
    width = max(4.7, 1.15 * (len(dimensions) + 1))
    figure = Figure(figsize=(width, 3.3))
    axes = figure.add_axes((0.35 / width, 0.04, 1 - 0.85 / width, 0.8))
    values = list(level.values())
    for trial in reversed(ranked):  # the best one on top
        settings, best, value = trial["params"], trial["trial_id"] == found.record["best"], level[trial["trial_id"]]
        heights = [d.share(settings[d.path]) if d.path in settings else math.nan for d in dimensions]
        goodness = _goodness(value, values, found.sign)
        heights.append(_between(value, values))
        colour, strength = SCALE(goodness), 2.6 if best else 1.1
        axes.plot(heights, color=colour, lw=strength, alpha=1 if best else 0.8, marker="o", ms=4 if best else 2)
    for at, dimension in enumerate(dimensions):
        _ends(axes, at, dimension.path, _marks(dimension))
    _ends(axes, len(dimensions), found.record["metric"], [(0, f"{min(values):.4g}"), (1, f"{max(values):.4g}")])
    axes.set(xlim=(-0.3, len(dimensions) + 0.3), ylim=(-0.09, 1.12))
    axes.axis("off")
    return Chart(svg(figure), f"{len(ranked)} trials as lines through {len(dimensions)} settings to their value")


def _ends(axes: Axes, at: int, title: str, marks: Sequence[tuple[float, str]]) -> None:
    """One upright axis with its marks."""
    axes.plot([at, at], [0, 1], color=GREY, lw=1, zorder=1)
    head, _, tail = title.rpartition(".")
    axes.text(at, 1.14, f"{head}\n{tail}" if head else tail, ha="center", va="bottom", fontsize=7, color=INK)
    for height, text in marks:
        low = height == 0 and len(marks) == 2
        where: dict[str, Any] = (
            {"ha": "center", "va": "top"} if low else {"ha": "left", "va": "bottom" if height == 1 else "center"}
        )
        shift = (0, -0.04) if low else (0.05, 0.02)
        axes.text(at + shift[0], height + shift[1], text, fontsize=6.5, color=INK, **where)


def _marks(dimension: Dimension) -> list[tuple[float, str]]:
    """Ends of a domain of numbers, or every choice, with their places."""
    if dimension.kind == CHOICE:
        return [(dimension.share(value), str(value)) for value in dimension.points()]
    return [(0, f"{dimension.values[0]:g}"), (1, f"{dimension.values[1]:g}")]


def one_setting(found: Found, dimension: Dimension, expected: Expected | None) -> Chart:
    """Values of all trials over one setting, and what the forest expects."""
    figure = Figure(figsize=(3.2, 2.2))
    axes, level = figure.add_axes((0.17, 0.13, 0.8, 0.81)), found.level
    if expected is not None:
        shares, chosen = _shares(dimension), dimension.kind == CHOICE
        look: dict[str, Any] = {"lw": 0, "marker": "_", "ms": 22, "mew": 1.4} if chosen else {"lw": 1.2}
        axes.plot(shares, expected.along({dimension.path: shares}), color=INK, alpha=0.6, **look)
    for trial in reversed([trial for trial in found.ranked if dimension.path in trial["params"]]):
        best = trial["trial_id"] == found.record["best"]
        colour = STATUS_COLOURS["best" if best else trial["status"]]
        place, stopped = dimension.share(trial["params"][dimension.path]), trial["status"] == "stopped" and not best
        fill: dict[str, Any] = {"mfc": "white", "mec": colour, "mew": 1.1} if stopped else {"mec": "white", "mew": 0.6}
        axes.plot([place], [level[trial["trial_id"]]], "o", color=colour, ms=6.5 if best else 4, **fill)
    style(axes)
    _ticks(axes, dimension, "x")
    axes.yaxis.set_major_locator(matplotlib.ticker.MaxNLocator(4))
    axes.set_xlim(-0.06, 1.06)
    return Chart(svg(figure), f"{found.record['metric']} of the trials over {dimension.path}")


def two_settings(found: Found, first: Dimension, second: Dimension, expected: Expected) -> Chart:
    """What the forest expects over two settings, with the trials as dots."""
    figure = Figure(figsize=(4.5, 3.1))
    axes, beside = figure.add_axes((0.14, 0.15, 0.7, 0.81)), figure.add_axes((0.875, 0.15, 0.025, 0.81))
    across, up = _shares(first), _shares(second)
    grid = [points.ravel() for points in np.meshgrid(across, up)]
    surface = expected.along({first.path: grid[0], second.path: grid[1]}).reshape(len(up), len(across))
    scale = SCALE if found.sign > 0 else SCALE.reversed()
    level = found.level
    values = list(level.values())
    norm = Normalize(min(values), max(values))
    if CHOICE in (first.kind, second.kind):  # nothing lies between two choices
        axes.pcolormesh(across, up, surface, shading="nearest", cmap=scale, norm=norm)
    else:
        axes.contourf(across, up, surface, levels=np.linspace(min(values), max(values), 13), cmap=scale, norm=norm)
    for trial in found.ranked:
        if first.path in trial["params"] and second.path in trial["params"]:
            x, y = (d.share(trial["params"][d.path]) for d in (first, second))
            best = trial["trial_id"] == found.record["best"]
            size, edge = (9, "white") if best else (5, INK)
            colour = [scale(norm(level[trial["trial_id"]]))]
            axes.scatter([x], [y], s=size**2, c=colour, edgecolors=edge, linewidths=1.6 if best else 0.7, zorder=4)
    style(axes)
    axes.grid(visible=False)
    _ticks(axes, first, "x")
    _ticks(axes, second, "y")
    axes.set(xlabel=first.path, ylabel=second.path)
    axes.margins(0.03)
    figure.colorbar(matplotlib.cm.ScalarMappable(norm, scale), cax=beside).outline.set_visible(False)
    beside.tick_params(labelsize=7, length=2, color=GREY)
    return Chart(svg(figure), f"expected {found.record['metric']} over {first.path} and {second.path}")


def over_time(found: Found) -> Chart | None:
    """Best value so far above, the trials as bars below, over the hours since the first start."""
    timed = [trial for trial in found.record["trials"] if trial.get("started") and trial.get("ended")]
    if not timed:
        return None
    timed.sort(key=lambda trial: trial["started"])
    begin, end = timed[0]["started"], max(trial["ended"] for trial in timed)
    unit, divisor = ("hours", 3600) if end - begin >= 7200 else ("minutes", 60)
    height = min(6.0, 1.9 + 0.075 * len(timed))
    figure = Figure(figsize=(4.5, height))
    upper = figure.add_axes((0.14, 1 - 1.15 / height, 0.83, 1.05 / height))
    lower = figure.add_axes((0.14, 0.42 / height, 0.83, 1 - 1.75 / height), sharex=upper)
    steps = _best_so_far(found, timed)
    times = [(moment - begin) / divisor for moment, _ in steps]
    upper.plot(times, [value for _, value in steps], color=ACCENT, lw=1.8, drawstyle="steps-post", marker="o", ms=3)
    for row, trial in enumerate(timed):
        left, right = ((trial[key] - begin) / divisor for key in ("started", "ended"))
        colour = STATUS_COLOURS["best" if trial["trial_id"] == found.record["best"] else trial["status"]]
        lower.barh(row, right - left, left=left, height=0.75, color=colour)
    for axes in (upper, lower):
        style(axes)
    upper.tick_params(labelbottom=False)
    upper.set_ylabel("best so far")
    upper.yaxis.set_major_locator(matplotlib.ticker.MaxNLocator(3))
    lower.set(ylim=(len(timed) - 0.4, -0.6), ylabel="trial", xlabel=unit)
    lower.yaxis.set_major_locator(matplotlib.ticker.MaxNLocator(5, integer=True))
    return Chart(svg(figure), f"best value so far, and {len(timed)} trials as bars, over {unit} since the start")


def _best_so_far(found: Found, timed: Trials) -> list[tuple[float, float]]:
    """Moment and value wherever the best one changed, and the end."""
    steps: list[tuple[float, float]] = []
    for trial in sorted(timed, key=lambda trial: trial["ended"]):
        value = trial["value"]
        if value is None or trial["status"] == "failed":
            continue
        if not steps or found.sign * (value - steps[-1][1]) > 0:
            steps.append((trial["ended"], value))
    last = max(trial["ended"] for trial in timed)
    return [*steps, (last, steps[-1][1])] if steps else []


def against_cost(found: Found, front: Sequence[str], label: str) -> Chart:
    """Value over cost; trials that no other one beats in both are joined."""
    figure = Figure(figsize=(4.7, 2.8))
    axes = figure.add_axes((0.15, 0.16, 0.82, 0.79))
    by_id = {trial["trial_id"]: trial for trial in found.ranked if trial.get("cost") is not None}
    kept = [by_id[name] for name in front]
    axes.plot([t["cost"] for t in kept], [t["value"] for t in kept], color=ACCENT, lw=1.6, drawstyle="steps-post")
    for name, trial in by_id.items():
        colour = ACCENT if name in front else STATUS_COLOURS[trial["status"]]
        axes.plot(trial["cost"], trial["value"], "o", color=colour, ms=6 if name in front else 4, mec="white", mew=0.6)
    style(axes)
    axes.set(xlabel=label, ylabel=found.record["metric"])
    axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(5))
    axes.yaxis.set_major_locator(matplotlib.ticker.MaxNLocator(5))
    return Chart(svg(figure), f"{found.record['metric']} of {len(by_id)} trials over {label}; {len(kept)} on the front")


def _shares(dimension: Dimension) -> Any:
    """Where something is expected: at every choice, or at even distances."""
    count = len(set(dimension.values)) if dimension.kind == CHOICE else POINTS
    return np.linspace(0, 1, count)


def _ticks(axes: Axes, dimension: Dimension, which: str) -> None:
    """An axis of shares in the domain's own numbers."""
    if dimension.kind == CHOICE:
        marks = _marks(dimension)
    elif (kind := KINDS[dimension.kind]).integer and not kind.log and len(few := _first(dimension)) <= MOST_TICKS:
        marks = [(dimension.share(value), str(value)) for value in few]
    else:
        places = (0, 0.5, 1) if KINDS[dimension.kind].log else (0, 0.25, 0.5, 0.75, 1)
        marks = [(place, f"{dimension.at(place):.2g}") for place in places]
    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_ticks([place for place, _ in marks], [text for _, text in marks])
    axes.grid(color=GRID, lw=0.7)


def _first(dimension: Dimension) -> list[Any]:
    """As many values as there may be ticks, and one more where there are more."""
    return list(islice(dimension.points(), MOST_TICKS + 1))


def _between(value: float, values: Sequence[float]) -> float:
    low, high = min(values), max(values)
    return (value - low) / (high - low) if high > low else 1.0


def _goodness(value: float, values: Sequence[float], sign: float) -> float:
    """0 for the worst to 1 for the best, by rank: a few very bad trials would else take all colours."""
    ordered = sorted(values, key=lambda other: sign * other)
    return ordered.index(value) / max(1, len(ordered) - 1)
