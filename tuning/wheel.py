"""The project's own wheel, packed from what is installed: a registered model carries the code that it needs.

A wheel is a zip of the packages and their metadata (PyPA, "Binary distribution format"), so no build tool, network or
checkout is needed; an editable install packs as well as a released one.
"""

import base64
import hashlib
import zipfile
from importlib import import_module, metadata
from pathlib import Path

from mpc.errors import UserError

PACKAGES = ("mpc", "pipeline", "tuning", "infra")
DISTRIBUTION = "mpc-cxr"
EPOCH = (1980, 1, 1, 0, 0, 0)  # a fixed time makes the same code the same bytes


def build_wheel(folder: Path) -> Path:
    """Writes `mpc_cxr-VERSION-py3-none-any.whl` into `folder`; the same code gives the same bytes.

    Raises:
        UserError: the project runs without being installed, so that its metadata are missing.
    """
    try:
        distribution = metadata.distribution(DISTRIBUTION)
    except metadata.PackageNotFoundError:
        raise UserError(f"{DISTRIBUTION} is not installed, only on the path; install it with `uv sync`") from None
    info = f"mpc_cxr-{distribution.version}.dist-info"
    entries = dict(sorted(_code().items()))
    entries[f"{info}/METADATA"] = (distribution.read_text("METADATA") or "").encode()
    entries[f"{info}/WHEEL"] = b"Wheel-Version: 1.0\nGenerator: mpc-cxr\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    entries[f"{info}/entry_points.txt"] = (distribution.read_text("entry_points.txt") or "").encode()
    for file in distribution.files or []:
        if "licenses" in file.parts:
            entries[f"{info}/licenses/{file.name}"] = file.read_binary()
    record = [f"{name},sha256={_digest(content)},{len(content)}" for name, content in entries.items()]
    entries[f"{info}/RECORD"] = "\n".join([*record, f"{info}/RECORD,,", ""]).encode()
    path = folder / f"mpc_cxr-{distribution.version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in entries.items():
            entry = zipfile.ZipInfo(name, EPOCH)
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, content, zipfile.ZIP_DEFLATED)
    return path


def _code() -> dict[str, bytes]:
    """Every file of the packages by its name in the wheel; compiled code stays out."""
    found: dict[str, bytes] = {}
    for package in PACKAGES:
        root = Path(str(import_module(package).__file__)).parent
        for path in root.rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                found[f"{package}/{path.relative_to(root).as_posix()}"] = path.read_bytes()
    return found


def _digest(content: bytes) -> str:
    """SHA-256 as RECORD wants it: URL-safe base64 without padding."""
    return base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
