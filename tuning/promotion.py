"""Which version is the champion: through a gate that scores both on the same images, and back again."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from mlflow.tracking import MlflowClient

from mpc.errors import UserError
from pipeline.card import read_card
from pipeline.config import EvaluateConfig
from pipeline.evaluate import evaluate
from tuning.gate import Decision, Evidence, Gate, Verdict
from tuning.registry import CHAMPION, DIGEST_TAG, PREVIOUS, download, holder_of, uri_of, version_of
from tuning.store import existing_client, explained

HISTORY_TAG, KEPT = "champion.history", 500
"""Tag of a model with the numbers of its former champions, the latest last, and how many of them are kept."""


class Rollback(NamedTuple):
    """Which version is champion again, which no longer is, and which were passed over because they were deleted."""

    back: str
    gone: str
    deleted: tuple[str, ...]


def promote(
    name: str,
    version: str | int,
    tracking_uri: str,
    *,
    gate: Gate,
    data: str | None = None,
    split: str = "val",
    config: EvaluateConfig | None = None,
    batch_size: int = 128,
) -> Verdict:
    """Points `champion` at a version if the gate accepts it; `previous` then points at the one before.

    Decision, reason and what they rest on become tags of the version, whatever the decision, in place of those
    of an earlier one.

    Args:
        name: of the model.
        version: number.
        tracking_uri: server or database.
        gate: what judges.
        data: URI of a prepared data set on which version and champion are scored; only a gate of kind `none` can do
            without.
        split: of it.
        config: resamples, level, map of findings.
        batch_size: images at a time.

    Raises:
        UserError: no such model or version, no data to judge on, data that do not fit, another champion since, or
            a registry that fails.
    """
    with explained(tracking_uri):
        client = existing_client(tracking_uri)
        new = version_of(client, name, str(version))
        champion = holder_of(client, name, CHAMPION)
    if gate.kind == "none":
        verdict, tags = Verdict(Decision.ACCEPT, "promoted without a gate"), {}
    elif data is None:
        raise UserError(
            f"{uri_of(new)}: promote scores version and champion on the same images: add --data, or set gate.kind=none"
        )
    else:
        score = partial(_score, data=data, split=split, config=config or EvaluateConfig(), batch_size=batch_size)
        evidence = _evidence(new, champion, tracking_uri, score, read_card(data).digest)
        verdict, tags = gate.judge(evidence), _tags(evidence, gate)
    with explained(tracking_uri):
        if verdict.decision is Decision.ACCEPT:
            _require_still(client, name, champion)
        _judged(client, new, {**tags, "gate.decision": verdict.decision.value, "gate.reason": verdict.reason})
        if verdict.decision is Decision.ACCEPT:
            _crown(client, new, champion)
    return verdict


def rollback(name: str, tracking_uri: str) -> Rollback:
    """Points `champion` back at the version before, without a gate: it has been champion already.

    Each promotion adds to the history that this walks back along; one that was rolled back is no part of it any more.

    Raises:
        UserError: no such model, nothing to go back to, or a registry that fails.
    """
    with explained(tracking_uri):
        client = existing_client(tracking_uri)
        old, past = holder_of(client, name, CHAMPION), _past(client, name)
        kept = [] if old is None else _reachable(client, name, past, str(old.version))
        if old is None or not kept:
            raise UserError(f"{name} has no champion before this one to go back to; promote a version by its number")
        back = version_of(client, name, kept[-1])
        text = f"rolled back from version {old.version} to version {back.version}"
        for version in (old, back):
            _record(client, version, {"champion.rollback": text})
        client.set_registered_model_alias(name, CHAMPION, back.version)
        _lay_back(client, name, kept[:-1], kept[-1])
    deleted = tuple(number for number in past[len(kept) :] if number != str(old.version))
    return Rollback(kept[-1], str(old.version), deleted)


Score = Callable[[Path, Path | None, str | None], dict[str, Any]]


def _evidence(new: Any, champion: Any | None, tracking_uri: str, score: Score, digest: str) -> Evidence:
    """Scores the version, beside the champion if that is another one."""
    rival = champion if champion is not None and champion.version != new.version else None
    ours = download(uri_of(new), tracking_uri)
    theirs = None if rival is None else download(uri_of(rival), tracking_uri)
    metrics = score(ours, theirs, None if rival is None else uri_of(rival))
    strange = [str(item.version) for item in (new, rival) if item is not None and item.tags.get(DIGEST_TAG) != digest]
    note = (
        f"trained on another data set: version {' and '.join(strange)}; see that none of its patients is among these"
        if strange
        else ""
    )
    return Evidence(str(new.version), metrics, None if champion is None else str(champion.version), note)


def _score(
    ours: Path, theirs: Path | None, name: str | None, *, data: str, split: str, config: EvaluateConfig, batch_size: int
) -> dict[str, Any]:
    """The content of metrics.json; predictions, which name patients, go with the folder."""
    with TemporaryDirectory(prefix="mpc-cxr-") as folder:
        compared = config.model_copy(update={"compare": name})
        rival = None if theirs is None else str(theirs)
        return evaluate(ours, data, split, folder, batch_size, config=compared, rival=rival)


def _tags(evidence: Evidence, gate: Gate) -> dict[str, str]:
    """What the decision rests on."""
    metrics = evidence.metrics
    tags = {
        "gate.split": metrics["split"],
        "gate.data_digest": metrics["data_digest"],
        "gate.images": str(metrics["n_images"]),
        "gate.patients": str(metrics["n_patients"]),
        "gate.settings": gate.model_dump_json(),
        f"gate.{gate.metric}": repr(metrics["macro"][gate.metric]),
    }
    if "comparison" in metrics:
        found = metrics["comparison"]["macro"]
        tags["gate.champion"] = evidence.champion or ""
        tags["gate.difference"] = repr(found[gate.metric])
        tags["gate.interval"] = repr(found[f"{gate.metric}_interval"])
    return tags


def _judged(client: MlflowClient, version: Any, tags: Mapping[str, str]) -> None:
    """Writes what a decision says and rests on in place of what an earlier one left."""
    for key in version.tags:
        if key.startswith("gate.") and key not in tags:
            client.delete_model_version_tag(version.name, version.version, key)
    _record(client, version, tags)


def _record(client: MlflowClient, version: Any, tags: Mapping[str, str]) -> None:
    for key, value in tags.items():
        client.set_model_version_tag(version.name, version.version, key, value)


def _require_still(client: MlflowClient, name: str, champion: Any | None) -> None:
    """Refuses to replace a champion that the version was not compared with, because another one was promoted since."""
    now = holder_of(client, name, CHAMPION)
    before, after = (None if version is None else str(version.version) for version in (champion, now))
    if before != after:
        raise UserError(
            f"{name}: the champion was version {before or 'none'} when scoring began and is version {after or 'none'} "
            f"now; promote again, against that one"
        )


def _crown(client: MlflowClient, new: Any, champion: Any | None) -> None:
    """Makes a version champion; the way back is laid first, so that a champion never stands without it."""
    past = _past(client, new.name)
    if champion is not None and champion.version != new.version:
        past.append(str(champion.version))
    _lay_back(client, new.name, past, str(new.version))
    client.set_registered_model_alias(new.name, CHAMPION, new.version)


def _past(client: MlflowClient, name: str) -> list[str]:
    """The numbers of former champions, the latest last."""
    return [number for number in client.get_registered_model(name).tags.get(HISTORY_TAG, "").split(",") if number]


def _reachable(client: MlflowClient, name: str, past: list[str], champion: str) -> list[str]:
    """`past` up to the latest version that is another than the champion and was not deleted."""
    there = {str(version.version) for version in client.search_model_versions(f"name = '{name}'")} - {champion}
    return past[: max((place for place, number in enumerate(past, 1) if number in there), default=0)]


def _lay_back(client: MlflowClient, name: str, past: list[str], champion: str) -> None:
    """Writes the history of a champion, and points `previous` at the version that a rollback would take."""
    kept = _reachable(client, name, past, champion)[-KEPT:]
    client.set_registered_model_tag(name, HISTORY_TAG, ",".join(kept))
    if kept:
        client.set_registered_model_alias(name, PREVIOUS, kept[-1])
    else:
        client.delete_registered_model_alias(name, PREVIOUS)
