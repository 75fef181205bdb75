"""Whether a model version may become champion: a pure function of what both versions scored on the same images."""

from collections.abc import Mapping
from enum import StrEnum
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field

from mpc.config import Config, Name, NonNegative

Share = Annotated[float, Field(ge=0.0, le=1.0)]
TITLES = {"auroc": "macro AUROC", "ap": "average precision"}


class Decision(StrEnum):
    """What the gate says."""

    ACCEPT = "accept"
    REFUSE = "refuse"


class Verdict(NamedTuple):
    """A decision with its reason in one line."""

    decision: Decision
    reason: str


class Evidence(NamedTuple):
    """What is known of a version that wants to become champion."""

    version: str
    metrics: Mapping[str, Any]
    """Content of metrics.json, with `comparison` against the champion where there is one."""
    champion: str | None = None
    note: str = ""
    """What a reader should know besides, such as that the versions were trained on different data."""


class Gate(Config):
    """What a version must show on the images of one split: not worse than the champion, no finding too bad.

    Not worse is meant as in trials of non-inferiority: the whole paired interval of the difference, by patient, must
    lie above -margin. An interval that reaches below it is no proof of harm, but neither of harmlessness.
    """

    kind: Literal["paired", "none"] = "paired"
    """`none` lets every version pass, unseen, and says so."""
    metric: Literal["auroc", "ap"] = "auroc"
    """Macro mean that is compared."""
    margin: NonNegative = 0.01
    """How much lower than the champion's the metric may be."""
    minimum: Share = 0.5
    """AUROC that every finding must reach; 0.5 is chance."""
    minimums: dict[Name, Share] = Field(default_factory=dict)
    """AUROC that single findings must reach instead; one that cannot be measured then refuses the version."""

    def judge(self, evidence: Evidence) -> Verdict:
        """The decision: minimum of each finding first, then the champion, if there is another one."""
        refusal = self._below_minimum(evidence)
        if refusal:
            return Verdict(Decision.REFUSE, refusal)
        decision, reason = self._against_champion(evidence)
        return Verdict(decision, "; ".join(text for text in (reason, self._unjudged(evidence), evidence.note) if text))

    def least(self, finding: str) -> float:
        """AUROC that a finding must reach."""
        return self.minimums.get(finding, self.minimum)

    def _below_minimum(self, evidence: Evidence) -> str:
        """Which findings are too bad, or cannot be judged although they must; empty where none is."""
        scores = {name: row["auroc"] for name, row in evidence.metrics["findings"].items()}
        unknown = [name for name in self.minimums if scores.get(name) is None]
        if unknown:
            return f"{', '.join(unknown)}: gate.minimums names what these images cannot judge; choose others"
        low = [name for name, value in scores.items() if value is not None and value < self.least(name)]
        if low:
            shown = ", ".join(f"{name} {scores[name]:.3f} (at least {self.least(name):g})" for name in low)
            return f"AUROC below the minimum: {shown}"
        if all(value is None for value in scores.values()):
            return "no finding has both outcomes among these images, so that nothing can be judged; choose others"
        return ""

    def _unjudged(self, evidence: Evidence) -> str:
        """Findings without a score."""
        metrics = evidence.metrics
        unmeasured = [name for name, row in metrics["findings"].items() if row["auroc"] is None]
        reasons = {
            "for want of both outcomes": unmeasured,
            "absent from the data": metrics["finding_map"]["model_only"],
        }
        return "; ".join(f"not judged, {reason}: {', '.join(names)}" for reason, names in reasons.items() if names)

    def _against_champion(self, evidence: Evidence) -> Verdict:
        title, metrics = TITLES[self.metric], evidence.metrics
        value, split = metrics["macro"][self.metric], metrics["split"]
        if evidence.champion is None:
            return Verdict(Decision.ACCEPT, f"the first champion: {title} {value:.4f} on {split}")
        if evidence.champion == evidence.version:
            return Verdict(Decision.ACCEPT, f"version {evidence.version} is the champion already")
        found = metrics["comparison"]["macro"]
        difference, bounds = found[self.metric], found[f"{self.metric}_interval"]
        against = f"champion {evidence.champion} on {metrics['n_images']:,} images of {split}"
        if bounds is None:
            return Verdict(Decision.REFUSE, f"too few patients for an interval of the difference to {against}")
        shown = (
            f"{title} {value:.4f}, {difference:+.4f} [{bounds[0]:+.4f}, {bounds[1]:+.4f}] against {against}, "
            f"{metrics['n_patients']:,} patients"
        )
        if bounds[1] < 0:
            return Verdict(Decision.REFUSE, f"{shown}: lower")
        if bounds[0] < -self.margin:
            return Verdict(Decision.REFUSE, f"{shown}: may be lower by more than gate.margin {self.margin:g}")
        return Verdict(Decision.ACCEPT, shown + (": higher" if bounds[0] > 0 else f": not lower by {self.margin:g}"))
