"""A cluster as a job would find it: a small one asks, on a cluster of Ray; of others it is seen that they answer."""

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from uuid import uuid4

from infra.doctor.bucket import SKEW_SECONDS
from infra.doctor.finding import Finding
from infra.doctor.plan import plans
from infra.doctor.probe import MARK
from infra.settings import Settings
from infra.submit import tools
from infra.submit.package import Job, packed
from infra.submit.target import LostError, Target, kind_of, target_of
from mpc.errors import UserError
from pipeline.versions import versions

SAME = ("python", "ray", "mpc-cxr")
"""What must be equal on both sides; Python up to its minor version."""


def examine_cluster(settings: Settings) -> list[Finding]:
    """Whether the cluster of the settings answers, and what it has."""
    kind = kind_of(settings.cluster)
    try:
        if kind == "ray":
            before = time.time()
            told = _ask(settings, target_of(settings.cluster))
            return [
                *compare(versions(), told["versions"]),
                clock(told["time"], before, time.time()),
                *_size(settings, told),
            ]
        return [Finding("cluster", True, f"{kind}: {_answer(settings, kind)}")]
    except (UserError, LostError) as error:
        return [Finding("cluster", False, kind, str(error))]


def compare(here: Mapping[str, str], there: Mapping[str, str]) -> list[Finding]:
    """Software of both sides.

    Args:
        here: version by package of this machine, `python` among them.
        there: those of the cluster.
    """
    different = {name: f"{name} {here.get(name)} here, {there.get(name)} there" for name in here}
    different = {name: text for name, text in different.items() if _version(name, here) != _version(name, there)}
    ok = not set(SAME) & set(different)
    text = "; ".join(different.values()) or f"the same on both sides: {', '.join(here)}"
    remedy = "give nodes and this machine the same environment: the image of infra/docker, or `uv sync --locked`"
    return [Finding("cluster", ok, text, remedy)]


def clock(there: float, before: float, after: float) -> Finding:
    """The cluster's clock, read at some moment between two readings of this one; all in seconds since 1970."""
    skew = max(before - there, there - after, 0.0)
    text = f"at most {skew:.0f} s from the cluster's" if skew else "agrees with the cluster's"
    return Finding("cluster clock", skew <= SKEW_SECONDS, text, "set the clocks of both sides by NTP")


def _version(name: str, found: Mapping[str, str]) -> str | None:
    """A version as far as it must be equal."""
    version = found.get(name)
    return ".".join(version.split(".")[:2]) if version and name == "python" else version


def _size(settings: Settings, told: Mapping[str, Any]) -> list[Finding]:
    """What the cluster has at this moment."""
    nodes = told["nodes"]
    return plans(settings, nodes, f"the cluster of {len(nodes)} node{'s' if len(nodes) != 1 else ''}")


def _ask(settings: Settings, target: Target) -> dict[str, Any]:
    """Runs the probe as a job, exactly as `submit` would run a verb."""
    cluster = settings.cluster
    package, code_bytes = packed({}, cluster)
    name = f"mpc-doctor-{uuid4().hex[:8]}"
    target.submit(Job(name, "doctor", package, code_bytes, f"{cluster.python} -m infra.doctor.probe", {}))
    log = "".join(target.logs(name, follow=True))
    lines = [line.removeprefix(MARK) for line in log.splitlines() if line.startswith(MARK)]
    if not lines:
        last = log.strip().splitlines()[-1:] or ["it left no log"]
        raise UserError(f"the probe {name} failed: {last[0][:200]}; see `mpc-cxr jobs logs {name}`")
    told: dict[str, Any] = json.loads(lines[0])
    return told


def _answer(settings: Settings, kind: str) -> str:
    """What a cluster that no probe is worth says to its own tool."""
    if kind == "kuberay":
        context = settings.cluster.kuberay.context
        kubectl = ["kubectl", *(["--context", context] if context else []), "-n", settings.cluster.kuberay.namespace]
        tools.call([*kubectl, "auth", "can-i", "create", "rayjobs.ray.io"])
        return f"may create RayJobs in {settings.cluster.kuberay.namespace}"
    if kind == "slurm":
        return f"partitions {' '.join(tools.call(['sinfo', '--noheader', '--format=%P %a']).split())}"
    return _aws()


def _aws() -> str:
    """Whether the launcher has what it needs; it is not asked for a machine."""
    import boto3

    from infra.aws.launcher import TOKEN

    tools.require("ssh")
    if boto3.Session().get_credentials() is None:
        raise UserError("no AWS credentials; log in with `aws sso login` or `aws configure`")
    if not Path(TOKEN).expanduser().is_file():
        raise UserError(f"{TOKEN}: is absent, and the nodes get it from here; `ray get-auth-token --generate`")
    return "credentials, ssh and Ray's token are here; machines were not asked for"
