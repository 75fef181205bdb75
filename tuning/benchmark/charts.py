"""The table as a picture: a dot and its interval for every method."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from tuning.report.charts import ACCENT, GREY, INK, Chart, style, svg


def forest(found: Mapping[str, Any], methods: Sequence[str], titles: Mapping[str, str]) -> Chart:
    """One row a method, one column a score, best first; our methods and the references stand out."""
    return Chart(svg(figure(found, methods, titles)), "scores of every method with 95 % intervals over replicates")


def figure(found: Mapping[str, Any], methods: Sequence[str], titles: Mapping[str, str]) -> Figure:
    """The same as a matplotlib figure.

    Args:
        found: content of results.json.
        methods: rows, from top to bottom.
        titles: score -> heading.
    """
    height = 0.6 + 0.2 * len(methods)
    drawn = Figure(figsize=(7.2, height))
    for column, (name, title) in enumerate(titles.items()):
        axes = drawn.add_axes((0.17 + 0.42 * column, 0.38 / height, 0.39, 1 - 0.62 / height))
        style(axes)
        for row, method in enumerate(methods):
            estimate = found["methods"][method][name]["mean"]
            colour = _colour(found["protocol"], method)
            if estimate["low"] is not None:
                axes.plot([estimate["low"], estimate["high"]], [row, row], color=colour, lw=2)
            axes.plot([estimate["mean"]], [row], "o", color=colour, ms=4)
        axes.set_ylim(len(methods) - 0.5, -0.5)
        axes.set_yticks(range(len(methods)))
        axes.set_yticklabels(methods if column == 0 else [], fontsize=7.5)
        axes.set_title(title, fontsize=8, color=INK, loc="left", pad=4)
    return drawn


def _colour(protocol: Mapping[str, Any], method: str) -> str:
    return ACCENT if method in protocol["ours"] else INK if method in protocol["oracles"] else GREY
