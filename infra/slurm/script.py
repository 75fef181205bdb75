"""The batch script from the settings."""

import shlex
from importlib.resources import files

from jinja2 import Environment, StrictUndefined

from infra.slurm.config import SlurmConfig
from infra.submit.package import Job

SCRIPT, LOG, CODE = "job.sh", "log.txt", "exit_code"
"""Files of a job's folder; the verb's exit code is written by the verb itself."""


def batch_script(config: SlurmConfig, job: Job, folder: str, python: str) -> str:
    """What `sbatch` is given.

    Args:
        config: size of the allocation, and what the site needs.
        job: the verb; its package lies unpacked in `folder`.
        folder: the job's own, which all nodes share.
        python: interpreter on the nodes.
    """
    environment = Environment(undefined=StrictUndefined, autoescape=False, keep_trailing_newline=True)  # a shell script
    environment.filters["quote"] = shlex.quote
    template = environment.from_string(files("infra.slurm").joinpath("job.sh.j2").read_text(encoding="utf-8"))
    return template.render(
        options=_options(config, job.name, folder),
        folder=folder,
        setup=config.setup,
        environment=job.environment,
        python=python,
        entrypoint=f"{job.entrypoint} {CODE}",
        code=CODE,
        cpus=config.cpus_per_node,
        gpus=config.gpus_per_node,
    )


def _options(config: SlurmConfig, name: str, folder: str) -> list[str]:
    """Lines of #SBATCH."""
    minutes = max(1, round(config.hours * 60))
    found = [
        f"--job-name={name}",
        f"--nodes={config.nodes}",
        "--ntasks-per-node=1",
        f"--cpus-per-task={config.cpus_per_node}",
        f"--mem={round(config.memory_gib * 1024)}M",
        f"--time={minutes}",
        f"--output={folder}/{LOG}",
        "--open-mode=append",
        "--requeue" if config.requeue else "--no-requeue",
    ]
    found += ["--exclusive"] if config.exclusive else []
    found += [f"--gpus-per-node={config.gpus_per_node}"] if config.gpus_per_node else []
    found += [f"--partition={config.partition}"] if config.partition else []
    found += [f"--account={config.account}"] if config.account else []
    return [*found, *config.options]
