"""The card of a model version: what it is for, what it was made from, what it scored, and where it must not be trusted.

The order follows "Model Cards for Model Reporting" (Mitchell et al., FAT* 2019).
"""

from collections.abc import Mapping
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from mpc.config import CheckpointInfo
from pipeline.card import DatasetCard
from pipeline.config import RunConfig
from tuning.record import without_places

FILE = "model_card.md"
TEMPLATE = FILE + ".j2"
LONGEST = 5000
"""Characters that MLflow takes as a version's description."""
METHOD = ("train.method", "loss.sup", "loss.lambda_ipc", "loss.lambda_fpc", "loss.lambda_btc", "model.backbone",
          "model.weights", "optim.lr", "train.epochs", "train.batch_size", "train.seed")  # fmt: skip
"""Settings that the card shows; the rest is in the run and in checkpoint.json."""


def model_card(
    name: str,
    info: CheckpointInfo,
    *,
    origin: Mapping[str, str],
    evaluation: Mapping[str, Any] | None = None,
    data: DatasetCard | None = None,
) -> str:
    """The card as Markdown; paths in the settings are cut to their last part.

    Args:
        name: of the registered model.
        info: of the checkpoint.
        origin: tags of the version: names and keys of run and search, the name of the data set where it is known.
        evaluation: content of metrics.json.
        data: card of the data set that was trained on, where it is at hand.
    """
    from tuning.report.results import ONE_POSITIVE, SEEN  # it draws charts, which fetching a version does without

    run = RunConfig.model_validate(info.config)
    settings = without_places(run.model_dump(mode="json"))
    external = evaluation is not None and evaluation["data_digest"] != info.data_digest
    scores = evaluation["findings"] if evaluation else {}
    return (
        _environment()
        .get_template(TEMPLATE)
        .render(
            name=name,
            info=info,
            synthetic=str(data.synthetic).lower() if data else origin.get("data.synthetic", "unknown"),
            seen=SEEN.get(run.train.method, ONE_POSITIVE),
            method=[(key, settings[key.partition(".")[0]][key.partition(".")[2]]) for key in METHOD],
            data=_data(info, origin, data),
            counts=data.counts if data else {},
            evaluation=evaluation,
            external=external,
            val_labels=run.data.val_labels,
            recorded=sorted((key, value) for key, value in info.metrics.items() if key.startswith("val_")),
            uncalibrated=[finding for finding in info.findings if finding not in info.calibration],
            without_threshold=[finding for finding in info.findings if finding not in info.thresholds],
            unscored=[finding for finding, row in scores.items() if row["auroc"] is None],
            origin=_origin(info, origin),
        )
    )


def description(card: str) -> str:
    """As much of the card as MLflow shows beside a version: all but the table of every finding."""
    text = card.partition("\n## Every finding")[0]
    rest = f"\n\nThe whole card is the artifact {FILE}."
    return text[: LONGEST - len(rest)] + rest


def _data(info: CheckpointInfo, origin: Mapping[str, str], data: DatasetCard | None) -> list[tuple[str, str]]:
    """What is known of the images that were trained on."""
    reduced = f", reduced to {info.pixels.reduce_to} first" if info.pixels.reduce_to else ""
    known = [
        ("data set", data.name if data else origin.get("data.name", "not at hand when this version was registered")),
        ("digest", info.data_digest),
        ("images", f"grey, {info.image_size} x {info.image_size} pixels, {info.pixels.fit}{reduced}"),
    ]
    if data:
        known.append(("split", f"by patient, {data.split.by}"))
    return known


def _origin(info: CheckpointInfo, origin: Mapping[str, str]) -> list[tuple[str, str]]:
    """Where it comes from, for people."""
    named = [(key.removeprefix("lineage."), value) for key, value in origin.items() if key.startswith("lineage.")]
    versions = ", ".join(f"{name} {version}" for name, version in info.versions.items())
    return [
        *named,
        ("step", f"{info.step}, epoch {info.epoch:g}"),
        ("git commit", info.git_commit or "unknown"),
        ("versions", versions or "unknown"),
    ]


def _environment() -> Environment:
    environment = Environment(  # Markdown, not HTML: nothing is escaped
        loader=PackageLoader("tuning", "template"), undefined=StrictUndefined, keep_trailing_newline=True
    )
    environment.filters |= {"number": _number, "span": _span}
    return environment


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _span(bounds: tuple[float, float] | None) -> str:
    return "–" if bounds is None else f"{bounds[0]:.3f} to {bounds[1]:.3f}"
