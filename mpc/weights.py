"""Pretrained weights from a file: tensors alone, nothing else is ever unpickled."""

import io

import torch
from safetensors.torch import load as load_safetensors
from torch import Tensor

from mpc.errors import UserError


def read_tensors(data: bytes, name: str) -> dict[str, Tensor]:
    """Tensors by name out of a .safetensors or .pth file.

    Args:
        data: the file's content.
        name: its name; the ending tells the format.

    Raises:
        UserError: the file is of another kind or holds something else than tensors.
    """
    try:
        if name.endswith(".safetensors"):
            tensors: dict[str, Tensor] = load_safetensors(data)
            return tensors
        loaded = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load has no error of its own; each means that these bytes are not tensors
        raise UserError(
            f"model.weights {name}: not a file of tensors alone ({type(error).__name__}); use .safetensors or .pth"
        ) from error
    loaded = loaded.get("state_dict", loaded) if isinstance(loaded, dict) else loaded
    if not isinstance(loaded, dict) or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise UserError(f"model.weights {name}: holds no mapping of names to tensors; save a state_dict")
    return loaded
