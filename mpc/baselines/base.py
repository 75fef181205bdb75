"""What the rivals of MPC have in common: one forward of the weak view, terms that add up, nothing else."""

from abc import abstractmethod
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from mpc.distributed import world_size
from mpc.errors import UserError
from mpc.method import Batch, Progress, StepOutput
from mpc.model import Classifier
from mpc.pseudo import Pseudo
from mpc.step import SupLoss, monitors

Terms = dict[str, Tensor]


class Baseline(nn.Module):
    """A method that reads the weak view alone; `mpc.method.Method` with everything but its loss."""

    needs_strong = False
    one_process = False

    @abstractmethod
    def terms(self, logits: Tensor, batch: Batch, progress: Progress) -> tuple[Terms, Pseudo | None]:
        """Scalars that add up to the loss, and the labels that the method made up, for the monitors."""

    def setup(self, num_rows: int, num_findings: int) -> None:
        """Most keep nothing a row."""

    def step(self, model: Classifier, batch: Batch, progress: Progress) -> StepOutput:
        """Loss of one batch; see `mpc.method.Method.step`."""
        logits = model(batch.weak)
        terms, pseudo = self.terms(logits, batch, progress)
        loss = torch.stack(list(terms.values())).sum()
        return StepOutput(loss, {name: term.detach() for name, term in terms.items()}, monitors(logits, batch, pseudo))

    def on_epoch_end(self, score_all: Callable[[], Tensor]) -> None:
        """Most relabel nothing between epochs."""

    def param_groups(self, model: nn.Module, lr: float) -> Iterable[dict[str, Any]]:
        """The network at `lr`."""
        yield {"params": list(model.parameters()), "lr": lr}


class Plain(Baseline):
    """The mean of one per-element loss on (logits, observed): AN, AN-LS, WAN, EM.

    Args:
        loss: of `mpc.losses`, its settings bound.
    """

    def __init__(self, loss: SupLoss) -> None:
        super().__init__()
        self.loss = loss

    def terms(self, logits: Tensor, batch: Batch, progress: Progress) -> tuple[Terms, Pseudo | None]:
        """The mean over all entries."""
        return {"sup": self.loss(logits, batch.observed).mean()}, None


class Tabled(Baseline):
    """A method that remembers something for every training row, in the memory of one process."""

    one_process = True

    def setup(self, num_rows: int, num_findings: int) -> None:
        """Refuses several workers, then makes the table.

        Raises:
            UserError: more than one rank trains.
        """
        if world_size() > 1:
            raise UserError(
                f"method {type(self).__name__} keeps a table over all rows in one process; set train.num_workers=1"
            )
        self.make_table(num_rows, num_findings)

    @abstractmethod
    def make_table(self, num_rows: int, num_findings: int) -> None:
        """Allocates it."""


def relabelled(targets: Tensor, positive: Tensor, kept: Tensor | None = None) -> Pseudo:
    """What the monitors read: the targets in use, which entries count, and which were taken for hidden positives."""
    mask = torch.ones_like(targets) if kept is None else kept.to(targets.dtype)
    return Pseudo(targets, mask, positive)
