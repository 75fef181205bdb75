"""Sums over the steps of an epoch, kept on the device and reduced over ranks once, when they are asked for."""

from typing import Any

import torch
import torch.distributed as dist

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
        self.names: list[str] = []
        self.totals = torch.zeros(0, dtype=torch.float64, device=device)
        self._zero, self._one = torch.tensor([0.0, 1.0], device=device).unbind()

    def add(self, output: StepOutput) -> None:
        """Adds one step, as one vector: three operations however many names there are, and nothing synchronises."""
        means = {"loss": output.loss.detach(), **{f"loss_{name}": value for name, value in output.terms.items()}}
        values = {f"mean {name}": value for name, value in means.items()}
        values |= {f"steps {name}": self._one for name in means}
        values |= output.counts
        fresh = [name for name in values if name not in self.names]
        if fresh:  # a term that begins after the warm-up
            self.names += fresh
            self.totals = torch.cat([self.totals, self.totals.new_zeros(len(fresh))])
        self.totals += torch.stack([values.get(name, self._zero) for name in self.names])

    def metrics(self) -> dict[str, float]:
        """Means and ratios over all steps and ranks; a ratio over nothing is left out. Every rank must call it."""
        names = sorted(self.names)  # ranks may have met them in another order
        values = self.totals[[self.names.index(name) for name in names]]
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
        return dict(zip(self.names, self.totals.cpu().unbind(), strict=True))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` gave."""
        self.names = list(state)
        self.totals = self.totals.new_tensor([float(value) for value in state.values()])
