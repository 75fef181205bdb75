"""The model registry on MLflow: register a checkpoint, promote a version through a gate, fetch one as a checkpoint."""

import atexit
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp
from typing import Any, NamedTuple

from mlflow.artifacts import download_artifacts, list_artifacts
from mlflow.entities import Metric
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from mpc.checkpoint import INFO, read_info
from mpc.config import CheckpointInfo
from mpc.errors import MissingError, UserError
from mpc.reference import FILE as REFERENCE
from pipeline.inference import REGISTERED_FILE
from tuning.gate import Candidate, Decision, Gate, Verdict
from tuning.package import WEIGHTS, write_package
from tuning.record import Status, finite
from tuning.store import client_of, experiment_id

CHAMPION = "champion"
METRIC_TAG, DIGEST_TAG = "metric.", "metric_data.digest"
URI = re.compile(r"models:/(?P<name>[^/@:]+)(?:/(?P<version>\d+)|@(?P<alias>[^/@:]+))")
NAME = re.compile(r"[^/:@\s]+")


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
    run_id: str | None = None,
    metrics: Mapping[str, Any] | None = None,
    data_digest: str | None = None,
    tags: Mapping[str, str] | None = None,
    experiment: str = "mpc-cxr",
) -> RegisteredVersion:
    """Makes a checkpoint a new version of the registered model `name`, which is made where it is missing.

    Args:
        checkpoint: local folder.
        name: of the model.
        tracking_uri: server or database.
        run_id: MLflow run that trained it; None makes a run for the version.
        metrics: that the gate compares, e.g. `{"test_macro_auroc": 0.83}`; those of the checkpoint are always there.
        data_digest: data set that all metrics were measured on; None takes the checkpoint's.
        tags: further tags of the version.
        experiment: of a run that is made here.

    Raises:
        UserError: a name that MLflow does not take, no checkpoint there, or a registry that fails.
    """
    if not NAME.fullmatch(name):
        raise UserError(f"model name {name!r}: use one word without / : @, such as mpc-cxr")
    info = read_info(checkpoint)
    values = finite({**info.metrics, **(metrics or {})})
    client = client_of(tracking_uri)
    with TemporaryDirectory(prefix="mpc-cxr-") as work, _explained(tracking_uri):
        write_package(checkpoint, info, Path(work) / "model")
        where = experiment_id(client, tracking_uri, experiment)
        run = client.get_run(run_id) if run_id else client.create_run(where, run_name=f"register {name}")
        model = client.create_logged_model(run.info.experiment_id, name=name, source_run_id=run.info.run_id)
        client.log_model_artifacts(model.model_id, str(Path(work) / "model"))
        client.finalize_logged_model(model.model_id, "READY")
        if run_id is None:
            client.log_batch(run.info.run_id, metrics=[Metric(key, value, 0, 0) for key, value in values.items()])
            client.set_terminated(run.info.run_id, Status.FINISHED.value)
        _ensure_model(client, name)
        # the place itself: MLflow resolves models:/m-ID through its global tracking URI, which we leave alone
        version = client.create_model_version(
            name,
            source=model.artifact_location,
            run_id=run.info.run_id,
            model_id=model.model_id,
            tags={**_tags(info, values, data_digest), **(tags or {})},
        )
    return RegisteredVersion(name, str(version.version), f"models:/{name}/{version.version}")


def promote(
    name: str,
    version: str | int,
    tracking_uri: str,
    *,
    alias: str = CHAMPION,
    gate: Gate | None = None,
) -> Verdict:
    """Points `alias` at a version if the gate accepts it; decision and reason become tags of the version.

    Args:
        name: of the model.
        version: number.
        tracking_uri: server or database.
        alias: that moves.
        gate: what judges; None lets every version through, and says so.

    Raises:
        UserError: no such model or version, or a registry that fails.
    """
    client = client_of(tracking_uri)
    with _explained(tracking_uri):
        new = _candidate(_version(client, name, str(version)))
        holder = _holder(client, name, alias)
        verdict = (
            gate.judge(new, _candidate(holder) if holder else None)
            if gate
            else Verdict(Decision.ACCEPT, "promoted without a gate")
        )
        for key, value in {"gate.decision": verdict.decision.value, "gate.reason": verdict.reason}.items():
            client.set_model_version_tag(name, new.version, key, value)
        if verdict.decision is Decision.ACCEPT:
            client.set_registered_model_alias(name, alias, new.version)
    return verdict


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
    client = client_of(tracking_uri)
    name = match["name"]
    with _explained(tracking_uri):
        version = (
            _version(client, name, match["version"]) if match["version"] else _aliased(client, name, match["alias"])
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


class _explained:  # noqa: N801
    """Turns what MLflow raises into one line for the user."""

    def __init__(self, tracking_uri: str) -> None:
        self.tracking_uri = tracking_uri

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        if isinstance(error, MlflowException):
            text = " ".join(str(error).split())[:300]
            raise UserError(f"MLflow at {self.tracking_uri}: {text}; check the address and that it runs") from error


def _tags(info: CheckpointInfo, metrics: Mapping[str, float], data_digest: str | None) -> dict[str, str]:
    """What a version says about itself; the gate reads the metrics from here."""
    return {
        **{f"{METRIC_TAG}{key}": repr(value) for key, value in metrics.items()},
        DIGEST_TAG: data_digest or info.data_digest,
        "data.digest": info.data_digest,
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


def _candidate(version: Any) -> Candidate:
    """The gate's view of a version."""
    tags = version.tags
    metrics = {key.removeprefix(METRIC_TAG): float(tags[key]) for key in tags if key.startswith(METRIC_TAG)}
    return Candidate(str(version.version), metrics, tags.get(DIGEST_TAG, ""))


def _holder(client: MlflowClient, name: str, alias: str) -> Any | None:
    """The version that an alias points at; None where it points nowhere."""
    number = client.get_registered_model(name).aliases.get(alias)
    return None if number is None else client.get_model_version(name, str(number))


def _aliased(client: MlflowClient, name: str, alias: str) -> Any:
    """The version behind an alias; UserError names the aliases that exist."""
    _known(client, name)
    found = _holder(client, name, alias)
    if found is None:
        aliases = ", ".join(sorted(client.get_registered_model(name).aliases)) or "none"
        raise MissingError(f"models:/{name}@{alias}: no such alias; {name} has {aliases}; promote a version first")
    return found


def _version(client: MlflowClient, name: str, version: str) -> Any:
    """A version by number; UserError names those that exist."""
    _known(client, name)
    versions = {str(item.version): item for item in client.search_model_versions(f"name = '{name}'")}
    if version not in versions:
        have = ", ".join(sorted(versions, key=int)) or "none"
        raise MissingError(f"models:/{name}/{version}: no such version; {name} has {have}")
    return client.get_model_version(name, version)


def _known(client: MlflowClient, name: str) -> None:
    """UserError, with the models that exist, unless `name` is registered."""
    names = [model.name for model in client.search_registered_models()]
    if name not in names:
        raise MissingError(
            f"no registered model {name!r}; there are: {', '.join(sorted(names)[:10]) or 'none'}; register one first"
        )
