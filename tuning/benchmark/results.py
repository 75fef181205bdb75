"""From cells to figures: scores of every replicate, comparisons, learning curves, monitors."""

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mpc.metrics import score
from pipeline import storage
from pipeline.manifest import matrix
from pipeline.meter import RATIOS
from pipeline.predictions import PREDICTIONS_FILE
from pipeline.record import MetricsLog
from tuning.benchmark.cells import Cell
from tuning.benchmark.protocol import Protocol
from tuning.benchmark.statistics import Comparison, compare, corrected, estimate, gap_share

SCORES = ("auroc", "ap")
Replicates = dict[int, float]
"""Seed -> score."""
Scores = dict[str, dict[str, Replicates]]
"""Method -> score -> replicates."""


def best_validation(folder: str, metric: str) -> float | None:
    """The best value of `metric` over the epochs of a cell; None where no epoch has it."""
    values = [line[metric] for line in MetricsLog(folder).read() if line.get(metric) is not None]
    return max(values, default=None)


def chosen(cells: Sequence[Cell], folder: str, metric: str, failed: Collection[str]) -> dict[str, dict[str, Any]]:
    """What each method chose while tuning: its settings, and every trial with its mean over the seeds.

    A setting that failed on a seed has no mean; a method whose settings all failed is left out.
    """
    tried: dict[str, dict[int, list[Cell]]] = defaultdict(lambda: defaultdict(list))
    for cell in cells:
        assert cell.trial is not None, "cells of the tuning stage have one"
        tried[cell.method][cell.trial].append(cell)
    choices = {}
    for method, settings in tried.items():
        trials: list[dict[str, Any]] = [
            {"settings": same[0].settings, metric: _mean_validation(same, folder, metric, failed)}
            for same in settings.values()
        ]
        ended = [trial for trial in trials if trial[metric] is not None]
        if ended:
            choices[method] = {"settings": max(ended, key=lambda trial: trial[metric])["settings"], "trials": trials}
    return choices


def _mean_validation(cells: Sequence[Cell], folder: str, metric: str, failed: Collection[str]) -> float | None:
    values = [best_validation(storage.join(folder, cell.name), metric) for cell in cells if cell.name not in failed]
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if len(known) == len(cells) else None


def replicates(cells: Sequence[Cell], folder: str, findings: Sequence[str]) -> tuple[Scores, dict[str, Any]]:
    """Scores of every method and seed; folds are put together first, so that every image counts once.

    A seed of which a fold is missing is left out, and named among the second value's `incomplete`.
    """
    parts: dict[tuple[str, int], list[str]] = defaultdict(list)
    for cell in cells:
        parts[cell.method, cell.seed].append(storage.join(folder, cell.name))
    scores: Scores = {}
    incomplete, images = [], 0
    for (method, seed), folders in parts.items():
        held = scores.setdefault(method, {name: {} for name in SCORES})
        files = [storage.join(place, PREDICTIONS_FILE) for place in folders]
        if not all(map(storage.exists, files)):
            incomplete.append(f"{method}, seed {seed}")
            continue
        macro, images = _macro(files, findings)
        for name in SCORES:
            held[name][seed] = macro[name]
    return scores, {"incomplete": incomplete, "images_tested": images}


def _macro(files: Sequence[str], findings: Sequence[str]) -> tuple[dict[str, float], int]:
    """Macro scores over the rows of all files, and how many rows there are."""
    tables = [pq.read_table(pa.BufferReader(storage.read_bytes(file))) for file in files]
    probabilities, labels, known = (
        np.concatenate([matrix(t[name]) for t in tables]) for name in ("probabilities", "labels", "known")
    )
    macro: dict[str, float] = score(probabilities, labels, known, findings)["macro"]
    return macro, len(labels)


def summarise(protocol: Protocol, scores: Scores) -> dict[str, Any]:
    """Every method's means, its differences from the reference methods, and the share of the gap that it closes."""
    rows = {}
    for method, by_score in scores.items():
        rows[method] = {
            name: {
                "values": values,
                "mean": estimate(list(values.values()))._asdict() if values else None,
                "against": {
                    rival: _plain(compare(values, scores[rival][name]))
                    for rival in protocol.against
                    if rival != method and values.keys() & scores.get(rival, {}).get(name, {}).keys()
                },
                "gap_share": _share(protocol, scores, method, name),
            }
            for name, values in by_score.items()
        }
    return rows


def tested(protocol: Protocol, scores: Scores) -> dict[str, dict[str, dict[str, Any]]]:
    """Our methods against every rival: method -> score -> rival -> comparison with Holm's correction.

    Methods that see true labels, and our own, are no rivals.
    """
    rivals = [name for name in scores if name not in {*protocol.oracles, *protocol.ours}]
    return {
        method: {
            name: {
                rival: _plain(comparison)
                for rival, comparison in corrected(
                    {
                        rival: compare(scores[method][name], scores[rival][name])
                        for rival in rivals
                        if scores[method][name].keys() & scores[rival][name].keys()
                    }
                ).items()
            }
            for name in SCORES
        }
        for method in protocol.ours
        if method in scores
    }


def _share(protocol: Protocol, scores: Scores, method: str, name: str) -> dict[str, Any] | None:
    ends = [scores.get(end, {}).get(name, {}) for end in (protocol.lower, protocol.upper)]
    share = gap_share(scores[method][name], *ends)
    return None if share is None else share._asdict()


def _plain(comparison: Comparison) -> dict[str, Any]:
    return {**comparison._asdict(), "difference": comparison.difference._asdict()}


def curves(cells: Sequence[Cell], folder: str, metric: str) -> dict[str, dict[str, list[float | None]]]:
    """Method -> metric or monitor -> its mean over all cells at each epoch; None where no cell has it."""
    histories: dict[str, list[list[dict[str, Any]]]] = defaultdict(list)
    for cell in cells:
        histories[cell.method].append(MetricsLog(storage.join(folder, cell.name)).read())
    names = (metric, "val_macro_ap", *RATIOS)
    found = {method: {name: _mean_curve(runs, name) for name in names} for method, runs in histories.items()}
    return {
        method: {name: curve for name, curve in by_name.items() if any(value is not None for value in curve)}
        for method, by_name in found.items()
    }


def _mean_curve(runs: Sequence[Sequence[Mapping[str, Any]]], name: str) -> list[float | None]:
    epochs = max((len(run) for run in runs), default=0)
    columns = [[run[e].get(name) for run in runs if e < len(run)] for e in range(epochs)]
    present = [[value for value in column if value is not None] for column in columns]
    return [float(np.mean(column)) if column else None for column in present]


def seconds(cells: Sequence[Cell], folder: str) -> dict[str, float]:
    """Method -> mean seconds of a training run; other cells may have trained beside it."""
    held: dict[str, list[float]] = defaultdict(list)
    for cell in cells:
        held[cell.method].append(sum(line["seconds"] for line in MetricsLog(storage.join(folder, cell.name)).read()))
    return {method: float(np.mean(values)) for method, values in held.items()}
