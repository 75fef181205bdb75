"""Whether a model and a data set speak of the same things: pixels, and findings, by name or by a map of names."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from mpc.config import CheckpointInfo
from mpc.errors import UserError
from pipeline.card import DatasetCard
from pipeline.scoring import Scored


@dataclass(frozen=True)
class Pairing:
    """Which outputs of the model are scored against which labels of the data set."""

    scored: dict[str, str]
    """The model's name -> the data set's, in the model's order."""
    model_only: tuple[str, ...]
    """Findings of the model that the data set has no labels for."""
    data_only: tuple[str, ...]
    """Findings of the data set that the model does not know."""
    outputs: tuple[int, ...]
    labels: tuple[int, ...]

    @property
    def findings(self) -> tuple[str, ...]:
        """What is scored, by the model's names."""
        return tuple(self.scored)

    def of(self, scored: Scored) -> Scored:
        """The columns that belong together, in the order of `findings`."""
        outputs, labels = list(self.outputs), list(self.labels)
        logits, truth, known = scored.logits[:, outputs], scored.labels[:, labels], scored.known[:, labels]
        return scored._replace(
            logits=np.ascontiguousarray(logits), labels=np.ascontiguousarray(truth), known=np.ascontiguousarray(known)
        )

    def summary(self) -> dict[str, Any]:
        """What metrics.json says about it."""
        return {"scored": self.scored, "model_only": list(self.model_only), "data_only": list(self.data_only)}


def check_match(info: CheckpointInfo, card: DatasetCard, model: str, data: str) -> None:
    """Raises UserError unless data and checkpoint speak of the same findings and the same pixels."""
    if info.findings != card.findings:
        differ = sorted(set(info.findings) ^ set(card.findings))
        raise UserError(
            f"{model} has {len(info.findings)} findings, {data} has {len(card.findings)}; "
            f"{'they differ in ' + ', '.join(differ[:5]) if differ else 'their order differs'}; "
            f"prepare the data set with prepare.findings of the checkpoint, or set evaluate.finding_map"
        )
    check_pixels(info, card, model, data)


def pair(info: CheckpointInfo, card: DatasetCard, names: Mapping[str, str] | None, model: str, data: str) -> Pairing:
    """Pairs findings by equal names and by `names`, the model's -> the data set's; None demands that all are equal.

    Args:
        info: of the checkpoint.
        card: of the data set.
        names: `evaluate.finding_map`.
        model: the checkpoint, for messages.
        data: the data set, for messages.

    Raises:
        UserError: findings or pixels that do not match, or a map with names that neither side has.
    """
    if names is None:
        check_match(info, card, model, data)
        names = {}
    check_pixels(info, card, model, data)
    strange = next((name for name in names if name not in info.findings), None)
    if strange is not None:
        raise UserError(f"evaluate.finding_map: {model} has no finding {strange!r}; it has {', '.join(info.findings)}")
    strange = next((name for name in names.values() if name not in card.findings), None)
    if strange is not None:
        raise UserError(f"evaluate.finding_map: {data} has no finding {strange!r}; it has {', '.join(card.findings)}")
    scored = {ours: theirs for ours in info.findings if (theirs := names.get(ours, ours)) in card.findings}
    taken = list(scored.values())
    twice = next((theirs for theirs in taken if taken.count(theirs) > 1), None)
    if twice is not None:
        both = ", ".join(ours for ours, theirs in scored.items() if theirs == twice)
        raise UserError(f"evaluate.finding_map: {twice!r} of {data} stands for {both}; map each finding once")
    if not scored:
        raise UserError(f"{model} and {data} share no finding; map them with evaluate.finding_map")
    return Pairing(
        scored,
        tuple(name for name in info.findings if name not in scored),
        tuple(name for name in card.findings if name not in taken),
        tuple(info.findings.index(name) for name in scored),
        tuple(card.findings.index(name) for name in taken),
    )


def check_pixels(info: CheckpointInfo, card: DatasetCard, model: str, data: str) -> None:
    """Raises UserError unless data and checkpoint hold the same pixels."""
    ours = {"image size": info.image_size, **_stored(info.pixels.model_dump())}
    theirs = {"image size": card.image_size, **_stored(card.pixels.model_dump())}
    for name, value in ours.items():
        if theirs[name] != value:
            raise UserError(
                f"{model} was trained with {name} {value}, {data} holds {name} {theirs[name]}; "
                f"prepare the data set with the checkpoint's {name}"
            )


def _stored(pixels: dict[str, Any]) -> dict[str, Any]:
    """What concerns stored pixels; how the network normalises them is its own affair."""
    return {name: pixels[name] for name in ("encoding", "channels", "dtype", "fit", "reduce_to")}
