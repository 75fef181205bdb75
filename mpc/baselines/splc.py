"""Self-paced loss correction on the focal margin loss (SPLC; Zhang et al. 2021)."""

import torch
from torch import Tensor

from mpc.baselines.base import Baseline, Terms, relabelled
from mpc.losses import focal_margin
from mpc.method import Batch, Progress
from mpc.pseudo import Pseudo, logit_of


class Splc(Baseline):
    """After the first epoch an unobserved entry with p > tau counts as positive in this step.

    Args:
        tau: in (0, 1).
        margin: of the focal margin loss.
        gamma: its focusing exponent.
    """

    def __init__(self, tau: float, margin: float = 1.0, gamma: float = 2.0) -> None:
        super().__init__()
        self.tau, self.margin, self.gamma = tau, margin, gamma

    def terms(self, logits: Tensor, batch: Batch, progress: Progress) -> tuple[Terms, Pseudo | None]:
        """The mean over all entries under the corrected labels."""
        flipped = (logits.detach() > logit_of(self.tau)) & (batch.observed == 0) & (progress.epoch >= 1)
        targets = torch.where(flipped, 1.0, batch.observed)
        loss = focal_margin(logits, targets, margin=self.margin, gamma=self.gamma)
        return {"sup": loss.mean()}, relabelled(targets, flipped)
