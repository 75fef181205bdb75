"""A checkpoint at work: from square grey images to probabilities. Needs no Ray, so that a server can carry it alone."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import expit

from mpc.build import build_model
from mpc.checkpoint import load_into, read_info
from mpc.config import CheckpointInfo
from mpc.model import Classifier
from pipeline.config import RunConfig

DEFAULT_THRESHOLD = 0.5
DEFAULT_FLAG = "default_threshold"


class LoadedModel(NamedTuple):
    """A network in evaluation mode with the metadata of its checkpoint."""

    model: Classifier
    info: CheckpointInfo
    device: torch.device

    @torch.inference_mode()
    def logits(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Logits [N, K] of images [N, size, size]; no image's result depends on the others."""
        batch = torch.from_numpy(np.array(images)).unsqueeze(1).to(self.device)
        values: NDArray[np.float32] = self.model(batch).float().cpu().numpy()
        return values

    def probabilities(self, images: NDArray[np.uint8]) -> NDArray[np.float64]:
        """Probabilities [N, K] in (0, 1) of images [N, size, size]."""
        values: NDArray[np.float64] = expit(self.logits(images).astype(np.float64))
        return values


def best_device() -> str:
    """A GPU where there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def load_model(checkpoint: Path, device: str = "cpu") -> LoadedModel:
    """The network of a checkpoint with its averaged weights (a registered model carries those alone), in float32.

    Raises:
        UserError: no checkpoint there, a damaged one, or weights of another network.
    """
    info = read_info(checkpoint)
    run = RunConfig.model_validate(info.config)
    model = build_model(run, len(info.findings), info.pixels, weights="none")
    load_into(model, checkpoint, "ema" if (checkpoint / "ema.safetensors").is_file() else "model")
    target = torch.device(device)
    return LoadedModel(model.to(target).eval(), info, target)


def thresholds(info: CheckpointInfo) -> tuple[NDArray[np.float64], tuple[bool, ...]]:
    """Per finding the probability from which it counts as present, and whether that is only the default of 0.5."""
    chosen = [info.thresholds.get(name) for name in info.findings]
    values = [DEFAULT_THRESHOLD if value is None else value for value in chosen]
    return np.array(values), tuple(value is None for value in chosen)
