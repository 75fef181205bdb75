"""A loss that left the real numbers: its first step, found without a synchronisation, and the images of that batch."""

import json
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from mpc.distributed import world_size
from mpc.errors import UserError
from pipeline.card import DatasetCard
from pipeline.plan import Plan, Span
from pipeline.spans import read_rows

REPORT = "diverged.json"
NEVER = 2**62


class DivergedError(UserError):
    """The loss left the real numbers."""


class Watch:
    """Remembers the first step whose loss was not finite, on the device.

    Args:
        device: where the steps run.
    """

    def __init__(self, device: torch.device) -> None:
        self.first = torch.full((), NEVER, dtype=torch.int64, device=device)

    def add(self, loss: Tensor, step: int) -> None:
        """Takes note of a step; nothing synchronises."""
        self.first = torch.where(torch.isfinite(loss.detach()), self.first, self.first.clamp(max=step))

    def look(self) -> tuple[int, list[int]] | None:
        """The first bad step and the ranks that met it, the same on every rank; all ranks must look together."""
        firsts = self.first.unsqueeze(0)
        if world_size() > 1:
            parts = [torch.empty_like(firsts) for _ in range(world_size())]
            dist.all_gather(parts, firsts)
            firsts = torch.cat(parts)
        steps = firsts.tolist()
        step = min(steps)
        return None if step == NEVER else (step, [rank for rank, first in enumerate(steps) if first == step])


def describe(uri: str, card: DatasetCard, plan: Plan, step: int, ranks: list[int], rate: float) -> dict[str, Any]:
    """What is known of a bad step, for people to inspect: the images are those of the ranks that met it.

    Args:
        uri: the data set.
        card: its card.
        plan: the order of training, which knows every step's rows.
        step: of the bad loss, from 0.
        ranks: who met it.
        rate: learning rate of that step.
    """
    rows = np.concatenate([plan.share(Span(step, 1), rank, world_size()).reshape(-1) for rank in ranks])
    table, _ = read_rows(uri, plan.holding(rows), rows, card.image_size)
    return {
        "step": step,
        "epoch": step / plan.steps_per_epoch,
        "learning_rate": rate,
        "ranks": ranks,
        "rows": rows.tolist(),
        "image_ids": table["image_id"].to_pylist(),
        "data_digest": card.digest,
    }


def as_json(found: dict[str, Any]) -> bytes:
    """The report as the content of a file."""
    return (json.dumps(found, indent=2) + "\n").encode()
