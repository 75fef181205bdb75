"""Which software this is: for checkpoints, dataset cards and tracked runs."""

import os
import platform
import subprocess
from functools import cache
from importlib import metadata
from pathlib import Path

PACKAGES = ("mpc-cxr", "torch", "timm", "ray", "albumentations", "mlflow", "pyarrow", "numpy", "opencv-python-headless")


@cache
def versions() -> dict[str, str]:
    """Version by package of those that shape a result, and of Python; what is not installed is left out."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


@cache
def git_commit() -> str | None:
    """Commit of the checkout that this package runs from, `+changed` appended where files differ; None outside one.

    A job on a cluster, which runs from a wheel, is told the commit by `submit` (MPC_CXR_COMMIT).
    """
    folder = Path(__file__).resolve().parents[1]
    if not (folder / ".git").exists():
        return os.environ.get("MPC_CXR_COMMIT")
    git = ["git", "-C", str(folder)]
    try:
        head, changes = (
            subprocess.check_output([*git, *arguments], text=True, stderr=subprocess.DEVNULL, timeout=10).strip()
            for arguments in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        )
    except (OSError, subprocess.SubprocessError):  # no git here, or not its repository
        return None
    return head + ("+changed" if changes else "")
