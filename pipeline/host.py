"""Who runs the training loop: what the loop asks of a worker of Ray Train, a trial of Ray Tune, or a plain process."""

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import torch

Metrics = dict[str, Any]


class Host(Protocol):
    """Who runs the loop: a Ray Train worker, a Ray Tune trial, or a plain process."""

    rank: int
    world_size: int
    device: torch.device

    def last_checkpoint(self) -> AbstractContextManager[Path | None]:
        """The folder to continue from, if there is one."""
        ...

    def report(self, metrics: Metrics, checkpoint: Path) -> None:
        """Takes over a checkpoint (written on rank 0, empty elsewhere) with its metrics; all ranks call it together."""
        ...

    def log(self, line: Metrics) -> None:
        """Shows a line of progress inside an epoch (rank 0)."""
        ...
