"""Sums over the steps of an epoch, kept on the device and reduced over ranks once, when they are asked for."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mpc.distributed import world_size
from mpc.method import StepOutput

RATIOS = {  # metric: numerator, denominator (docs/method.md, 3.2)
    "selected_share": ("selected", "entries"),
    "pseudo_positives": ("pseudo_positives", "images"),
    "mean_sum_p": ("sum_p", "images"),
    "pseudo_precision": ("recovered", "pseudo_positives_known"),
    "pseudo_recall": ("recovered", "hidden"),
}


class Meter:
    """Loss terms as means over steps, monitors as ratios of sums.

    Args:
        device: where the steps run.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.sums: dict[str, Tensor] = {}

    def add(self, output: StepOutput) -> None:
        """Adds one step; nothing synchronises."""
        for name, value in {"loss": output.loss.detach(), **{f"loss_{k}": v for k, v in output.terms.items()}}.items():
            self._add(f"mean {name}", value)
            self._add(f"steps {name}", torch.ones((), device=self.device))
        for name, value in output.counts.items():
            self._add(name, value)

    def _add(self, name: str, value: Tensor) -> None:
        self.sums[name] = self.sums[name] + value if name in self.sums else value.double()

    def metrics(self) -> dict[str, float]:
        """Means and ratios over all steps and ranks; a ratio over nothing is left out. Every rank must call it."""
        names = sorted(self.sums)
        values = torch.stack([self.sums[name].to(torch.float64) for name in names])
        if world_size() > 1:
            dist.all_reduce(values)
        total = dict(zip(names, values.tolist(), strict=True))
        means = [name.removeprefix("mean ") for name in names if name.startswith("mean ")]
        found = {name: total[f"mean {name}"] / total[f"steps {name}"] for name in means}
        for name, (above, below) in RATIOS.items():
            if above in total and total.get(below):  # a method without pseudo-labels counts none
                found[name] = total[above] / total[below]
        return found

    def state_dict(self) -> dict[str, Any]:
        """The sums so far."""
        return {name: value.cpu() for name, value in self.sums.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` gave."""
        self.sums = {name: value.to(self.device) for name, value in state.items()}
