"""The flags that verbs share, and what they mean for all of them."""

import logging
import os
from pathlib import Path
from typing import Annotated

import typer

from infra.settings import Settings, load
from mpc.errors import MissingError, UserError

Config = Annotated[
    str | None,
    typer.Option("--config", metavar="PRESET|FILE", help="Preset (see `config presets`) or YAML file of settings."),
]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="A.B=C", help="Override one setting, e.g. optim.lr=1e-4; may be repeated."),
]
Data = Annotated[str, typer.Option("--data", metavar="URI", help="Prepared data set: a folder or s3://bucket/prefix.")]
Out = Annotated[str, typer.Option("--out", metavar="URI", help="Folder for the results; empty unless --resume.")]
Checkpoint = Annotated[
    Path | None, typer.Option("--checkpoint", metavar="FOLDER", help="Checkpoint folder that training wrote.")
]
Model = Annotated[
    str | None,
    typer.Option("--model", metavar="URI", help="Registered model: models:/NAME@champion or models:/NAME/3."),
]
Resume = Annotated[bool, typer.Option("--resume", help="Continue what --out holds; start where it holds nothing.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check everything and show the plan; write nothing.")]
Verbose = Annotated[bool, typer.Option("-v", help="Show logs, and the traceback of an error.")]


def settings_of(config: str | None, overrides: list[str] | None, verbose: bool = False) -> Settings:
    """The settings that --config and --set describe; -v turns logs on for this process."""
    set_logs(verbose)
    return load(config, overrides or ())


def set_logs(verbose: bool) -> None:
    """Warnings alone on stderr, or, with -v, what the libraries tell as well."""
    os.environ.setdefault("RAY_DATA_LOG_LEVEL", "INFO" if verbose else "ERROR")  # read when ray.data is imported
    level = logging.INFO if verbose else logging.WARNING
    logging.basicConfig(level=level, format="%(asctime)s %(name)s %(levelname)s %(message)s")


def claim(out: str, resume: bool) -> str:
    """`out`, once it is known to be free for a new run, or to be continued.

    Raises:
        UserError: it holds something and --resume was not given, or it is a file.
    """
    if resume:
        return out
    from pipeline import storage

    if "://" not in out and Path(out).is_file():
        raise UserError(f"--out {out}: is a file; name a folder")
    if not storage.is_empty(out):
        raise UserError(f"--out {out}: is not empty; name another folder, or add --resume to continue what it holds")
    return out


def checkpoint_of(checkpoint: Path | None, model: str | None, settings: Settings, near: str | Path = ".") -> Path:
    """The checkpoint folder behind --checkpoint or --model; exactly one of them must be given."""
    if (checkpoint is None) == (model is None):
        raise UserError("needs one of --checkpoint FOLDER and --model models:/NAME@champion; give exactly one")
    if checkpoint is not None:
        if not (checkpoint / "checkpoint.json").is_file():
            raise MissingError(
                f"--checkpoint {checkpoint}: holds no checkpoint.json; name a folder such as OUT/checkpoints/best"
            )
        return checkpoint
    assert model is not None
    from tuning import registry

    return registry.download(model, tracking_uri(settings, near))


def tracking_uri(settings: Settings, near: str | Path = ".") -> str:
    """The tracking store: `tracking.uri`, else MLFLOW_TRACKING_URI, else the nearest mlflow.db at or above `near`.

    Where there is none, it is the one that would be made in `near`.
    """
    from tuning.store import default_uri

    if settings.tracking.uri:
        return settings.tracking.uri
    start = str(near)
    if "://" not in start:
        places = (Path(start).resolve(), *Path(start).resolve().parents)
        start = str(next((place for place in places if (place / "mlflow.db").is_file()), start))
    return default_uri(start)
