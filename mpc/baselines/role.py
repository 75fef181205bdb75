"""Regularised online label estimation (ROLE; Cole et al., CVPR 2021)."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from mpc.baselines.base import Tabled, Terms
from mpc.baselines.epr import expected_positives
from mpc.losses import bce, positives_only
from mpc.method import Batch, Progress
from mpc.pseudo import Pseudo, logit_of

OBSERVED_START = logit_of(0.995)
UNOBSERVED_START = logit_of(0.6)  # the table begins uniform within +- this
TABLE_LR_SCALE = 10.0


def role(logits: Tensor, estimates: Tensor, observed: Tensor, kappa: float) -> Terms:
    """The four halves of the loss for logits of the network and of the label estimates, both [B, K]."""
    p, q = logits.sigmoid(), estimates.sigmoid()
    return {
        "sup": 0.5 * positives_only(logits, observed).mean(),
        "epr": 0.5 * expected_positives(p, kappa),
        "fit": 0.5 * bce(logits, q.detach()).mean(),
        "estimate": 0.5
        * (
            positives_only(estimates, observed).mean()
            + expected_positives(q, kappa)
            + bce(estimates, p.detach()).mean()
        ),
    }


class Role(Tabled):
    """Network and a table of label estimates teach each other; both are kept at `kappa` positives an image.

    Args:
        kappa: mean number of positives an image: extra information, declared.
    """

    started: Tensor

    def __init__(self, kappa: float) -> None:
        super().__init__()
        self.kappa = kappa

    def make_table(self, num_rows: int, num_findings: int) -> None:
        """One logit an entry; observed positives take their start when their row is first seen."""
        start = (2.0 * torch.rand(num_rows, num_findings) - 1.0) * UNOBSERVED_START
        self.table = nn.Parameter(start)
        self.register_buffer("started", torch.zeros(num_rows, dtype=torch.bool))

    def terms(self, logits: Tensor, batch: Batch, progress: Progress) -> tuple[Terms, Pseudo | None]:
        """The loss for the batch's rows of the table."""
        with torch.no_grad():
            begin = (batch.observed > 0) & ~self.started[batch.row, None]
            self.table[batch.row] = self.table[batch.row].masked_fill(begin, OBSERVED_START)
            self.started[batch.row] = True
        return role(logits, self.table[batch.row], batch.observed, self.kappa), None

    def param_groups(self, model: nn.Module, lr: float) -> Iterable[dict[str, Any]]:
        """The network at `lr`; the table ten times as fast and without weight decay, which would pull it to 1/2."""
        yield from super().param_groups(model, lr)
        yield {"params": [self.table], "lr": lr * TABLE_LR_SCALE, "weight_decay": 0.0}
