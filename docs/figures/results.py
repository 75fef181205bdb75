"""Draws docs/img/NAME.png, every method with its intervals: `python docs/figures/results.py NAME RUN/results.json`."""

import argparse
import json
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg

from tuning.benchmark.charts import figure
from tuning.benchmark.report import TITLES, ranked


def main() -> None:
    """Writes the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name")
    parser.add_argument("results", type=Path)
    arguments = parser.parse_args()
    found = json.loads(arguments.results.read_text())
    drawn = figure(found, ranked(found), TITLES)
    FigureCanvasAgg(drawn)
    drawn.savefig(Path(__file__).parents[1] / "img" / f"{arguments.name}.png", dpi=110)


if __name__ == "__main__":
    main()
