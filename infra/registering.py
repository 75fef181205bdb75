"""Registering and promoting as a person starts them: with what the settings say, and on the images that he names."""

from pathlib import Path
from tempfile import TemporaryDirectory

from infra.settings import Settings
from infra.tracking import tracking_uri
from mpc.checkpoint import read_info
from pipeline.card import read_card
from pipeline.evaluate import evaluate
from tuning import promotion, registry
from tuning.gate import Verdict
from tuning.lineage import lineage_of
from tuning.registry import RegisteredVersion


def register(
    settings: Settings,
    source: str,
    checkpoint: Path,
    name: str,
    data: str | None,
    split: str,
    *,
    tracking: str | None = None,
) -> tuple[RegisteredVersion, str]:
    """Registers a checkpoint, scored on a split of `data` if that is given; the version, and where it is.

    Args:
        settings: sections tracking, evaluate and train.
        source: path or URI of the checkpoint, beside which its run and its search have left their records.
        checkpoint: local folder of it.
        name: of the model.
        data: URI of a prepared data set, or None.
        split: of it.
        tracking: URI of the store; None takes the settings' own, else one near the checkpoint.
    """
    uri = tracking or tracking_uri(settings, near=source)
    evaluation, card = None, read_card(data) if data else None
    if data:
        with TemporaryDirectory(prefix="mpc-cxr-") as folder:  # predictions name patients: they go with the folder
            evaluation = evaluate(
                checkpoint, data, split, folder, settings.train.eval_batch_size, config=settings.evaluate
            )
    trained_on = read_info(checkpoint).data_digest
    version = registry.register(
        checkpoint,
        name,
        uri,
        lineage=lineage_of(source),
        evaluation=evaluation,
        data=card if card and card.digest == trained_on else None,
        experiment=settings.tracking.experiment,
    )
    return version, uri


def promote(
    settings: Settings, name: str, version: int | str, data: str | None, split: str, *, tracking: str | None = None
) -> Verdict:
    """What the gate says of a version on a split of `data`.

    Args:
        settings: sections tracking, gate, evaluate and train.
        name: of the model.
        version: its number.
        data: URI of a prepared data set; only gate.kind=none can do without.
        split: of it.
        tracking: URI of the store; None takes the settings' own.
    """
    return promotion.promote(
        name,
        version,
        tracking or tracking_uri(settings),
        gate=settings.gate,
        data=data,
        split=split,
        config=settings.evaluate,
        batch_size=settings.train.eval_batch_size,
    )
