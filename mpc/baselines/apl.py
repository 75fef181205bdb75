"""Entropy maximisation with asymmetric pseudo-labelling (EM + APL; Zhou et al., ECCV 2022)."""

from collections.abc import Callable

import torch
from torch import Tensor

from mpc.baselines.base import Tabled, Terms
from mpc.losses import bce, entropy_maximization
from mpc.method import Batch, Progress
from mpc.pseudo import Pseudo


def em_apl(logits: Tensor, observed: Tensor, soft: Tensor, labelled: Tensor, *, alpha: float, beta: float) -> Tensor:
    """Per-element loss [B, K]: EM, but beta BCE(s, soft) where `labelled` (bool) gave a soft label in [0, 1]."""
    return torch.where(labelled, beta * bce(logits, soft), entropy_maximization(logits, observed, alpha=alpha))


def lowest(scores: Tensor, eligible: Tensor, count: Tensor) -> Tensor:
    """Marks in each column of scores [N, K] the count[k] lowest eligible entries; of equal ones the earlier row."""
    ranks = scores.masked_fill(~eligible, torch.inf).argsort(dim=0, stable=True).argsort(dim=0)
    return (ranks < count) & eligible


class EmApl(Tabled):
    """EM; from the end of the warm-up on, each epoch the least likely unobserved entries get a permanent soft label.

    Soft labels are the scores of the whole training set, without augmentation, when they are given. Only rows that
    training has seen are labelled.

    Args:
        alpha: weight of the entropy.
        beta: weight of the soft labels.
        theta: share of the unobserved entries of a finding that are labelled by the end.
        warmup: share of the epochs without labels.
    """

    observed: Tensor
    seen: Tensor
    soft: Tensor
    labelled: Tensor
    epochs: Tensor

    def __init__(self, alpha: float, beta: float, theta: float, warmup: float) -> None:
        super().__init__()
        self.alpha, self.beta, self.theta, self.warmup = alpha, beta, theta, warmup

    def make_table(self, num_rows: int, num_findings: int) -> None:
        """Observed labels as they come by, soft labels as they are given."""
        shape = (num_rows, num_findings)
        self.register_buffer("observed", torch.zeros(shape, dtype=torch.bool))
        self.register_buffer("seen", torch.zeros(num_rows, dtype=torch.bool))
        self.register_buffer("soft", torch.zeros(shape))
        self.register_buffer("labelled", torch.zeros(shape, dtype=torch.bool))
        self.register_buffer("epochs", torch.zeros(2, dtype=torch.int64))  # done, planned

    def terms(self, logits: Tensor, batch: Batch, progress: Progress) -> tuple[Terms, Pseudo | None]:
        """The mean of `em_apl`."""
        self.observed[batch.row] = batch.observed > 0
        self.seen[batch.row] = True
        self.epochs[1] = progress.epochs
        soft, labelled = self.soft[batch.row].to(logits.dtype), self.labelled[batch.row]
        loss = em_apl(logits, batch.observed, soft, labelled, alpha=self.alpha, beta=self.beta)
        return {"sup": loss.mean()}, None

    @torch.no_grad()
    def on_epoch_end(self, score_all: Callable[[], Tensor]) -> None:
        """Labels theta / rounds of every finding's unobserved entries, the lowest-scored first."""
        self.epochs[0] += 1
        done, planned = self.epochs.tolist()
        start = max(1, round(self.warmup * planned))
        if not start <= done < planned:
            return
        probabilities = score_all().to(self.soft).sigmoid()
        unobserved = ~self.observed & self.seen[:, None]
        count = (self.theta * unobserved.sum(0) / (planned - start)).long()
        chosen = lowest(probabilities, unobserved & ~self.labelled, count)
        self.soft = torch.where(chosen, probabilities, self.soft)
        self.labelled |= chosen
