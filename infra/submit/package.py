"""What travels: one zip with the project's wheel, laid out to be imported, and the verb with all that it was told.

Ray unpacks it on every node and puts it first on the path of the job's processes. Its own way with wheels would ask a
package index for every dependency (`pip install --target`), on nodes that have them.
"""

import io
import json
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

from pydantic import TypeAdapter, ValidationError

from infra.cluster import ClusterConfig
from infra.fields import Address
from infra.submit import call as calls
from infra.submit.call import Call
from mpc.errors import UserError
from pipeline.versions import git_commit, versions

FOLDER = "job"
ARGUMENTS, CONFIG, SPACE = f"{FOLDER}/arguments.json", f"{FOLDER}/config.yaml", f"{FOLDER}/space.yaml"
ENTRYPOINT = "-m infra.submit.run"
"""What every kind of cluster runs; the verb itself is in the package, so that no shell takes its words apart."""
COMMIT = "MPC_CXR_COMMIT"
"""Variable by which a job knows the commit that its wheel was built from."""
KIB = 1024


@dataclass(frozen=True, slots=True)
class Job:
    """One submission."""

    name: str
    """At most 47 characters: a DNS label, as KubeRay wants it."""
    verb: str
    package: bytes
    """The zip."""
    code_bytes: int
    """The part of it that is code."""
    entrypoint: str
    environment: Mapping[str, str]
    """Variables for the job; everybody who may look at the job sees them."""

    @property
    def metadata(self) -> dict[str, str]:
        """What a cluster keeps beside the job."""
        return {"verb": self.verb, "mpc-cxr": versions().get("mpc-cxr", ""), "commit": self.environment.get(COMMIT, "")}

    def size(self) -> str:
        """The size of what travels, for people."""
        if not self.code_bytes:
            return f"{len(self.package) / KIB:.0f} KiB of settings, the code is in the image"
        return f"{len(self.package) / KIB:.0f} KiB, {self.code_bytes / KIB:.0f} KiB of it the project's wheel"


def job_of(call: Call, environ: Mapping[str, str], *, resume: bool = False) -> Job:
    """The job that runs `call` on the cluster of its settings.

    Args:
        call: a verb whose places the nodes can reach.
        environ: where the variables that are handed over come from.
        resume: start with --resume, so that a cluster may start the job again.
    """
    cluster, config, space = call.cluster, calls.configuration(call), calls.space(call)
    line = calls.arguments_of(call, CONFIG if config else None, SPACE if space else None, resume)
    files = {ARGUMENTS: json.dumps(line)}
    files |= {name: calls.as_yaml(tree) for name, tree in ((CONFIG, config), (SPACE, space)) if tree}
    package, code_bytes = packed(files, cluster)
    return Job(
        name=f"mpc-{'-'.join(call.path)}-{uuid4().hex[:8]}",
        verb=call.verb,
        package=package,
        code_bytes=code_bytes,
        entrypoint=f"{cluster.python} {ENTRYPOINT}",
        environment=_handed_over(cluster, environ),
    )


def packed(files: Mapping[str, str], cluster: ClusterConfig) -> tuple[bytes, int]:
    """The package of `files` and, unless it is in the image, this project's code; and the code's bytes."""
    wheel = _wheel() if cluster.code == "wheel" else None
    return pack(files, wheel), len(wheel or b"")


def pack(files: Mapping[str, str], wheel: bytes | None) -> bytes:
    """A zip of `files` and of everything in `wheel`; the same input gives the same bytes."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in files.items():
            _add(archive, name, text.encode())
        if wheel is not None:
            with zipfile.ZipFile(io.BytesIO(wheel)) as code:
                for name in code.namelist():
                    _add(archive, name, code.read(name))
    return out.getvalue()


def _add(archive: zipfile.ZipFile, name: str, content: bytes) -> None:
    """Adds a readable file without the time of day."""
    entry = zipfile.ZipInfo(name)
    entry.external_attr = 0o644 << 16
    archive.writestr(entry, content, zipfile.ZIP_DEFLATED)


def _wheel() -> bytes:
    """The wheel of the code that runs here."""
    from tuning.wheel import build_wheel

    with tempfile.TemporaryDirectory() as folder:
        return build_wheel(Path(folder)).read_bytes()


def _handed_over(cluster: ClusterConfig, environ: Mapping[str, str]) -> dict[str, str]:
    """The variables of `cluster.pass_env` that are set, and the commit."""
    found = {name: environ[name] for name in cluster.pass_env if environ.get(name)}
    for name, value in found.items():
        try:
            TypeAdapter(Address).validate_python(value)
        except ValidationError:
            raise UserError(
                f"{name}: holds credentials, which everybody who sees the job would read; take them out of the address"
            ) from None
    commit = git_commit()
    return found | ({COMMIT: commit} if commit else {})
