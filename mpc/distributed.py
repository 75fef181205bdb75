"""The few collectives that a step needs; each is the identity in a single process."""

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """Number of ranks; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def mean_over_ranks(value: Tensor) -> Tensor:
    """Mean of a detached tensor over all ranks.

    A count divided this way makes the average of per-rank losses the loss of the global batch (docs/method.md, 4.3).
    """
    if world_size() == 1:
        return value
    value = value.clone()
    dist.all_reduce(value)
    return value / world_size()


class _GatherRows(torch.autograd.Function):
    """Concatenates every rank's rows; the gradient of a row flows back to the rank that owns it.

    DDP averages gradients over ranks and each rank's loss covers its own slice only, so the sum over ranks that
    `backward` takes is the gradient of the global loss without further scaling (docs/method.md, 4.3).
    """

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, rows: Tensor) -> Tensor:
        parts = [torch.empty_like(rows) for _ in range(world_size())]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *grads: Tensor) -> Tensor:
        grad = grads[0].contiguous()
        dist.all_reduce(grad)
        return grad.chunk(world_size())[dist.get_rank()]


def gather_rows(rows: Tensor) -> Tensor:
    """[B, C] of every rank as [W * B, C], differentiable; B must be equal on all ranks."""
    if world_size() == 1:
        return rows
    gathered: Tensor = _GatherRows.apply(rows)
    return gathered


def own_rows(rows: Tensor, count: int) -> Tensor:
    """The own `count` rows of what `gather_rows` gave."""
    if world_size() == 1:
        return rows
    start = dist.get_rank() * count
    return rows[start : start + count]
