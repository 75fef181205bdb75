"""Expected-positive regularisation (EPR; Cole et al., CVPR 2021)."""

from torch import Tensor

from mpc.baselines.base import Baseline, Terms
from mpc.distributed import mean_over_ranks
from mpc.losses import positives_only
from mpc.method import Batch, Progress
from mpc.pseudo import Pseudo


def expected_positives(probabilities: Tensor, kappa: float) -> Tensor:
    """((mean over the batch of sum_k p_k - kappa) / K)^2, a scalar, for probabilities [B, K].

    The mean is that of the global batch: averaged over ranks, value and gradient are those of one process.
    """
    num_findings = probabilities.shape[-1]
    own = probabilities.sum(-1).mean()
    gap = (mean_over_ranks(own.detach()) - kappa) / num_findings
    return gap**2 + 2.0 * gap / num_findings * (own - own.detach())


class Epr(Baseline):
    """Observed positives, and on average `kappa` positives an image.

    Args:
        kappa: mean number of positives an image: extra information, declared.
    """

    def __init__(self, kappa: float) -> None:
        super().__init__()
        self.kappa = kappa

    def terms(self, logits: Tensor, batch: Batch, progress: Progress) -> tuple[Terms, Pseudo | None]:
        """Supervision and regulariser."""
        regulariser = expected_positives(logits.sigmoid(), self.kappa)
        return {"sup": positives_only(logits, batch.observed).mean(), "epr": regulariser}, None
