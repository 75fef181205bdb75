"""The MPC training step; it reads like section 4 of docs/method.md."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mpc.distributed import gather_rows, mean_over_ranks, own_rows, world_size
from mpc.losses import bce, masked_mean
from mpc.method import Batch, Progress, StepOutput
from mpc.model import BatchEncoder, Classifier
from mpc.pseudo import Alignment, Pseudo, threshold

SupLoss = Callable[[Tensor, Tensor], Tensor]


class Mpc(nn.Module):
    """Multi-level pseudo-label consistency: L_sup + ramp * (l_ipc L_IPC + l_fpc L_FPC + l_btc L_BTC).

    Args:
        sup_loss: per-element loss on (logits of the weak view, observed labels).
        tau_pos: positive pseudo-label at probability >= tau_pos.
        tau_neg: negative pseudo-label at probability < tau_neg.
        soft: probabilities instead of 0 and 1 as targets.
        select: divide by the selected entries (else by all B * K).
        lambda_ipc: weight of instance-level consistency; 0 skips its branch, likewise the next two.
        lambda_fpc: weight of feature-level consistency.
        lambda_btc: weight of batch-level consistency.
        perturb_rate: channel dropout of the weak features in FPC.
        encoder: the batch encoder of BTC, or None with lambda_btc = 0.
        btc_strong: BTC reads strong features (else weak).
        btc_observed: BTC learns the observed labels with `sup_loss` (else pseudo-labels).
        btc_global: attention over the gathered global batch (else the rank's own).
        encoder_lr_scale: learning rate of the encoder relative to the network's.
        alignment: distribution alignment of the logits that make pseudo-labels, or None.
        teacher: network whose predictions make pseudo-labels, or None for the trained one.
        warmup_epochs: epochs of L_sup alone.
        ramp_epochs: epochs of the linear rise that follows.
    """

    def __init__(
        self,
        sup_loss: SupLoss,
        *,
        tau_pos: float,
        tau_neg: float,
        soft: bool = False,
        select: bool = True,
        lambda_ipc: float = 1.0,
        lambda_fpc: float = 0.5,
        lambda_btc: float = 0.5,
        perturb_rate: float = 0.5,
        encoder: BatchEncoder | None = None,
        btc_strong: bool = False,
        btc_observed: bool = False,
        btc_global: bool = False,
        encoder_lr_scale: float = 0.1,
        alignment: Alignment | None = None,
        teacher: Callable[[Tensor], Tensor] | None = None,
        warmup_epochs: float = 0.0,
        ramp_epochs: float = 0.0,
    ) -> None:
        super().__init__()
        assert (encoder is not None) == (lambda_btc > 0), "the encoder exists exactly where BTC does"
        self.sup_loss, self.alignment, self.encoder = sup_loss, alignment, encoder
        self.teacher = [teacher]  # in a list: the teacher is no submodule, its weights are saved elsewhere
        self.tau_pos, self.tau_neg, self.soft, self.select = tau_pos, tau_neg, soft, select
        self.lambda_ipc, self.lambda_fpc, self.lambda_btc = lambda_ipc, lambda_fpc, lambda_btc
        self.perturb_rate, self.encoder_lr_scale = perturb_rate, encoder_lr_scale
        self.btc_strong, self.btc_observed, self.btc_global = btc_strong, btc_observed, btc_global
        self.warmup_epochs, self.ramp_epochs = warmup_epochs, ramp_epochs

    @property
    def needs_strong(self) -> bool:
        """Whether IPC is active."""
        return self.lambda_ipc > 0

    def setup(self, num_rows: int, num_findings: int) -> None:
        """MPC keeps nothing a row."""

    def ramp(self, progress: Progress) -> float:
        """Weight of the consistency terms in [0, 1]: 0 in the warm-up, then a linear rise."""
        done = progress.epoch - self.warmup_epochs
        if done < 0:
            return 0.0
        return 1.0 if self.ramp_epochs == 0 else min(1.0, done / self.ramp_epochs)

    def step(self, model: Classifier, batch: Batch, progress: Progress) -> StepOutput:
        """Loss of one batch; see `mpc.method.Method.step`."""
        ramp = self.ramp(progress)
        strong = batch.strong if self.needs_strong and ramp > 0 else None
        size = len(batch.weak)

        # one forward: both views share the batch statistics of normalisation layers
        features = model.features(batch.weak if strong is None else torch.cat([batch.weak, strong]))
        features_weak, features_strong = features[:size], features[size:]
        logits_weak = model.head(features_weak)
        terms = {"sup": self.sup_loss(logits_weak, batch.observed).mean()}

        pseudo = self.pseudo_labels(logits_weak.detach(), batch)
        count = self.denominator(pseudo.mask)

        if strong is not None:
            terms["ipc"] = masked_mean(bce(model.head(features_strong), pseudo.targets), pseudo.mask, count)
        if self.lambda_fpc > 0:
            logits_perturbed = model.head(F.dropout(features_weak, self.perturb_rate))
            terms["fpc"] = masked_mean(bce(logits_perturbed, pseudo.targets), pseudo.mask, count)
        if self.encoder is not None:  # also in the warm-up, with weight 0: DDP wants every parameter in the graph
            read_strong = self.btc_strong and strong is not None
            logits_batch = model.head(self.encode(features_strong if read_strong else features_weak))
            if self.btc_observed:
                terms["btc"] = self.sup_loss(logits_batch, batch.observed).mean()
            else:
                terms["btc"] = masked_mean(bce(logits_batch, pseudo.targets), pseudo.mask, count)

        weights = {"sup": 1.0, "ipc": self.lambda_ipc, "fpc": self.lambda_fpc, "btc": self.lambda_btc}
        loss = sum((ramp if name != "sup" else 1.0) * weights[name] * term for name, term in terms.items())
        assert isinstance(loss, Tensor)
        return StepOutput(loss, {k: v.detach() for k, v in terms.items()}, monitors(logits_weak, batch, pseudo))

    def pseudo_labels(self, logits_weak: Tensor, batch: Batch) -> Pseudo:
        """Targets and mask from detached logits of the weak view, or from the teacher's."""
        teacher = self.teacher[0]
        if teacher is not None:
            with torch.no_grad():
                logits_weak = teacher(batch.weak)
        if self.alignment is not None:
            self.alignment.update(logits_weak, batch.observed)
            logits_weak = self.alignment(logits_weak)
        return threshold(logits_weak, batch.observed, tau_pos=self.tau_pos, tau_neg=self.tau_neg, soft=self.soft)

    def denominator(self, mask: Tensor) -> Tensor:
        """Selected entries, averaged over ranks so that the average of their losses is the global mean; or all."""
        return mean_over_ranks(mask.sum()) if self.select else mask.new_tensor(float(mask.numel()))

    def encode(self, features: Tensor) -> Tensor:
        """The batch encoder over this rank's rows [B, C], or over every rank's with the own rows returned."""
        assert self.encoder is not None
        if self.btc_global and world_size() > 1:
            return own_rows(self.encoder(gather_rows(features)), len(features))
        encoded: Tensor = self.encoder(features)
        return encoded

    def on_epoch_end(self, score_all: Callable[[], Tensor]) -> None:
        """MPC makes its pseudo-labels within the step."""

    def param_groups(self, model: nn.Module, lr: float) -> Iterable[dict[str, Any]]:
        """The network at `lr`, the batch encoder at a fraction of it."""
        yield {"params": list(model.parameters()), "lr": lr}
        if self.encoder is not None:
            yield {"params": list(self.encoder.parameters()), "lr": lr * self.encoder_lr_scale}


def monitors(logits_weak: Tensor, batch: Batch, pseudo: Pseudo | None = None) -> dict[str, Tensor]:
    """Sums that say what the pseudo-labels do (docs/method.md, 3.2); true labels enter here alone."""
    with torch.no_grad():
        counts = {
            "images": logits_weak.new_tensor(float(len(logits_weak))),
            "entries": logits_weak.new_tensor(float(logits_weak.numel())),
            "sum_p": torch.sigmoid(logits_weak).sum(),
        }
        if pseudo is not None:
            hidden = batch.known & (batch.labels > 0) & (batch.observed == 0)
            counts |= {
                "selected": pseudo.mask.sum(),
                "pseudo_positives": pseudo.positive.sum().float(),
                "pseudo_positives_known": (pseudo.positive & batch.known).sum().float(),
                "hidden": hidden.sum().float(),
                "recovered": (pseudo.positive & hidden).sum().float(),
            }
        return counts
