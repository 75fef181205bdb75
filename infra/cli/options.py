"""The flags that verbs share, and what they mean for all of them."""

import atexit
import logging
import os
import shutil
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from infra.settings import Settings, load
from infra.tracking import tracking_uri
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
    str | None, typer.Option("--checkpoint", metavar="URI", help="Checkpoint that training wrote, such as OUT/best.")
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
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "1" if verbose else "0")  # Tune's own tables; the old way is silent
    level = logging.INFO if verbose else logging.WARNING
    logging.basicConfig(level=level, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    if not verbose:  # it tells each retry in two lines; who asked tells the failure in one
        logging.getLogger("urllib3").setLevel(logging.ERROR)


def start_ray(verbose: bool) -> None:
    """With -v, starts Ray so that its workers' logs are shown; else the rooms start it once the input is sound."""
    if verbose:
        from pipeline import runtime

        runtime.start(verbose=True)


def claim(out: str, resume: bool = False) -> str:
    """`out`, once it is known to be free for a new run, or to be continued.

    Raises:
        UserError: it holds something and --resume was not given, or it is a file.
    """
    if resume:
        return out
    from pipeline import storage

    if storage.size(out) is not None:
        raise UserError(f"--out {out}: is a file that exists; name another place")
    if not storage.is_empty(out):
        raise UserError(f"--out {out}: is not empty; name another folder, or add --resume to continue what it holds")
    return out


def checkpoint_of(checkpoint: str | None, model: str | None, settings: Settings, near: str = ".") -> Path:
    """The local checkpoint folder behind --checkpoint or --model; exactly one of them must be given."""
    if (checkpoint is None) == (model is None):
        raise UserError("needs one of --checkpoint FOLDER and --model models:/NAME@champion; give exactly one")
    if model is not None:
        from tuning import registry

        return registry.download(model, tracking_uri(settings, near))
    assert checkpoint is not None
    return fetch(checkpoint)


def fetch(checkpoint: str) -> Path:
    """The checkpoint as a local folder; one in object storage is copied for as long as this process lives."""
    from pipeline import storage

    if not storage.exists(storage.join(checkpoint, "checkpoint.json")):
        raise MissingError(f"--checkpoint {checkpoint}: holds no checkpoint.json; name a folder such as OUT/best")
    if not storage.is_remote(checkpoint):
        return Path(storage.absolute(checkpoint))
    folder = Path(tempfile.mkdtemp(prefix="mpc-cxr-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    for file in storage.list_files(checkpoint):
        (folder / storage.name(file)).write_bytes(storage.read_bytes(file))
    return folder
