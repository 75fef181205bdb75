"""Where MLflow keeps runs and models: addresses, and clients that leave the working directory alone."""

import os
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from sqlalchemy.exc import SQLAlchemyError

from mpc.errors import MissingError, UserError

SCHEMES = ("sqlite", "postgresql", "mysql", "mssql", "http", "https", "databricks")


def default_uri(out: str) -> str:
    """`MLFLOW_TRACKING_URI`, else a database in the folder `out`.

    Raises:
        UserError: `out` is no local folder, and nothing else is configured.
    """
    if uri := os.environ.get("MLFLOW_TRACKING_URI"):
        return uri
    if "://" in out:
        raise UserError(f"--out {out}: MLflow's default database needs a local folder; set MLFLOW_TRACKING_URI")
    return f"sqlite:///{Path(out).resolve() / 'mlflow.db'}"


def check_uri(uri: str) -> str:
    """`uri`, if MLflow can keep runs there.

    Raises:
        UserError: a kind of store that MLflow 3 does not offer, or an address with a password in it.
    """
    parts = urlsplit(uri)
    if parts.scheme.split("+")[0] not in SCHEMES:
        raise UserError(f"tracking URI {uri!r} is no MLflow server or database; use http(s)://... or sqlite:///FILE.db")
    if parts.password:
        raise UserError(
            "the tracking URI holds a password, which would end up in files; "
            "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or the database's own password file"
        )
    return uri


def client_of(uri: str) -> MlflowClient:
    """A client for `uri`; it neither reads nor sets MLflow's global state, so nothing lands in the working directory.

    Raises:
        UserError: as `check_uri` does.
    """
    if file := _file(check_uri(uri)):
        file.parent.mkdir(parents=True, exist_ok=True)
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def existing_client(uri: str) -> MlflowClient:
    """As `client_of`, for whoever only looks something up: MLflow would make an empty database where there is none.

    Raises:
        UserError: as `check_uri` does, or no such database.
    """
    file = _file(check_uri(uri))
    if file and not file.is_file():
        raise MissingError(f"no MLflow store at {uri}; name it with --set tracking.uri=... or MLFLOW_TRACKING_URI")
    return client_of(uri)


def artifact_root(uri: str) -> str | None:
    """Where a new experiment keeps its artifacts: beside a local database; a server decides for itself (None)."""
    file = _file(uri)
    return str(file.parent / "mlartifacts") if file else None


def _file(uri: str) -> Path | None:
    """The file of a local database; None for a server."""
    return Path(uri.split("///", 1)[-1]).resolve() if uri.startswith("sqlite") else None


def experiment_id(client: MlflowClient, uri: str, name: str) -> str:
    """The id of the experiment `name`, which is made where it is missing."""
    found = client.get_experiment_by_name(name)
    if found is not None:
        return str(found.experiment_id)
    try:
        return str(client.create_experiment(name, artifact_location=artifact_root(uri)))
    except MlflowException:  # another process was faster
        found = client.get_experiment_by_name(name)
        if found is None:
            raise
        return str(found.experiment_id)


class explained:  # noqa: N801
    """Turns what MLflow, and the database behind a client of it, raise into one line for the user.

    Args:
        tracking_uri: which MLflow.
        what: what asked it.
    """

    def __init__(self, tracking_uri: str, what: str = "") -> None:
        self.tracking_uri, self.what = tracking_uri, what

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        if isinstance(error, MlflowException | SQLAlchemyError):
            text = " ".join(str(getattr(error, "orig", error)).split())[:300]
            where = f"{self.what}: MLflow" if self.what else "MLflow"
            raise UserError(f"{where} at {self.tracking_uri}: {text}; check the address and that it runs") from error
