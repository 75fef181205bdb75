"""Whether a model version may become champion: a pure function of both versions' metrics."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple


class Decision(StrEnum):
    """What the gate says."""

    ACCEPT = "accept"
    REFUSE = "refuse"


class Verdict(NamedTuple):
    """A decision with its reason in one line."""

    decision: Decision
    reason: str


class Candidate(NamedTuple):
    """What the gate knows of a version."""

    version: str
    metrics: Mapping[str, float]
    data_digest: str
    """Data set that the metrics were measured on."""


@dataclass(frozen=True)
class Gate:
    """Accepts a version that is not worse than the champion on the same metric of the same data."""

    metric: str = "val_macro_auroc"
    """Higher is better; both versions must have it."""
    tolerance: float = 0.0
    """How much lower than the champion's a value may be."""

    def judge(self, new: Candidate, champion: Candidate | None) -> Verdict:
        """The decision for `new`; without a champion anything with the metric is accepted."""
        value = new.metrics.get(self.metric)
        if value is None:
            return Verdict(Decision.REFUSE, f"version {new.version} has no {self.metric}; register it with that metric")
        if champion is None:
            return Verdict(Decision.ACCEPT, f"the first champion: {self.metric} {value:.4f}")
        if champion.version == new.version:
            return Verdict(Decision.ACCEPT, f"version {new.version} is the champion already")
        best = champion.metrics.get(self.metric)
        if best is None:
            return Verdict(Decision.REFUSE, f"champion {champion.version} has no {self.metric} to compare with")
        if champion.data_digest != new.data_digest:
            return Verdict(
                Decision.REFUSE,
                f"{self.metric} of version {new.version} and of champion {champion.version} come from different data",
            )
        compared = f"{self.metric} {value:.4f} against {best:.4f} of champion {champion.version}"
        if value < best - self.tolerance:
            return Verdict(Decision.REFUSE, f"{compared}: lower")
        return Verdict(Decision.ACCEPT, compared)
