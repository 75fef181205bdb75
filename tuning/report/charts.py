"""Charts as SVG inside `data:` URIs: drawn by matplotlib's objects alone, the same bytes for the same numbers."""

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from numpy.typing import NDArray
from sklearn.metrics import precision_recall_curve, roc_curve

Array = NDArray[Any]

INK, GREY, GRID = "#22303a", "#8a97a0", "#e3e8eb"
ACCENT, SECOND, STOPPED, FAILED = "#0b7285", "#7b4fa3", "#c77700", "#b3261e"
STATUS_COLOURS = {"best": ACCENT, "finished": "#6d8794", "stopped": STOPPED, "failed": FAILED, "lost": GREY}
WAY_COLOURS = {"raw": GREY, "temperature": SECOND, "platt": ACCENT}
MAX_POINTS = 240  # of a curve: more cannot be told apart at the size of a chart


class Chart(NamedTuple):
    """A picture and what it says in words, for those who do not see it."""

    uri: str
    alt: str


class Line(NamedTuple):
    """One line over epochs."""

    epochs: Sequence[float]
    values: Sequence[float]
    colour: str = ACCENT
    label: str = ""
    strong: bool = True
    end: str = ""
    """A marker at its last point: `x` where a trial was stopped."""


def roc_and_pr(name: str, probabilities: Array, labels: Array, point: tuple[float, float, float] | None) -> Chart:
    """ROC beside precision-recall of one finding.

    Args:
        name: of the finding.
        probabilities: [N], of images whose label is known.
        labels: [N] in {0, 1}, both present.
        point: sensitivity, specificity and precision at the chosen threshold, marked in both.
    """
    figure = Figure(figsize=(4.0, 2.2))
    left = figure.add_axes((0.105, 0.185, 0.37, 0.69))
    right = figure.add_axes((0.61, 0.185, 0.37, 0.69))
    false_positive, true_positive, _ = roc_curve(labels, probabilities)
    left.plot([0, 1], [0, 1], color=GREY, lw=0.8, ls=(0, (3, 3)))
    left.plot(*_thinned(false_positive, true_positive), color=ACCENT, lw=1.6, clip_on=False)
    precision, recall, _ = precision_recall_curve(labels, probabilities, drop_intermediate=True)
    right.axhline(float(np.mean(labels)), color=GREY, lw=0.8, ls=(0, (3, 3)))
    right.plot(*_thinned(recall, precision), color=SECOND, lw=1.6, drawstyle="steps-post", clip_on=False)
    if point is not None:
        marker: dict[str, Any] = {"marker": "o", "ms": 5, "mec": "white", "mew": 1, "clip_on": False, "zorder": 5}
        left.plot([1 - point[1]], [point[0]], color=INK, **marker)
        right.plot([point[0]], [point[2]], color=INK, **marker)
    for axes, title, x in ((left, "ROC", "1 - specificity"), (right, "precision-recall", "sensitivity (recall)")):
        style(axes)
        axes.set(xlim=(0, 1), ylim=(0, 1), xticks=(0, 0.5, 1), yticks=(0, 0.5, 1))
        axes.set_xticklabels(("0", ".5", "1"))
        axes.set_yticklabels(("0", ".5", "1"))
        axes.set_xlabel(x, labelpad=1)
        axes.set_title(title, fontsize=8, color=INK, loc="left", pad=4)
    left.set_ylabel("sensitivity", labelpad=1)
    right.set_ylabel("precision", labelpad=1)
    return Chart(svg(figure), f"ROC and precision-recall curves of {name}")


def reliability(name: str, curves: Mapping[str, tuple[Sequence[float], Sequence[float]]]) -> Chart:
    """Share of positives over the mean probability of each bin; on the diagonal probabilities hold.

    Args:
        name: of the finding.
        curves: way -> mean probabilities and shares, of WAY_COLOURS' ways.
    """
    figure = Figure(figsize=(2.7, 2.35))
    axes = figure.add_axes((0.165, 0.165, 0.8, 0.8))
    axes.plot([0, 1], [0, 1], color=GREY, lw=0.8, ls=(0, (3, 3)))
    for way, (predicted, observed) in curves.items():
        axes.plot(predicted, observed, color=WAY_COLOURS[way], lw=1.4, marker="o", ms=3, clip_on=False)
    style(axes)
    axes.set(xlim=(0, 1), ylim=(0, 1), xticks=(0, 0.5, 1), yticks=(0, 0.5, 1))
    axes.set_xticklabels(("0", ".5", "1"))
    axes.set_yticklabels(("0", ".5", "1"))
    axes.set_xlabel("probability", labelpad=1)
    axes.set_ylabel("share of positives", labelpad=1)
    return Chart(svg(figure), f"Reliability of {name}: share of positives over probability, before and after")


def over_epochs(
    lines: Sequence[Line],
    alt: str,
    *,
    size: tuple[float, float] = (3.6, 2.0),
    reference: float | None = None,
    limits: tuple[float | None, float | None] = (None, None),
) -> Chart:
    """Lines over epochs, whole epochs as ticks.

    Args:
        lines: what to draw, in order.
        alt: the chart in words.
        size: inches.
        reference: a dashed level to compare with.
        limits: lower and upper end of the axis; None lets the values decide.
    """
    figure = Figure(figsize=size)
    axes = figure.add_axes((0.5 / size[0], 0.42 / size[1], 1 - 0.62 / size[0], 1 - 0.52 / size[1]))
    if reference is not None:
        axes.axhline(reference, color=GREY, lw=1, ls=(0, (3, 3)))
    for line in lines:
        single = "o" if sum(np.isfinite(line.values)) == 1 else ""
        axes.plot(
            line.epochs,
            line.values,
            color=line.colour,
            lw=2 if line.strong else 1,
            alpha=1 if line.strong else 0.75,
            marker=single,
            ms=4,
            zorder=4 if line.strong else 3,
        )
        if line.end:
            axes.plot(line.epochs[-1:], line.values[-1:], color=line.colour, marker=line.end, ms=5, mew=1.6, zorder=5)
    style(axes)
    axes.set_ylim(*limits)
    last = max([1.0, *(max(line.epochs, default=1.0) for line in lines)])
    axes.set_xlim(0.5 if last < 2 else 1 - 0.02 * last, last + 0.03 * last)
    axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(6, integer=True))
    axes.yaxis.set_major_locator(matplotlib.ticker.MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]))
    axes.set_xlabel("epoch", labelpad=1)
    return Chart(svg(figure), alt)


def style(axes: Axes) -> None:
    """The look of all charts: thin grey axes on two sides, a faint grid."""
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(GREY)
    axes.tick_params(labelsize=7.5, colors=INK, length=2, pad=2, color=GREY)
    axes.xaxis.label.set(fontsize=7.5, color=INK)
    axes.yaxis.label.set(fontsize=7.5, color=INK)
    axes.grid(color=GRID, lw=0.7)
    axes.set_axisbelow(True)


def _thinned(x: Array, y: Array) -> tuple[Array, Array]:
    """At most MAX_POINTS points, both ends kept."""
    keep = np.unique(np.linspace(0, len(x) - 1, MAX_POINTS).round().astype(int))
    return x[keep], y[keep]


def svg(figure: Figure) -> str:
    """The figure as a `data:` URI; the same bytes for the same numbers."""
    FigureCanvasSVG(figure)
    stream = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "mpc-cxr", "svg.fonttype": "path", "path.simplify": True}):
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return "data:image/svg+xml;base64," + base64.b64encode(stream.getvalue()).decode()
