"""Saliency: where in an image the evidence for a finding lies, read from one layer of any timm backbone (Captum).

The map of a finding is gradient x activation, summed over channels: how much each place of the layer adds to the
finding's logit, negative where it speaks against it.
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from captum.attr import LayerActivation, LayerGradientXActivation
from numpy.typing import NDArray
from scipy.stats import spearmanr
from torch import Tensor, nn

from mpc.errors import UserError
from mpc.model import Classifier

Method = Literal["hirescam", "gradcam"]


class Saliency:
    """Maps of a network in evaluation mode.

    Args:
        model: the network; its weights are not changed.
        image_size: side of its images in pixels.
        method: `hirescam`: gradient x activation at each place (Draelos & Carin 2020). `gradcam`: gradients are
            averaged over all places first (Selvaraju et al., ICCV 2017). Both agree at the last map before pooling and
            a linear head; at earlier layers Grad-CAM may show places that the network did not use.
        layer: dotted name of a module of the backbone; None takes the deepest stage that has `cells` places a side and
            that the findings depend on (of a transformer with a class token that is not the last block).
        cells: places a side.

    Raises:
        UserError: no such layer, or a backbone that does not say where its stages end.
    """

    def __init__(
        self,
        model: Classifier,
        image_size: int,
        *,
        method: Method = "hirescam",
        layer: str | None = None,
        cells: int = 7,
    ) -> None:
        self.model, self.method = model.eval(), method
        self.device = next(model.parameters()).device
        self.layer = layer if layer is not None else self._deepest(image_size, cells)
        _module(model.backbone, self.layer)

    def maps(self, images: NDArray[np.uint8], findings: Sequence[int]) -> NDArray[np.float32]:
        """Signed evidence [B, h, w] for output `findings[b]` of each image of [B, size, size]."""
        batch = torch.from_numpy(np.array(images)).unsqueeze(1).to(self.device)
        return np.asarray(self._evidence(self.layer, batch, list(findings)).cpu().numpy(), np.float32)

    def _evidence(self, layer: str, batch: Tensor, findings: list[int]) -> Tensor:
        """Maps [B, h, w] at a layer."""
        module, pixels = _module(self.model.backbone, layer), batch.float().requires_grad_()
        target = torch.tensor(findings, device=self.device)
        gradient = LayerGradientXActivation(self.model, module, multiply_by_inputs=self.method == "hirescam")
        found = self._places(gradient.attribute(pixels, target=target).detach(), layer)
        if self.method == "gradcam":
            active = self._places(LayerActivation(self.model, module).attribute(pixels).detach(), layer)
            found = found.mean((1, 2), keepdim=True) * active
        return found.sum(-1).float()

    def _places(self, output: Tensor, layer: str) -> Tensor:
        """A layer's output as [B, h, w, C]: maps with channels in front or behind, or tokens of a grid."""
        backbone: Any = self.model.backbone
        if output.ndim == 4:
            return output if getattr(backbone, "output_fmt", "NCHW") == "NHWC" else output.permute(0, 2, 3, 1)
        if output.ndim != 3:
            raise UserError(f"explain.layer={layer} yields {tuple(output.shape)}; name a module whose output is a map")
        tokens = output[:, getattr(backbone, "num_prefix_tokens", 0) :]
        side = round(tokens.shape[1] ** 0.5)  # images are square
        if side * side != tokens.shape[1]:
            raise UserError(f"explain.layer={layer} yields {tokens.shape[1]} tokens, no square; name another module")
        return tokens.reshape(len(tokens), side, side, -1)

    def _deepest(self, size: int, cells: int) -> str:
        """The deepest stage with enough places on which the findings depend, else the one with the most places."""
        names = stages(self.model.backbone)
        noise = torch.rand(1, 1, size, size, generator=torch.Generator().manual_seed(0)).to(self.device) * 255
        able: dict[str, int] = {}
        for name in reversed(names):
            found = self._evidence(name, noise, [0])
            if found.any():
                able[name] = min(found.shape[1:])
                if able[name] >= cells:
                    return name
        if not able:
            raise UserError(f"no stage of the backbone ({', '.join(names)}) reaches the findings; set explain.layer")
        return max(able, key=lambda name: able[name])


def stages(backbone: nn.Module) -> list[str]:
    """Names of the modules at which a timm backbone's stages end, in order.

    Raises:
        UserError: it does not say.
    """
    found = [str(stage["module"]) for stage in getattr(backbone, "feature_info", None) or []]
    if not found:
        raise UserError(f"{type(backbone).__name__} does not say where its stages end; set explain.layer")
    return found


class Located(NamedTuple):
    """How well a map finds a known place."""

    hit: bool
    """The pointing game (Zhang et al., ECCV 2016): the strongest place lies in it; chance hits by its area."""
    inside: float
    """Share of the evidence that lies in it."""


def locate(evidence: NDArray[np.float32], place: NDArray[np.bool_]) -> Located:
    """Compares evidence >= 0 [h, w] with the place [h, w] where it should be; without evidence nothing is hit."""
    total = float(evidence.sum())
    if total <= 0:
        return Located(False, 0.0)
    return Located(bool(place.flat[int(evidence.argmax())]), float(evidence[place].sum()) / total)


def agreement(one: NDArray[np.float32], other: NDArray[np.float32]) -> float | None:
    """Spearman's rank correlation of two maps of equal shape; None where one of them is constant.

    Maps that stay the same when the weights are replaced by random ones show the image, not the network: the sanity
    check of Adebayo et al., NeurIPS 2018.
    """
    if np.ptp(one) == 0 or np.ptp(other) == 0:
        return None
    return float(spearmanr(one, other, axis=None).statistic)


def _module(backbone: nn.Module, layer: str) -> nn.Module:
    """A module of the backbone by its name."""
    try:
        return backbone.get_submodule(layer)
    except AttributeError:
        raise UserError(
            f"explain.layer={layer}: {type(backbone).__name__} has no such module; its stages end at "
            f"{', '.join(stages(backbone))}"
        ) from None
