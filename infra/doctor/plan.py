"""Whether what is planned fits: else Ray would wait for ever."""

from collections.abc import Sequence

from infra.doctor.finding import Finding
from infra.settings import Settings, run_config
from mpc.errors import UserError
from tuning.resources import Node, plan


def plans(settings: Settings, nodes: Sequence[Node], where: str) -> list[Finding]:
    """A run and a search against the CPUs and GPUs of the machines of a cluster.

    Args:
        settings: what is planned.
        nodes: what each machine has, by the names that Ray gives them.
        where: what has them, for people.
    """
    return [_run(settings, nodes, where), _search(settings, nodes, where)]


def _run(settings: Settings, nodes: Sequence[Node], where: str) -> Finding:
    """The workers of one run and their data tasks."""
    cpus, gpus = (sum(node.get(name, 0.0) for node in nodes) for name in ("CPU", "GPU"))
    need = settings.train.least_workers * settings.worker_cpus + settings.cpus_beside
    need_gpus = settings.train.num_workers * settings.worker_gpus
    text = f"{where} has {cpus:g} CPUs for {need:g}, {gpus:g} GPUs for {need_gpus:g}"
    remedy = (
        f"one run asks for {need:g} CPUs and {need_gpus:g} GPUs; lower train.num_workers, train.worker_cpus or "
        f"data.task_cpus, or let the cluster grow"
    )
    return Finding("train", cpus >= need and gpus >= need_gpus, text, remedy)


def _search(settings: Settings, nodes: Sequence[Node], where: str) -> Finding:
    """How many trials run side by side."""
    try:
        trials = plan(run_config(settings), settings.search, nodes).concurrent
    except UserError as error:
        return Finding("tune", False, f"{where} carries no trial", str(error))
    return Finding("tune", True, f"{where} carries {trials} trials at a time")
