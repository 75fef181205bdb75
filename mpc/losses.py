"""Pure per-element losses on logits: no reduction, no state. Equations in docs/method.md, section 4.2.

Every function takes logits [..., K] and returns a tensor of that shape. `observed` is 1 at the one noted positive of a
row and 0 elsewhere. All forms are stable for any finite logit: softplus, never log(p + epsilon).
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def bce(logits: Tensor, targets: Tensor) -> Tensor:
    """Binary cross-entropy softplus(s) - s t, for targets t in [0, 1] of the logits' shape."""
    return F.softplus(logits) - logits * targets


def assume_negative(logits: Tensor, observed: Tensor) -> Tensor:
    """AN (Cole et al., CVPR 2021): every unobserved entry counts as negative."""
    return bce(logits, observed)


def weak_assume_negative(logits: Tensor, observed: Tensor) -> Tensor:
    """WAN (Cole et al., CVPR 2021): AN with unobserved entries weighted by 1 / (K - 1). Needs K >= 2 findings."""
    weight = torch.where(observed > 0, 1.0, 1.0 / (logits.shape[-1] - 1))
    return weight * bce(logits, observed)


def assume_negative_smoothed(logits: Tensor, observed: Tensor, *, smoothing: float = 0.1) -> Tensor:
    """AN-LS (Cole et al., CVPR 2021): AN with targets `smoothing` and 1 - `smoothing`, smoothing in [0, 0.5)."""
    return bce(logits, observed * (1.0 - 2.0 * smoothing) + smoothing)


def entropy(logits: Tensor) -> Tensor:
    """Entropy of a Bernoulli variable in nats, in its two-term form: the shorter one cancels for large logits."""
    p = torch.sigmoid(logits)
    return p * F.softplus(-logits) + (1.0 - p) * F.softplus(logits)


def positives_only(logits: Tensor, observed: Tensor) -> Tensor:
    """softplus(-s) at observed positives and 0 elsewhere: the supervised part of EPR and EM."""
    return observed * F.softplus(-logits)


def entropy_maximization(logits: Tensor, observed: Tensor, *, alpha: float) -> Tensor:
    """EM (Zhou et al., ECCV 2022): unobserved entries are pushed towards p = 1/2 by -alpha H(s), alpha > 0."""
    return positives_only(logits, observed) - (1.0 - observed) * alpha * entropy(logits)


def focal_margin(logits: Tensor, targets: Tensor, *, margin: float = 1.0, gamma: float = 2.0) -> Tensor:
    """Focal margin loss (Zhang et al. 2021) for targets in {0, 1}: positives are judged at s - margin."""
    shifted = logits - margin * targets
    weight = targets * torch.sigmoid(-shifted) + (1.0 - targets) * torch.sigmoid(shifted)
    return weight**gamma * bce(shifted, targets)


def generalized_robust(
    logits: Tensor,
    observed: Tensor,
    *,
    slope: float,
    bias: float,
    center: float,
    width: float,
    q2: float = 0.01,
    q3: float = 1.0,
) -> Tensor:
    """GR loss: an unobserved entry is a mixture of a positive and a negative, softened and weighted by its own p.

    With p = sigmoid(s) and, both without gradient, k = sigmoid(slope p + bias), v = exp(-(p - center)^2 / (2 width^2)):
    v [k (1 - p^q2) / q2 + (1 - k) (1 - (1 - p)^q3) / q3]. Observed positives keep softplus(-s). q2, q3 > 0.
    """
    with torch.no_grad():
        p = torch.sigmoid(logits)
        k = torch.sigmoid(slope * p + bias)
        v = torch.exp(-((p - center) ** 2) / (2.0 * width**2))
    as_positive = -torch.expm1(-q2 * F.softplus(-logits)) / q2  # p^q = exp(-q softplus(-s))
    as_negative = -torch.expm1(-q3 * F.softplus(logits)) / q3
    unobserved = v * (k * as_positive + (1.0 - k) * as_negative)
    return torch.where(observed > 0, F.softplus(-logits), unobserved)


def largest_unobserved(loss: Tensor, observed: Tensor, count: int) -> Tensor:
    """Marks the `count` largest losses among unobserved entries of the whole batch (Kim et al., CVPR 2022).

    Bool, of the loss's shape; of equal losses the earlier entry is marked. Observed entries are never marked, however
    large `count` is.
    """
    unobserved = (observed == 0).flatten()
    ranked = loss.detach().flatten().masked_fill(~unobserved, -torch.inf).argsort(descending=True, stable=True)
    marked = torch.zeros_like(unobserved)
    marked[ranked[:count]] = True
    return (marked & unobserved).reshape(loss.shape)


def masked_mean(loss: Tensor, mask: Tensor, count: Tensor) -> Tensor:
    """Sum of `loss` over entries where `mask` is 1, over `count` (at least 1): exactly 0 if none is selected."""
    return (loss * mask).sum() / count.clamp(min=1.0)
