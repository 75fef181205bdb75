"""The settings of a Slurm allocation."""

from infra.fields import Count, Line, Natural
from mpc.config import Config, Positive


class SlurmConfig(Config):
    """A batch job of Slurm that starts Ray on its nodes (`ray symmetric-run`)."""

    folder: str = "~/mpc-cxr-jobs"
    """Folder that this machine and all nodes share; every job gets one of its own there, with its log."""
    nodes: Count = 1
    cpus_per_node: Count = 8
    gpus_per_node: Natural = 0
    memory_gib: Positive = 32.0
    hours: Positive = 24.0
    exclusive: bool = True
    """Whether the nodes are this job's alone: Ray refuses a node on which another Ray runs."""
    partition: Line | None = None
    account: Line | None = None
    requeue: bool = False
    """Whether Slurm may start the job again after a node failed or was taken: it then goes on with --resume."""
    options: tuple[Line, ...] = ()
    """More options of sbatch, one each, such as --constraint=a100."""
    setup: tuple[Line, ...] = ()
    """Shell lines before the job on every node, such as `module load cuda` or `source /shared/venv/bin/activate`."""
