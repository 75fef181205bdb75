"""The model registry on MLflow: register a checkpoint as a version, fetch a version as a checkpoint."""

import atexit
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp
from typing import TYPE_CHECKING, Any, NamedTuple

from mlflow.artifacts import download_artifacts, list_artifacts
from mlflow.entities import LoggedModelOutput, Metric
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from mpc.checkpoint import INFO, read_info
from mpc.config import CheckpointInfo
from mpc.errors import MissingError, UserError
from mpc.reference import FILE as REFERENCE
from pipeline.card import DatasetCard
from pipeline.inference import REGISTERED_FILE
from tuning.model_card import FILE as CARD_FILE
from tuning.model_card import description, model_card
from tuning.package import WEIGHTS, write_package
from tuning.record import Status, finite
from tuning.store import client_of, existing_client, experiment_id, explained

if TYPE_CHECKING:  # it imports Ray, which fetching a version does without
    from tuning.lineage import Lineage

CHAMPION, PREVIOUS = "champion", "previous"
METRIC_TAG, DIGEST_TAG = "metric.", "data.digest"
URI = re.compile(r"models:/(?P<name>[^/@:]+)(?:/(?P<version>\d+)|@(?P<alias>[^/@:]+))")
NAME = re.compile(r"[^/:@\s]+")
MISSING = "RESOURCE_DOES_NOT_EXIST"
"""What MLflow calls a model or version that is not there."""
NAMED = 10
"""Models that a message names at most."""


class RegisteredVersion(NamedTuple):
    """A version in the registry."""

    name: str
    version: str
    uri: str
    """`models:/NAME/VERSION`."""


def register(
    checkpoint: Path,
    name: str,
    tracking_uri: str,
    *,
    lineage: "Lineage | None" = None,
    evaluation: Mapping[str, Any] | None = None,
    data: DatasetCard | None = None,
    tags: Mapping[str, str] | None = None,
    experiment: str = "mpc-cxr",
) -> RegisteredVersion:
    """Makes a checkpoint a new version of the registered model `name`, which is made where it is missing.

    Args:
        checkpoint: local folder.
        name: of the model.
        tracking_uri: server or database.
        lineage: run and search that it comes from. Where the server has that run, the version belongs to it; otherwise,
            or without, a run is made for the version.
        evaluation: content of metrics.json, for the model card and the version's tags.
        data: card of the data set that was trained on, for the model card.
        tags: further tags of the version.
        experiment: of the run.

    Raises:
        UserError: a name that MLflow does not take, no checkpoint there, or a registry that fails.
    """
    if not NAME.fullmatch(name):
        raise UserError(f"model name {name!r}: use one word without / : @, such as mpc-cxr")
    info = read_info(checkpoint)
    with TemporaryDirectory(prefix="mpc-cxr-") as work, explained(tracking_uri):
        client = client_of(tracking_uri)
        origin = {**_origin(lineage), **(lineage.tags(client) if lineage else {})}
        card = model_card(name, info, origin=origin, evaluation=evaluation, data=data)
        write_package(checkpoint, info, Path(work) / "model")
        (Path(work) / "model" / CARD_FILE).write_text(card, encoding="utf-8")
        values = finite({**info.metrics, **_scores(evaluation)})
        run_id = origin.get("lineage.run_id")
        run_id = run_id or _own_run(client, experiment_id(client, tracking_uri, experiment), name, values)
        where = client.get_run(run_id).info.experiment_id
        model = client.create_logged_model(where, name=name, source_run_id=run_id)
        client.log_model_artifacts(model.model_id, str(Path(work) / "model"))
        client.finalize_logged_model(model.model_id, "READY")
        client.log_outputs(run_id, [LoggedModelOutput(model.model_id, info.step)])
        _ensure_model(client, name)
        # the place itself: MLflow resolves models:/m-ID through its global tracking URI, which we leave alone
        version = client.create_model_version(
            name,
            source=model.artifact_location,
            run_id=run_id,
            model_id=model.model_id,
            description=description(card),
            tags={**_tags(info, values), **origin, **(tags or {})},
        )
    return RegisteredVersion(name, str(version.version), f"models:/{name}/{version.version}")


def download(uri: str, tracking_uri: str) -> Path:
    """A registered version as a local checkpoint folder (weights and metadata, no code); it goes when Python ends.

    Args:
        uri: `models:/NAME/3` or `models:/NAME@champion`.
        tracking_uri: server or database.

    Raises:
        UserError: another form, an unknown model, version or alias (the message names what exists), or a version that
            this software did not register.
    """
    match = URI.fullmatch(uri)
    if match is None:
        raise UserError(f"{uri!r} is no registered model; write models:/NAME@{CHAMPION} or models:/NAME/VERSION")
    name = match["name"]
    with explained(tracking_uri):
        client = existing_client(tracking_uri)
        version = (
            version_of(client, name, match["version"]) if match["version"] else _aliased(client, name, match["alias"])
        )
        folder = Path(mkdtemp(prefix="mpc-cxr-model-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        source = client.get_model_version_download_uri(name, version.version)
        held = {
            Path(item.path).name
            for item in list_artifacts(f"{source.rstrip('/')}/artifacts", tracking_uri=tracking_uri)
        }
        for part in (WEIGHTS, INFO, *({REFERENCE} & held)):
            try:
                download_artifacts(
                    artifact_uri=f"{source.rstrip('/')}/artifacts/{part}",
                    dst_path=str(folder),
                    tracking_uri=tracking_uri,
                )
            except (MlflowException, OSError) as error:
                raise UserError(
                    f"{uri}: no {part} in it ({str(error).splitlines()[0][:160]}); take a version of `mpc-cxr register`"
                ) from error
    read_info(folder)
    (folder / REGISTERED_FILE).write_text(f"{name}/{version.version}\n", encoding="utf-8")
    return folder


def _own_run(client: MlflowClient, experiment: str, name: str, metrics: Mapping[str, float]) -> str:
    """A run for a version whose training the server has not seen."""
    run_id = str(client.create_run(experiment, run_name=f"register {name}").info.run_id)
    client.log_batch(run_id, metrics=[Metric(key, value, 0, 0) for key, value in metrics.items()])
    client.set_terminated(run_id, Status.FINISHED.value)
    return run_id


def _origin(lineage: "Lineage | None") -> dict[str, str]:
    """What the training run's own record says of its data."""
    tags = lineage.run.tags if lineage and lineage.run else {}
    return {key: tags[key] for key in ("data.name", "data.synthetic") if key in tags}


def _scores(evaluation: Mapping[str, Any] | None) -> dict[str, Any]:
    """The means of an evaluation as metrics, such as `test_macro_auroc`, with the ends of their intervals."""
    if evaluation is None:
        return {}
    found: dict[str, Any] = {}
    for name in ("auroc", "ap"):
        key, bounds = f"{evaluation['split']}_macro_{name}", evaluation["macro"][f"{name}_interval"] or (None, None)
        found |= {key: evaluation["macro"][name], f"{key}_low": bounds[0], f"{key}_high": bounds[1]}
    return found


def _tags(info: CheckpointInfo, metrics: Mapping[str, float]) -> dict[str, str]:
    """What a version says about itself."""
    return {
        **{f"{METRIC_TAG}{key}": repr(value) for key, value in metrics.items()},
        DIGEST_TAG: info.data_digest,
        "findings": ",".join(info.findings),
        "step": str(info.step),
        "git_commit": info.git_commit or "unknown",
    }


def _ensure_model(client: MlflowClient, name: str) -> None:
    """Makes the registered model unless it is there."""
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def uri_of(version: Any) -> str:
    """`models:/NAME/VERSION` of what MLflow holds."""
    return f"models:/{version.name}/{version.version}"


def holder_of(client: MlflowClient, name: str, alias: str) -> Any | None:
    """The version that an alias points at; None where it points nowhere."""
    number = client.get_registered_model(name).aliases.get(alias)
    return None if number is None else client.get_model_version(name, str(number))


def _aliased(client: MlflowClient, name: str, alias: str) -> Any:
    """The version behind an alias; UserError names the aliases that exist."""
    _known(client, name)
    found = holder_of(client, name, alias)
    if found is None:
        aliases = ", ".join(sorted(client.get_registered_model(name).aliases)) or "none"
        raise MissingError(f"models:/{name}@{alias}: no such alias; {name} has {aliases}; promote a version first")
    return found


def version_of(client: MlflowClient, name: str, version: str) -> Any:
    """A version by number; UserError names those that exist."""
    _known(client, name)
    try:
        return client.get_model_version(name, version)
    except MlflowException as error:
        if error.error_code != MISSING:
            raise
    have = sorted((item.version for item in client.search_model_versions(f"name = '{name}'")), key=int)
    raise MissingError(f"models:/{name}/{version}: no such version; {name} has {', '.join(map(str, have)) or 'none'}")


def _known(client: MlflowClient, name: str) -> None:
    """UserError, with some of the models that exist, unless `name` is registered."""
    try:
        client.get_registered_model(name)
    except MlflowException as error:
        if error.error_code != MISSING:
            raise
        names = sorted(model.name for model in client.search_registered_models(max_results=NAMED))
        some = ", ".join(names) or "none"
        raise MissingError(f"no registered model {name!r}; there are: {some}; register one first") from None
