"""What a checkpoint holds of a training loop, and how a loop continues from one, with as many workers as there are."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from mpc import checkpoint as checkpoints
from mpc.config import CheckpointInfo
from mpc.errors import UserError
from pipeline.scoring import Choices
from pipeline.versions import git_commit, versions

if TYPE_CHECKING:
    from pipeline.loop import Loop

Sums = dict[str, Tensor]


def save(loop: "Loop", folder: Path, metrics: dict[str, Any], choices: Choices, meters: list[Sums]) -> None:
    """Writes a checkpoint that continues, evaluates and registers.

    Args:
        loop: whose state it is.
        folder: where to.
        metrics: of the step; numbers alone are kept.
        choices: of thresholds and temperatures, at the ends of epochs.
        meters: every rank's sums since the epoch began.
    """
    state = {
        "step": loop.step,
        "optimizer": loop.optimizer.state_dict(),
        "schedule": loop.schedule.state_dict(),
        "scaler": loop.scaler.state_dict(),
        "method": loop.method.state_dict(),
        "meters": meters,
    }
    info = CheckpointInfo(
        config=loop.run.model_dump(mode="json"),
        findings=loop.card.findings,
        image_size=loop.card.image_size,
        pixels=loop.card.pixels,
        step=loop.step,
        epoch=loop.step / loop.plan.steps_per_epoch,
        metrics={k: v for k, v in metrics.items() if isinstance(v, int | float)},
        **choices._asdict(),
        data_digest=loop.card.digest,
        git_commit=git_commit(),
        versions=versions(),
    )
    checkpoints.save(folder, loop.model, loop.ema.module.state_dict(), state, info)


def restore(loop: "Loop", folder: Path) -> dict[str, Any]:
    """Continues from a checkpoint of the same run and data; its metrics.

    Raises:
        UserError: the data set has changed since, or the checkpoint is damaged.
    """
    info = checkpoints.read_info(folder)
    if info.data_digest != loop.card.digest:
        raise UserError(
            f"{loop.data}: digest {loop.card.digest[:12]} differs from {info.data_digest[:12]} of the checkpoint; "
            f"continue on the data that the run began with"
        )
    loop.model.load_state_dict(checkpoints.load_weights(folder, "model"))
    loop.ema.module.load_state_dict(checkpoints.load_weights(folder, "ema"))
    state = checkpoints.load_training_state(folder)
    loop.step = state["step"]
    loop.optimizer.load_state_dict(state["optimizer"])
    loop.schedule.load_state_dict(state["schedule"])
    loop.scaler.load_state_dict(state["scaler"])
    loop.method.load_state_dict(state["method"])
    loop.meter.load_state_dict(own_sums(state["meters"], loop.host.rank, loop.host.world_size))
    return dict(info.metrics)


def gathered(sums: Sums, rank: int, world_size: int) -> list[Sums]:
    """Every rank's sums on rank 0, in the order of ranks; nothing on the others."""
    if world_size == 1:
        return [sums]
    parts: list[Any] = [None] * world_size
    dist.gather_object(sums, parts if rank == 0 else None)
    return parts if rank == 0 else []


def own_sums(meters: list[Sums], rank: int, world_size: int) -> Sums:
    """What a rank goes on adding to: its own sums, or, where the number of workers has changed, rank 0 takes all.

    Counts are added up. Loss terms are means over ranks, so those of a step weigh as much as there are workers now.
    """
    if len(meters) == world_size:
        return meters[rank]
    total: Sums = {}
    for sums in meters if rank == 0 else []:
        for name, value in sums.items():
            weight = world_size / len(meters) if name.startswith(("mean ", "steps ")) else 1.0
            total[name] = total.get(name, torch.zeros_like(value)) + weight * value
    return total
