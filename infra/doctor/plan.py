"""Whether what is planned fits: else Ray would wait for ever."""

from collections.abc import Mapping

from infra.doctor.finding import Finding
from infra.settings import Settings, run_config
from mpc.errors import UserError


def plans(settings: Settings, resources: Mapping[str, float], where: str) -> list[Finding]:
    """A run and a search against the CPUs and GPUs of a machine or a cluster.

    Args:
        settings: what is planned.
        resources: by the names that Ray gives them.
        where: what has them, for people.
    """
    return [_run(settings, resources, where), _search(settings, resources, where)]


def _run(settings: Settings, resources: Mapping[str, float], where: str) -> Finding:
    """The workers of one run and their data tasks."""
    cpus, gpus = resources.get("CPU", 0.0), resources.get("GPU", 0.0)
    need = settings.train.least_workers * settings.worker_cpus + settings.cpus_beside
    need_gpus = settings.train.num_workers if settings.train.use_gpu else 0
    text = f"{where} has {cpus:g} CPUs for {need:g}, {gpus:g} GPUs for {need_gpus}"
    remedy = (
        f"one run asks for {need:g} CPUs and {need_gpus} GPUs; lower train.num_workers, train.worker_cpus or "
        f"data.task_cpus, or let the cluster grow"
    )
    return Finding("train", cpus >= need and gpus >= need_gpus, text, remedy)


def _search(settings: Settings, resources: Mapping[str, float], where: str) -> Finding:
    """How many trials run side by side."""
    from tuning.search import concurrency

    try:
        trials = concurrency(run_config(settings), settings.search, dict(resources))
    except UserError as error:
        return Finding("tune", False, f"{where} carries no trial", str(error))
    return Finding("tune", True, f"{where} carries {trials} trials at a time")
