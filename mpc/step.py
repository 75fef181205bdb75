"""The MPC training step; it reads like section 4 of docs/method.md."""

from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mpc.distributed import gather_rows, mean_over_ranks, own_rows, world_size
from mpc.losses import bce, masked_mean
from mpc.method import Batch, Progress, StepOutput
from mpc.model import BatchEncoder, Classifier, MapDropout
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
        perturb_map: drop channels of the map that enters the last stage (else of the pooled features).
        encoder: the batch encoder of BTC, or None with lambda_btc = 0.
        btc_input: BTC reads `weak` or `strong` features, or `both` in one sequence.
        btc_target: BTC learns the `pseudo` labels, the `observed` ones with `sup_loss`, or `both`, half each.
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
        perturb_map: bool = False,
        encoder: BatchEncoder | None = None,
        btc_input: Literal["weak", "strong", "both"] = "weak",
        btc_target: Literal["pseudo", "observed", "both"] = "pseudo",
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
        self.perturb_rate, self.perturb_map, self.encoder_lr_scale = perturb_rate, perturb_map, encoder_lr_scale
        self.btc_input, self.btc_target, self.btc_global = btc_input, btc_target, btc_global
        self.warmup_epochs, self.ramp_epochs = warmup_epochs, ramp_epochs

    one_process = False

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

        # one forward: all views share the batch statistics of normalisation layers
        images = batch.weak if strong is None else torch.cat([batch.weak, strong])
        dropped = MapDropout(size, self.perturb_rate) if self.perturb_map and self.lambda_fpc > 0 else None
        features = model.features(images, dropped)
        features_weak, features_strong = features[:size], features[size : len(images)]
        logits_weak = model.head(features_weak)
        terms = {"sup": self.sup_loss(logits_weak, batch.observed).mean()}

        pseudo = self.pseudo_labels(logits_weak.detach(), batch)
        count = self.denominator(pseudo.mask)

        if strong is not None:
            terms["ipc"] = consistency(model.head(features_strong), pseudo, count)
        if self.lambda_fpc > 0:
            perturbed = F.dropout(features_weak, self.perturb_rate) if dropped is None else features[len(images) :]
            terms["fpc"] = consistency(model.head(perturbed), pseudo, count)
        if self.encoder is not None:  # also in the warm-up, with weight 0: DDP wants every parameter in the graph
            rows = features[: len(images)] if self.btc_input == "both" else features_weak
            if self.btc_input == "strong" and strong is not None:
                rows = features_strong
            terms["btc"] = self.batch_term(model.head(self.encode(rows)), batch.observed, pseudo, count)

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
        return mean_over_ranks(mask.sum()) if self.select else mask.new_full((), float(mask.numel()))

    def batch_term(self, logits: Tensor, observed: Tensor, pseudo: Pseudo, count: Tensor) -> Tensor:
        """L_BTC of the encoded rows [V * B, K]: towards the pseudo-labels, the observed labels, or half each."""
        parts = []
        if self.btc_target != "observed":
            parts.append(consistency(logits, pseudo, count))
        if self.btc_target != "pseudo":
            parts.append(self.sup_loss(logits, observed.repeat(len(logits) // len(observed), 1)).mean())
        return torch.stack(parts).mean()

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


def consistency(logits: Tensor, pseudo: Pseudo, count: Tensor) -> Tensor:
    """Sum over selected entries of the BCE of V views of the same rows [V * B, K], over V times `count`."""
    views = len(logits) // len(pseudo.mask)
    targets, mask = pseudo.targets.repeat(views, 1), pseudo.mask.repeat(views, 1)
    return masked_mean(bce(logits, targets), mask, views * count)


def monitors(logits_weak: Tensor, batch: Batch, pseudo: Pseudo | None = None) -> dict[str, Tensor]:
    """Sums that say what the pseudo-labels do (docs/method.md, 3.2); true labels enter here alone."""
    with torch.no_grad():
        counts = {  # new_full, not new_tensor: a GPU would be waited for
            "images": logits_weak.new_full((), float(len(logits_weak))),
            "entries": logits_weak.new_full((), float(logits_weak.numel())),
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
