"""Who runs the training loop: what the loop asks of a worker of Ray Train, a trial of Ray Tune, or a plain process."""

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal, Protocol

import torch

Metrics = dict[str, Any]
Notice = Literal["go", "save", "stop"]
"""Go on; write a checkpoint, for a worker will be lost; or write one and end."""


class Host(Protocol):
    """Who runs the loop: a Ray Train worker, a Ray Tune trial, or a plain process."""

    rank: int
    world_size: int
    device: torch.device
    scratch: Path | None = None
    """Where checkpoints are written, for the host to take over; None takes the system's place for temporary files."""

    def last_checkpoint(self) -> AbstractContextManager[Path | None]:
        """The folder to continue from, if there is one."""
        ...

    def report(self, metrics: Metrics, checkpoint: Path) -> None:
        """Takes over a checkpoint (written on rank 0, empty elsewhere) with its metrics; all ranks call it together."""
        ...

    def log(self, line: Metrics) -> None:
        """Shows a line of progress inside an epoch (rank 0)."""
        ...

    def begun(self, step: int, metrics: Metrics) -> None:
        """Learns before the first step where the loop begins, and with which metrics of the checkpoint there."""
        return

    def notice(self, step: int) -> Notice:
        """What to do after a step; every rank gets the same answer."""
        return "go"

    def leave(self, name: str, content: bytes) -> str:
        """Leaves a file with the run for people to read (rank 0); its place."""
        ...
