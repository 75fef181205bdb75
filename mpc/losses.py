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


def masked_mean(loss: Tensor, mask: Tensor, count: Tensor) -> Tensor:
    """Sum of `loss` over entries where `mask` is 1, over `count` (at least 1): exactly 0 if none is selected."""
    return (loss * mask).sum() / count.clamp(min=1.0)
