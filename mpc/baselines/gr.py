"""Generalised robust loss (GR): unobserved entries are mixtures whose weights follow the epoch."""

import math

from torch import Tensor

from mpc.baselines.base import Baseline, Terms
from mpc.losses import generalized_robust
from mpc.method import Batch, Progress
from mpc.pseudo import Pseudo

START = {"slope": 0.0, "bias": -2.0, "center": 0.5, "width": 2.0}
END = {"slope": 2.0, "bias": -2.0, "center": 0.8, "width": 0.5}


def schedule(progress: Progress) -> dict[str, float]:
    """Settings of the running epoch: `START` in the first, `END` in the last, linear between."""
    share = min(1.0, math.floor(progress.epoch) / max(1, progress.epochs - 1))
    return {name: START[name] + share * (END[name] - START[name]) for name in START}


class Gr(Baseline):
    """The GR loss with its published schedule.

    Args:
        q2: robustness of the positive part.
        q3: robustness of the negative part.
    """

    def __init__(self, q2: float, q3: float) -> None:
        super().__init__()
        self.q2, self.q3 = q2, q3

    def terms(self, logits: Tensor, batch: Batch, progress: Progress) -> tuple[Terms, Pseudo | None]:
        """The mean over all entries."""
        loss = generalized_robust(logits, batch.observed, q2=self.q2, q3=self.q3, **schedule(progress))
        return {"sup": loss.mean()}, None
