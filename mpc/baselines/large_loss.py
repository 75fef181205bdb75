"""Large-loss methods: the largest losses of assumed negatives mark hidden positives (Kim et al., CVPR 2022)."""

import math

import torch
from torch import Tensor

from mpc.baselines.base import Baseline, Tabled, Terms, relabelled
from mpc.losses import assume_negative, bce, largest_unobserved
from mpc.method import Batch, Progress
from mpc.pseudo import Pseudo


def quota(entries: int, share: float) -> int:
    """ceil(entries * share), not fooled by rounding."""
    return math.ceil(entries * share - 1e-9)


def reject(logits: Tensor, observed: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """LL-R: AN per element with the `count` largest unobserved losses at 0; and the mask of those."""
    loss = assume_negative(logits, observed)
    marked = largest_unobserved(loss, observed, count)
    return loss.masked_fill(marked, 0.0), marked


def correct(logits: Tensor, observed: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """LL-Ct, LL-Cp: AN per element with the `count` largest unobserved losses as positives; and the mask of those."""
    marked = largest_unobserved(assume_negative(logits, observed), observed, count)
    return bce(logits, (observed.bool() | marked).to(logits.dtype)), marked


class LargeLoss(Baseline):
    """LL-R and LL-Ct: in epoch e = 1, 2, ... the (e - 1) * delta largest of all B * K entries of the rank's batch.

    Args:
        delta: share of the entries that each epoch adds.
        drop: LL-R drops them; LL-Ct counts them as positives in this step.
    """

    def __init__(self, delta: float, drop: bool) -> None:
        super().__init__()
        self.delta, self.drop = delta, drop

    def terms(self, logits: Tensor, batch: Batch, progress: Progress) -> tuple[Terms, Pseudo | None]:
        """The mean over all entries, dropped ones counting as 0."""
        count = quota(logits.numel(), math.floor(progress.epoch) * self.delta)
        if self.drop:
            loss, marked = reject(logits, batch.observed, count)
            pseudo = relabelled(batch.observed, torch.zeros_like(marked), ~marked)
        else:
            loss, marked = correct(logits, batch.observed, count)
            pseudo = relabelled(batch.observed, marked)
        return {"sup": loss.mean()}, pseudo


class LargeLossPermanent(Tabled):
    """LL-Cp: from the second epoch on, the delta largest entries of a batch become positives for good.

    Args:
        delta: share of a batch's entries that each step adds.
    """

    flipped: Tensor

    def __init__(self, delta: float) -> None:
        super().__init__()
        self.delta = delta

    def make_table(self, num_rows: int, num_findings: int) -> None:
        """Which entries became positive."""
        self.register_buffer("flipped", torch.zeros(num_rows, num_findings, dtype=torch.bool))

    def terms(self, logits: Tensor, batch: Batch, progress: Progress) -> tuple[Terms, Pseudo | None]:
        """The mean over all entries under the corrected labels."""
        count = quota(logits.numel(), self.delta) if progress.epoch >= 1 else 0
        before = self.flipped[batch.row]
        loss, marked = correct(logits, (batch.observed.bool() | before).to(logits.dtype), count)
        self.flipped[batch.row] = before | marked
        return {"sup": loss.mean()}, relabelled(batch.observed, before | marked)
