"""The network: a timm backbone with one linear head, the batch encoder of BTC, and the evaluation average."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import timm
import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn import functional as F

from mpc.errors import UserError

AMP_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
Pairs = tuple[list[Tensor], list[Tensor]]
"""Tensors of the average, and those of the trained network, in the same order."""


class Classifier(nn.Module):
    """Grey images to one logit a finding.

    Args:
        backbone: maps float images [B, 1, H, W] to pooled features [B, C].
        num_features: C.
        num_findings: K.
        mean: subtracted from pixels in [0, 1].
        std: divides them.
        amp: `off`, `bf16` or `fp16`: autocast of the backbone alone; the head stays in float32.
    """

    def __init__(
        self,
        backbone: nn.Module,
        num_features: int,
        num_findings: int,
        *,
        mean: float = 0.449,
        std: float = 0.226,
        amp: str = "off",
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(num_features, num_findings)
        self.num_features, self.num_findings = num_features, num_findings
        self.mean, self.std = mean, std
        self.amp = AMP_DTYPES.get(amp)

    def features(self, images: Tensor, dropped: "MapDropout | None" = None) -> Tensor:
        """Pooled features, float32 [B, C], of images [B, 1, H, W] with values 0-255, uint8 or float.

        With `dropped`, its rows follow once more at the end, perturbed before the last stage: [B + rows, C].
        """
        pixels = (images.float() / 255.0 - self.mean) / self.std
        perturbing = dropped.at(last_stage_input(self.backbone)) if dropped else nullcontext()
        with perturbing, torch.autocast(images.device.type, dtype=self.amp, enabled=self.amp is not None):
            pooled: Tensor = self.backbone(pixels)
        return pooled.flatten(1).float()

    def forward(self, images: Tensor) -> Tensor:
        """Logits, float32 [B, K], of images [B, 1, H, W] with values 0-255."""
        logits: Tensor = self.head(self.features(images))
        return logits


class MapDropout(NamedTuple):
    """Channel dropout of a map inside the backbone (FPC; UniMatch): only what follows the map runs once more."""

    rows: int
    """How many of the first images get a perturbed copy."""
    rate: float
    """Probability that a channel is zeroed, in [0, 1)."""

    @contextmanager
    def at(self, module: nn.Module) -> Iterator[None]:
        """While it lasts, the output [B, C, H, W] of `module` carries the perturbed copies behind the originals."""

        def append(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            return torch.cat([output, F.dropout2d(output[: self.rows], self.rate)])

        handle = module.register_forward_hook(append)
        try:
            yield
        finally:
            handle.remove()


def last_stage_input(backbone: nn.Module) -> nn.Module:
    """The module of a timm backbone whose output, a map [B, C, H, W], enters the last stage.

    Raises:
        UserError: the backbone does not say where its stages end, or has no maps with channels in front.
    """
    stages: list[dict[str, Any]] = getattr(backbone, "feature_info", None) or []
    if len({stage["reduction"] for stage in stages}) < 2 or getattr(backbone, "output_fmt", "NCHW") != "NCHW":
        raise UserError(f"{type(backbone).__name__} has no stages of maps [B, C, H, W]; set model.perturb.place=last")
    return backbone.get_submodule(stages[-2]["module"])


class BatchEncoder(nn.Module):
    """One transformer encoder layer whose sequence axis is the mini-batch (BatchFormer; Hou et al., CVPR 2022).

    Post-norm, ReLU, feed-forward width C, no positional code; it exists during training only.

    Args:
        num_features: C, divisible by `heads`.
        heads: attention heads.
        dropout: inside the layer.
    """

    def __init__(self, num_features: int, heads: int = 4, dropout: float = 0.5) -> None:
        super().__init__()
        if num_features % heads:
            raise UserError(
                f"btc.heads {heads} does not divide the backbone's {num_features} features; choose a divisor of it"
            )
        self.layer = nn.TransformerEncoderLayer(num_features, heads, num_features, dropout, batch_first=False)

    def forward(self, features: Tensor) -> Tensor:
        """[B, C] to [B, C]: every row attends to every row."""
        encoded: Tensor = self.layer(features.unsqueeze(1))
        return encoded.squeeze(1)


class Ema(ModelEmaV3):  # type: ignore[misc]
    """Average of the weights for evaluation; its decay grows as min(decay, (1 + t) / (10 + t)).

    The tensors of both networks are listed once, by the first update: timm walks both state dicts in every step, which
    takes a DenseNet-121 10 ms. From then on neither network may be moved or get other parameters.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        super().__init__(model, decay=decay)
        self.module.requires_grad_(False)
        self._averaged: Pairs | None = None
        self._copied: Pairs = ([], [])

    def get_decay(self, step: int | None = None) -> float:
        """Share of the old average that update number `step` keeps."""
        assert step is not None
        decay: float = self.decay
        return min(decay, (1 + step) / (10 + step))

    @torch.no_grad()
    def update(self, model: nn.Module, step: int | None = None) -> None:
        """Moves the average towards `model`, the same network in every call; whole numbers are copied."""
        if self._averaged is None:
            pairs = list(zip(self.module.state_dict().values(), model.state_dict().values(), strict=True))
            self._averaged = _columns([pair for pair in pairs if pair[0].is_floating_point()])
            self._copied = _columns([pair for pair in pairs if not pair[0].is_floating_point()])
        own, trained = self._averaged
        torch._foreach_lerp_(own, trained, weight=1.0 - self.get_decay(step))
        if self._copied[0]:
            torch._foreach_copy_(*self._copied)


def _columns(pairs: list[tuple[Tensor, Tensor]]) -> Pairs:
    return [own for own, _ in pairs], [trained for _, trained in pairs]


def build(
    backbone: str,
    num_findings: int,
    *,
    weights: str = "none",
    tensors: dict[str, Tensor] | None = None,
    drop: float = 0.0,
    mean: float = 0.449,
    std: float = 0.226,
    amp: str = "off",
) -> Classifier:
    """A classifier on the timm model `backbone`.

    Args:
        backbone: timm model name.
        num_findings: K.
        weights: `imagenet` takes timm's own (needs a network); anything else starts from `tensors` or at random.
        tensors: pretrained weights as `mpc.weights.read_tensors` gives them.
        drop: dropout rate inside the backbone.
        mean: of pixels in [0, 1].
        std: of pixels in [0, 1].
        amp: `off`, `bf16` or `fp16`.

    Raises:
        UserError: unknown model name, or weights that do not fit.
    """
    options: dict[str, Any] = {"in_chans": 1, "num_classes": 0, **({"drop_rate": drop} if drop else {})}
    if not timm.is_model(backbone.split(".")[0]):
        near = timm.list_models(f"*{backbone[:6]}*")[:5]
        raise UserError(f"model.backbone {backbone!r} is not a timm model; near: {', '.join(near) or 'none'}")
    network = timm.create_model(backbone, pretrained=weights == "imagenet", **options)
    if tensors is not None:
        fit_weights(network, tensors, weights)
    num_features = int(getattr(network, "head_hidden_size", None) or network.num_features)
    return Classifier(network, num_features, num_findings, mean=mean, std=std, amp=amp)


def fit_weights(network: nn.Module, tensors: dict[str, Tensor], name: str) -> None:
    """Copies pretrained tensors into a backbone: by name, or, where all names differ, by order and shape.

    A colour stem is summed to one channel, as timm does: the same response to a grey image. A classifier at the end of
    `tensors` is left out.

    Raises:
        UserError: names and shapes do not match.
    """
    own = network.state_dict()
    if own.keys() <= tensors.keys():
        source = {key: tensors[key] for key in own}
    else:
        source = dict(zip(own, tensors.values(), strict=False))
    fitted = {key: _grey(value, own[key]) for key, value in source.items()}
    wrong = next((key for key in own if key not in fitted or fitted[key].shape != own[key].shape), None)
    if wrong is not None:
        found = tuple(source[wrong].shape) if wrong in source else "nothing"
        raise UserError(
            f"model.weights {name}: {wrong} needs shape {tuple(own[wrong].shape)}, found {found}; "
            f"use weights of the configured backbone"
        )
    network.load_state_dict(fitted)


def _grey(value: Tensor, target: Tensor) -> Tensor:
    """A stem for three colours as one for grey; any other tensor as it is."""
    if value.ndim == 4 and target.ndim == 4 and value.shape[1] == 3 and target.shape[1] == 1:
        return value.sum(1, keepdim=True)
    return value
