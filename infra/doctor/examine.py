"""All checks in order."""

from collections.abc import Iterator

from infra.doctor import machine, services
from infra.doctor.bucket import rights
from infra.doctor.finding import Finding
from infra.doctor.plan import plans
from infra.settings import Settings
from infra.submit.target import kind_of
from infra.tracking import tracking_uri
from mpc.errors import UserError
from pipeline import storage


def examine(settings: Settings, data: str | None, out: str) -> list[Finding]:
    """Every check; nothing is left behind.

    Args:
        settings: what a run would use, and the cluster it would run on.
        data: data set to read, or None.
        out: place to write.
    """
    found = [machine.python(), machine.libraries(), machine.disk(out)]
    found += _cluster(settings) if kind_of(settings.cluster) != "local" else _here(settings)
    found += rights(out) if storage.is_remote(out) else [services.writable(out)]
    if data is not None:
        found.append(services.readable(data))
    return [*found, *_tracking(settings, out)]


def _here(settings: Settings) -> Iterator[Finding]:
    """What this machine has for a run and a search."""
    yield from plans(settings, [machine.resources()], "this machine")
    yield machine.accelerator(settings)


def _cluster(settings: Settings) -> list[Finding]:
    from infra.doctor.cluster import examine_cluster

    return examine_cluster(settings)


def _tracking(settings: Settings, out: str) -> list[Finding]:
    """The tracking store, once it is known which one."""
    try:
        return services.reachable(tracking_uri(settings, out))
    except UserError as error:
        return [Finding("tracking", False, "none", str(error))]
