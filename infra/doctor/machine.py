"""One machine: interpreter, libraries, processors, GPU, disk."""

import os
import shutil
import sys
from pathlib import Path

from infra.doctor.finding import Finding
from infra.settings import Settings

FREE_GIB = 5.0
"""Free disk below which a demo or a small run may fail: checkpoints, Ray's spill files, MLflow."""
FULL_SHARE = 0.95
"""Ray refuses to spill objects on a disk that is fuller than this."""
GIB = 2**30


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


def resources() -> dict[str, float]:
    """CPUs and GPUs of this machine, by the names that Ray gives them."""
    import torch

    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return {"CPU": float(cpus), "GPU": float(gpus)}


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


def _existing(path: Path) -> Path:
    """The path itself, or the nearest folder above it that exists."""
    return next(place for place in (path.absolute(), *path.absolute().parents) if place.exists())
