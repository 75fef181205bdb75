"""Storage on this machine, a data set anywhere, tracking server and registry."""

import os
from pathlib import Path
from urllib.parse import urlsplit
from uuid import uuid4

from infra.doctor.finding import Finding
from mpc.errors import UserError
from pipeline import storage

PATIENCE = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "20"}
"""By default MLflow's client asks a server that is away for minutes."""


def writable(out: str) -> Finding:
    """Writes, reads and deletes a small file under a local `out`."""
    probe = storage.join(out, f".mpc-cxr-doctor-{uuid4().hex}")
    try:
        storage.write_bytes(probe, b"probe")
        same = storage.read_bytes(probe) == b"probe"
        storage.delete(probe)
    except UserError as error:
        return Finding("write", False, out, str(error))
    return Finding("write", same, out, "the storage returns other bytes than were written; do not use it")


def readable(data: str) -> Finding:
    """Reads the dataset card and asks for every shard that it names."""
    from pipeline.card import read_card

    try:
        card = read_card(data)
        absent = [shard.path for shard in card.shards if not storage.exists(storage.join(data, shard.path))]
    except UserError as error:
        return Finding("read", False, data, str(error))
    text = f"{card.name}: {sum(shard.rows for shard in card.shards):,} images in {len(card.shards)} shards"
    return Finding("read", not absent, text, f"{len(absent)} shards are missing, first {absent[:1]}; prepare it again")


def reachable(tracking: str) -> list[Finding]:
    """Asks the tracking store for one experiment and the registry for one model; a database yet to be made is well."""
    parts = urlsplit(tracking)
    shown = parts.hostname or tracking
    if parts.scheme == "sqlite" and not Path(tracking.removeprefix("sqlite:///")).exists():
        return [Finding("tracking", True, f"{shown} (made at the first run)")]
    from tuning.store import client_of

    for name, value in PATIENCE.items():
        os.environ.setdefault(name, value)
    found: list[Finding] = []
    remedy = "start the server or mend tracking.uri / MLFLOW_TRACKING_URI; runs go on without it, see sync"
    for name, asked in (("tracking", "search_experiments"), ("registry", "search_registered_models")):
        try:
            getattr(client_of(tracking), asked)(max_results=1)
        except Exception as error:  # the client raises what its transport raises; each means the same here
            return [*found, Finding(name, False, shown, f"{first_cause(error)}; {remedy}")]
        found.append(Finding(name, True, shown))
    return found


def first_cause(error: BaseException) -> str:
    """What the innermost of the errors says: the system's own word instead of three clients' wrappings of it."""
    while cause := error.__cause__ or (None if error.__suppress_context__ else error.__context__):
        error = cause
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
