"""Looks at what a run needs before it starts: versions, processors, disk, storage, tracking."""

import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit
from uuid import uuid4

from infra.settings import Settings
from mpc.errors import UserError

FREE_GIB = 5.0
"""Free disk below which a demo or a small run may fail: checkpoints, Ray's spill files, MLflow."""
FULL_SHARE = 0.95
"""Ray refuses to spill objects on a disk that is fuller than this."""
GIB = 2**30


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was checked."""

    name: str
    ok: bool
    found: str
    remedy: str = ""
    """What to do; empty where all is well."""


def examine(settings: Settings, data: str | None, out: str, tracking: str) -> list[Finding]:
    """Every check in order; nothing is left behind.

    Args:
        settings: what a run would use.
        data: data set to read, or None.
        out: place to write.
        tracking: URI of the tracking store.
    """
    found = [python(), libraries(), processors(settings), accelerator(settings), disk(out), writable(out)]
    if data is not None:
        found.append(readable(data))
    return [*found, reachable(tracking)]


def python() -> Finding:
    """The interpreter's version."""
    version = ".".join(str(part) for part in sys.version_info[:3])
    return Finding("python", sys.version_info >= (3, 11), version, "install Python 3.11 or later")


def libraries() -> Finding:
    """Versions of what shapes a result; a missing one fails."""
    from pipeline.versions import PACKAGES, versions

    have = versions()
    missing = [name for name in PACKAGES if name not in have]
    text = ", ".join(f"{name} {have[name]}" for name in PACKAGES if name in have)
    return Finding("libraries", not missing, text, f"missing: {', '.join(missing)}; run `uv sync --locked`")


def processors(settings: Settings) -> Finding:
    """Whether the workers and their data tasks fit beside each other (else Ray waits for ever)."""
    have = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    need = settings.train.least_workers * settings.worker_cpus + settings.cpus_beside
    remedy = f"one run asks for {need:g}; lower train.num_workers, train.worker_cpus or data.task_cpus"
    return Finding("processors", have >= need, f"{have:g} CPUs for {need:g}", remedy)


def accelerator(settings: Settings) -> Finding:
    """Whether a GPU is there if the settings ask for one."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    names = ", ".join(torch.cuda.get_device_name(index) for index in range(count))
    remedy = "set train.use_gpu=false, or install a driver that torch sees"
    return Finding("accelerator", count > 0 or not settings.train.use_gpu, names or "none, CPU only", remedy)


def disk(out: str) -> Finding:
    """Free space where results and Ray's own files go."""
    places = {"temporary files": Path(os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp")}
    if "://" not in out:
        places["--out"] = _existing(Path(out))
    usage = {name: shutil.disk_usage(place) for name, place in places.items()}
    text = ", ".join(f"{use.free / GIB:.1f} GiB free for {name}" for name, use in usage.items())
    fit = all(use.free >= FREE_GIB * GIB and use.used / use.total < FULL_SHARE for use in usage.values())
    return Finding("disk", fit, text, f"free at least {FREE_GIB:g} GiB and keep the disk below 95 % full")


def writable(out: str) -> Finding:
    """Writes, reads and deletes a small file under `out`."""
    from pipeline import storage

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
    from pipeline import storage
    from pipeline.card import read_card

    try:
        card = read_card(data)
        absent = [shard.path for shard in card.shards if not storage.exists(storage.join(data, shard.path))]
    except UserError as error:
        return Finding("read", False, data, str(error))
    text = f"{card.name}: {sum(shard.rows for shard in card.shards):,} images in {len(card.shards)} shards"
    return Finding("read", not absent, text, f"{len(absent)} shards are missing, first {absent[:1]}; prepare it again")


def reachable(tracking: str) -> Finding:
    """Asks the tracking store for one experiment; a database that does not exist yet is well."""
    parts = urlsplit(tracking)
    shown = parts.hostname or tracking
    if parts.scheme == "sqlite" and not Path(tracking.removeprefix("sqlite:///")).exists():
        return Finding("tracking", True, f"{shown} (made at the first run)")
    from tuning.store import client_of

    try:
        client_of(tracking).search_experiments(max_results=1)
    except Exception as error:  # the client raises what its transport raises; each means the same here
        remedy = "start the server or mend tracking.uri / MLFLOW_TRACKING_URI; runs go on without it, see sync"
        return Finding("tracking", False, shown, f"{str(error).splitlines()[0][:160]}; {remedy}")
    return Finding("tracking", True, shown)


def _existing(path: Path) -> Path:
    """The path itself, or the nearest folder above it that exists."""
    return next(place for place in (path.absolute(), *path.absolute().parents) if place.exists())
