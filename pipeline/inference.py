"""A checkpoint at work: from square grey images to probabilities. Needs no Ray, so that a server can carry it alone."""

import hashlib
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import expit

from mpc.build import build_model
from mpc.checkpoint import INFO, Kind, load_into, load_weights, read_info
from mpc.config import CheckpointInfo
from mpc.errors import UserError
from mpc.model import Classifier
from mpc.reference import FILE as REFERENCE
from mpc.reference import Reference
from pipeline.config import RunConfig

DEFAULT_THRESHOLD = 0.5
DEFAULT_FLAG = "default_threshold"
REGISTERED_FILE = "registered.txt"
"""In a downloaded checkpoint: which version of the registry it is."""


class LoadedModel(NamedTuple):
    """A network in evaluation mode with the metadata of its checkpoint."""

    model: Classifier
    info: CheckpointInfo
    device: torch.device
    reference: Reference | None = None
    """What the training images were like, where the checkpoint says so."""

    @torch.inference_mode()
    def outputs(self, images: NDArray[np.uint8]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Logits [N, K] and features [N, C] of images [N, size, size]; no image's result depends on the others."""
        batch = torch.from_numpy(np.array(images)).unsqueeze(1).to(self.device)
        features = self.model.features(batch)
        logits: NDArray[np.float32] = self.model.head(features).float().cpu().numpy()
        return logits, features.cpu().numpy()

    def logits(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Logits [N, K] of images [N, size, size]."""
        return self.outputs(images)[0]

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
    if target.type == "cuda":  # else convolutions run in TF32, and results depend on the batch size beyond 1e-5
        torch.backends.cudnn.allow_tf32 = False
    path = checkpoint / REFERENCE
    reference = Reference.from_bytes(path.read_bytes(), str(path)) if path.is_file() else None
    return LoadedModel(model.to(target).eval(), info, target, reference)


def thresholds(info: CheckpointInfo) -> tuple[NDArray[np.float64], tuple[bool, ...]]:
    """Per finding the probability from which it counts as present, and whether that is only the default of 0.5."""
    chosen = [info.thresholds.get(name) for name in info.findings]
    values = [DEFAULT_THRESHOLD if value is None else value for value in chosen]
    return np.array(values), tuple(value is None for value in chosen)


class Packed(NamedTuple):
    """A checkpoint as bytes, for workers that do not see the driver's disk."""

    info: bytes
    weights: bytes
    reference: bytes
    """Empty where the checkpoint has none."""

    @property
    def digest(self) -> str:
        """SHA-256 of all."""
        return hashlib.sha256(self.info + self.weights + self.reference).hexdigest()


def version_of(checkpoint: Path, info: CheckpointInfo, packed: Packed) -> str:
    """`NAME/3` of a registered model, else the checkpoint's step and the start of its digest."""
    registered = checkpoint / REGISTERED_FILE
    if registered.is_file():
        return registered.read_text(encoding="utf-8").strip()
    return f"step-{info.step}-{packed.digest[:12]}"


def pack(checkpoint: Path) -> Packed:
    """Metadata, averaged weights and reference of a checkpoint as bytes.

    Raises:
        UserError: no checkpoint there, or weights that are no safetensors file.
    """
    read_info(checkpoint)
    kinds: tuple[Kind, ...] = ("ema", "model")
    kind = next((kind for kind in kinds if (checkpoint / f"{kind}.safetensors").is_file()), None)
    if kind is None:
        raise UserError(f"{checkpoint}: no ema.safetensors nor model.safetensors; give a whole checkpoint")
    load_weights(checkpoint, kind)  # a damaged file is told here, not by a task on another machine
    reference = checkpoint / REFERENCE
    held = reference.read_bytes() if reference.is_file() else b""
    return Packed((checkpoint / INFO).read_bytes(), (checkpoint / f"{kind}.safetensors").read_bytes(), held)


def unpack(packed: Packed, device: str) -> LoadedModel:
    """The network of a packed checkpoint, on `device`."""
    with TemporaryDirectory(prefix="mpc-cxr-") as folder:
        (Path(folder) / INFO).write_bytes(packed.info)
        (Path(folder) / "model.safetensors").write_bytes(packed.weights)
        if packed.reference:
            (Path(folder) / REFERENCE).write_bytes(packed.reference)
        return load_model(Path(folder), device)
