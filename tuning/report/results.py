"""The head of the report and its table of results."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.dotted import flat
from tuning.report.charts import Chart, roc_and_pr
from tuning.report.files import Inputs

FEW = 20
"""Fewer positives or negatives than this, and a score says little."""
MAX_CHARTS = 30
SPLITS = ("train", "val", "test", "unlabelled")
VERSION_ORDER = ("mpc-cxr", "python", "torch", "timm", "ray")
SEEN = {
    "full": "every known label (an upper bound, not a method for single positives)",
    "iun": "one positive label an image and every known negative (an upper bound)",
}
ONE_POSITIVE = "one positive label an image; every other entry counts as unlabelled, not as absent"


@dataclass(frozen=True)
class Row:
    """One finding of the result table."""

    name: str
    n_pos: int
    n_neg: int
    auroc: float | None
    ap: float | None
    threshold: float
    default: bool
    sensitivity: float | None
    specificity: float | None
    precision: float | None
    auroc_interval: list[float] | None
    """None too where an older evaluation made no intervals."""
    ap_interval: list[float] | None

    @property
    def both(self) -> bool:
        """Positives and negatives are there, so that it can be scored."""
        return self.auroc is not None

    @property
    def few(self) -> bool:
        """Its score rests on few images."""
        return min(self.n_pos, self.n_neg) < FEW

    @property
    def prevalence(self) -> float:
        """Share of positives among the images whose label is known: the average precision of guessing."""
        return self.n_pos / max(1, self.n_pos + self.n_neg)


def result_rows(inputs: Inputs) -> list[Row]:
    """Every finding, in the model's order: scores from metrics.json, the operating point from the predictions."""
    calls, rows = inputs.calls, []
    for k, name in enumerate(inputs.findings):
        present, absent, called = calls.present[:, k], calls.absent[:, k], calls.called[:, k]
        hits, alarms = int((called & present).sum()), int((called & absent).sum())
        found = inputs.metrics["findings"][name]
        rows.append(
            Row(
                name,
                **{key: found[key] for key in ("n_pos", "n_neg", "auroc", "ap")},
                **{key: found.get(key) for key in ("auroc_interval", "ap_interval")},
                threshold=float(calls.thresholds[k]),
                default=calls.default[k],
                sensitivity=_share(hits, int(present.sum())),
                specificity=_share(int(absent.sum()) - alarms, int(absent.sum())),
                precision=_share(hits, hits + alarms),
            )
        )
    return rows


def curves(inputs: Inputs, rows: list[Row]) -> list[tuple[Row, Chart]]:
    """ROC and precision-recall of each finding with both outcomes; of very many, those with the most positives."""
    able = [row for row in rows if row.both]
    shown = set(sorted((row.name for row in able), key=lambda name: -_by_name(able)[name].n_pos)[:MAX_CHARTS])
    charts = []
    found = inputs.calls.predictions
    for k, row in enumerate(rows):
        if row.name not in shown:
            continue
        known = found.known[:, k]
        point = None
        if row.sensitivity is not None and row.specificity is not None and row.precision is not None:
            point = (row.sensitivity, row.specificity, row.precision)
        chart = roc_and_pr(row.name, found.probabilities[known, k], found.labels[known, k], point)
        charts.append((row, chart))
    return charts


def splits(inputs: Inputs) -> list[dict[str, Any]]:
    """Images, patients and findings an image of each split."""
    counts = inputs.card.counts
    found = []
    for name in SPLITS:
        split = next((value for key, value in counts.items() if key == name), None)
        if split is not None:
            positives = sum(split.positives.values()) if split.positives else None
            mean = None if positives is None else positives / max(1, split.images)
            found.append({"name": name, "images": split.images, "patients": split.patients, "mean": mean})
    return found


def labels_seen(inputs: Inputs) -> str:
    """What training saw of the labels, in words, with the share of positives that stayed hidden where it is known."""
    method = inputs.run.train.method
    text = SEEN.get(method, ONE_POSITIVE)
    train = inputs.card.counts.get("train")
    if method in SEEN or not inputs.same_data or train is None or not train.positives:
        return text
    total = sum(train.positives.values())
    return f"{text}: {train.images:,} of {total:,} positive labels seen, {1 - train.images / max(1, total):.0%} hidden"


def single_positive(inputs: Inputs) -> bool:
    """Whether training saw one positive label an image and nothing else."""
    return inputs.run.train.method not in SEEN


def positives_per_image(inputs: Inputs) -> float | None:
    """Mean number of known positives of a training image, where the training data are at hand."""
    train = inputs.card.counts.get("train")
    if not inputs.same_data or train is None or not train.positives:
        return None
    return sum(train.positives.values()) / max(1, train.images)


def facts(inputs: Inputs) -> list[tuple[str, str]]:
    """What was trained, on what, how: pairs of a term and what it is."""
    card, info, run = inputs.card, inputs.info, inputs.run
    metric = f"val_{run.train.metric}"
    value = info.metrics.get(metric)
    reduced = f"; larger ones first reduced to {card.reduce_to}" if card.reduce_to else ""
    chosen = f"best epoch by {metric}" + ("" if value is None else f" = {value:.3f}")
    versions = [f"{name} {info.versions[name]}" for name in VERSION_ORDER if name in info.versions]
    return [
        ("Scored on", f"{card.name}, split {inputs.metrics['split']}: {inputs.metrics['n_images']:,} images"),
        ("Images", f"{card.image_size} x {card.image_size} pixels, grey; rectangles: {card.fit}{reduced}"),
        ("Findings", f"{len(inputs.findings)}: {', '.join(name.replace('_', ' ') for name in inputs.findings)}"),
        ("Labels in training", labels_seen(inputs)),
        ("Method", method_of(inputs)),
        ("Network", f"{run.model.backbone}, start: {_weights(run.model.weights)}"),
        (
            "Training",
            f"{info.epoch:g} of {run.train.epochs} epochs, {info.step:,} steps of {run.train.batch_size} images",
        ),
        ("Checkpoint", f"{chosen} (validation labels: {run.data.val_labels})"),
        ("Model version", f"models:/{inputs.registered}" if inputs.registered else "not from a registry"),
        ("Seeds", f"training {run.train.seed}, drawn positive {run.data.draw_seed}"),
        ("Data digest", card.digest if inputs.same_data else f"{card.digest}; trained on {info.data_digest}"),
        ("Git commit", info.git_commit or "not recorded"),
        ("Software of training", ", ".join(versions) or "not recorded"),
    ]


def method_of(inputs: Inputs) -> str:
    """The method with the settings that decide what it does."""
    run = inputs.run
    if run.train.method != "mpc":
        return run.train.method
    loss, pseudo = run.loss, run.pseudo
    weights = f"IPC {loss.lambda_ipc:.3g}, FPC {loss.lambda_fpc:.3g}, BTC {loss.lambda_btc:.3g}"
    return (
        f"mpc: supervised loss {loss.sup}; weights {weights}; "
        f"pseudo-positive from {pseudo.tau_pos:g}, pseudo-negative below {pseudo.tau_neg:g}"
    )


def settings(inputs: Inputs) -> list[tuple[str, str]]:
    """Every setting of the run by its dotted path."""
    return [(path, str(value)) for path, value in flat(inputs.info.config).items()]


def mean_without_few(rows: list[Row]) -> tuple[float, int] | None:
    """Macro AUROC over the findings with enough images, and their number; None where that changes nothing."""
    able = [row for row in rows if row.both]
    enough = [row.auroc for row in able if not row.few and row.auroc is not None]
    return (float(np.mean(enough)), len(enough)) if enough and len(enough) < len(able) else None


def _weights(name: str) -> str:
    return {"none": "random weights", "imagenet": "ImageNet weights of timm"}.get(name, "weights from a file")


def _by_name(rows: list[Row]) -> dict[str, Row]:
    return {row.name: row for row in rows}


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None
