"""The protocol between the training loop and a method: MPC and every baseline speak it."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from mpc.model import Classifier


class Batch(NamedTuple):
    """One rank's slice of a global batch.

    Training reads `observed` alone; `labels` and `known` are for full-label methods and monitors.
    """

    weak: Tensor
    """uint8 [B, 1, H, W], weakly augmented."""
    strong: Tensor | None
    """uint8 [V * B, 1, H, W], V strong views, first the first one of every row; None where the method asks for none."""
    observed: Tensor
    """float32 [B, K] in {0, 1}: one 1 a row."""
    labels: Tensor
    """float32 [B, K] in {0, 1}: full labels, meaningful where `known`."""
    known: Tensor
    """bool [B, K]."""
    row: Tensor
    """int64 [B]: dense row number over the data set."""


class Progress(NamedTuple):
    """Where training stands before a step."""

    step: int
    steps_per_epoch: int
    epochs: int

    @property
    def epoch(self) -> float:
        """Epochs done so far, with the fraction of the running one."""
        return self.step / self.steps_per_epoch


@dataclass(frozen=True, slots=True)
class StepOutput:
    """What one step yields; tensors stay on the device, so that nothing synchronises."""

    loss: Tensor
    """Scalar with gradient; averaged over ranks it is the loss of the global batch."""
    terms: dict[str, Tensor]
    """Detached scalars by name, averaged over steps and ranks for the log."""
    counts: dict[str, Tensor]
    """Detached sums of entries by name, added over steps and ranks: the monitors."""


class Method(Protocol):
    """A way to learn from single positives."""

    @property
    def needs_strong(self) -> bool:
        """Whether batches must carry a strong view."""
        ...

    @property
    def one_process(self) -> bool:
        """Whether it keeps a table over all rows, and so cannot train on several workers."""
        ...

    def setup(self, num_rows: int, num_findings: int) -> None:
        """Called once before training with the number of training rows and of findings."""
        ...

    def step(self, model: Classifier, batch: Batch, progress: Progress) -> StepOutput:
        """Loss of one batch. Pure but for the method's own state; changes no weight."""
        ...

    def on_epoch_end(self, score_all: Callable[[], Tensor]) -> None:
        """`score_all()` gives logits [num_rows, K] of all training rows, for methods that relabel between epochs."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Tensors and numbers that resuming needs."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` gave."""
        ...

    def param_groups(self, model: Classifier, lr: float) -> Iterable[dict[str, Any]]:
        """Optimiser groups: the model's parameters and the method's own, each with its learning rate."""
        ...
