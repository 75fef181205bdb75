"""Pseudo-labels: predictions on the weak view become targets and a mask. Equations in docs/method.md, section 3.2."""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mpc.distributed import mean_over_ranks

CLAMP = 1e-4  # priors and running means stay in [1e-4, 1 - 1e-4], so that their logits are finite


class Pseudo(NamedTuple):
    """Detached targets for the consistency terms."""

    targets: Tensor
    """float32 [B, K] in [0, 1]."""
    mask: Tensor
    """float32 [B, K] in {0, 1}: entries that enter the loss."""
    positive: Tensor
    """bool [B, K]: unobserved entries that were taken as positive."""


def logit_of(probability: float) -> float:
    """log(p / (1 - p)) for p in (0, 1): thresholds are compared as logits, so that no sigmoid rounds them."""
    return math.log(probability / (1.0 - probability))


def threshold(logits: Tensor, observed: Tensor, *, tau_pos: float, tau_neg: float, soft: bool = False) -> Pseudo:
    """Targets and mask from logits of the weak view [B, K] (LAC; Xie et al., NeurIPS 2022).

    Positive where p >= tau_pos or observed, negative where p < tau_neg, ignored between. No gradient passes.

    Args:
        logits: float [B, K], possibly aligned.
        observed: float [B, K] in {0, 1}; observed positives are always selected, with target 1.
        tau_pos: in (0, 1).
        tau_neg: in (0, tau_pos].
        soft: targets are the probabilities themselves on selected unobserved entries.
    """
    with torch.no_grad():
        seen = observed > 0
        positive = (logits >= logit_of(tau_pos)) | seen
        negative = (logits < logit_of(tau_neg)) & ~positive
        targets = torch.where(seen, 1.0, torch.sigmoid(logits)) if soft else positive.float()
        return Pseudo(targets.float(), (positive | negative).float(), positive & ~seen)


class Alignment(nn.Module):
    """Distribution alignment for binary findings: s' = s + logit(prior) - logit(running mean of p).

    It undoes, on average, the shrinkage by 1/n that training on one positive of n brings. The prior of a finding is its
    observed rate times kappa, the mean number of positives an image: extra information that the user declares.

    Args:
        kappa: mean positives an image, >= 1.
        num_findings: K.
        momentum: share of the running mean that a step keeps.
    """

    running: Tensor
    rate: Tensor
    seen: Tensor

    def __init__(self, kappa: float, num_findings: int, momentum: float = 0.99) -> None:
        super().__init__()
        self.kappa, self.momentum = kappa, momentum
        self.register_buffer("running", torch.zeros(num_findings))
        self.register_buffer("rate", torch.zeros(num_findings))
        self.register_buffer("seen", torch.zeros(()))

    @torch.no_grad()
    def update(self, logits: Tensor, observed: Tensor) -> None:
        """Moves the running mean of p and the observed rate by one global batch."""
        mean_p = mean_over_ranks(torch.sigmoid(logits).mean(0))
        rate = mean_over_ranks(observed.mean(0))
        self.seen += 1
        # the plain average until it is longer than the momentum's memory: the first batch does not linger
        step = torch.clamp(1.0 / self.seen, min=1.0 - self.momentum)
        self.running += step * (mean_p - self.running)
        self.rate += step * (rate - self.rate)

    def forward(self, logits: Tensor) -> Tensor:
        """Aligned logits [B, K]."""
        return align(logits, prior=self.rate * self.kappa, running=self.running)


def align(logits: Tensor, *, prior: Tensor, running: Tensor) -> Tensor:
    """S + logit(prior) - logit(running) with both [K] clamped to [1e-4, 1 - 1e-4]."""
    shift = torch.logit(prior, eps=CLAMP) - torch.logit(running, eps=CLAMP)
    return logits + shift
