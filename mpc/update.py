"""What follows every forward pass: backward, clipping, a step of the optimiser; nothing waits for a GPU."""

from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn

FUSED_DEVICES = ("cpu", "cuda")


def make_optimizer(
    name: Literal["adamw", "sgd"],
    groups: Iterable[dict[str, Any]],
    *,
    lr: float,
    weight_decay: float,
    device: torch.device,
) -> torch.optim.Optimizer:
    """AdamW, or SGD with Nesterov momentum 0.9; fused where the device offers it.

    A fused step is one kernel over all parameters. With a gradient scaler it skips an overflow on the device, where the
    others ask the host first.
    """
    options: dict[str, Any] = {"lr": lr, "weight_decay": weight_decay, "fused": device.type in FUSED_DEVICES}
    optimizer: torch.optim.Optimizer
    if name == "sgd":
        optimizer = torch.optim.SGD(groups, momentum=0.9, nesterov=True, **options)
    else:
        optimizer = torch.optim.AdamW(groups, **options)
    optimizer.register_load_state_dict_post_hook(_lay_out)
    return optimizer


def _lay_out(optimizer: torch.optim.Optimizer) -> None:
    """Lays loaded moments out in memory as their parameters are.

    Fused kernels read both by address: after a change of `train.channels_last` they would mix up the elements.
    """
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                state[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def update(loss: Tensor, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, clip: float) -> None:
    """Backward, gradients of the unscaled loss cut to the norm `clip`, one step; the gradients are gone afterwards.

    Where a float16 gradient has overflowed the step changes nothing and the scale is lowered.
    """
    torch.autograd.backward(scaler.scale(loss))
    scaler.unscale_(optimizer)
    nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], clip)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
