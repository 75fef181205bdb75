"""Upper references that see true labels: full supervision, and ignoring unobserved positives (IUN)."""

from torch import Tensor

from mpc.baselines.base import Baseline, Terms
from mpc.losses import assume_negative, bce
from mpc.method import Batch, Progress
from mpc.pseudo import Pseudo


class Full(Baseline):
    """Binary cross-entropy on all known labels; unknown entries cost nothing."""

    def terms(self, logits: Tensor, batch: Batch, progress: Progress) -> tuple[Terms, Pseudo | None]:
        """Sum over known entries, divided by all B * K."""
        return {"sup": (batch.known * bce(logits, batch.labels)).mean()}, None


class Iun(Baseline):
    """AN that leaves hidden positives out: true negatives come from an oracle (Cole et al., CVPR 2021)."""

    def terms(self, logits: Tensor, batch: Batch, progress: Progress) -> tuple[Terms, Pseudo | None]:
        """Sum over the observed positives and the known negatives, divided by all B * K."""
        kept = (batch.observed > 0) | (batch.known & (batch.labels == 0))
        return {"sup": (kept * assume_negative(logits, batch.observed)).mean()}, None
