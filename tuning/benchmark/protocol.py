"""A benchmark as a file: data, network, methods, seeds and the same search budget for every method."""

from itertools import product
from typing import Annotated, Any

from pydantic import Field, model_validator

from mpc.config import Config, Count
from pipeline.prepare_config import PrepareConfig

Seed = Annotated[int, Field(ge=0)]
Values = Annotated[tuple[Any, ...], Field(min_length=1)]
Grid = dict[str, Values]
"""Dotted paths of a training run, each with the values to try; every combination is one trial."""


class MethodEntry(Config):
    """One row of the table."""

    preset: str | None = None
    """Preset that the method starts from; None starts from the defaults."""
    run: dict[str, Any] = Field(default_factory=dict)
    """Settings over the preset and over the protocol's own."""
    space: Grid | None = None
    """What tuning tries; None takes the protocol's."""


class TuningPlan(Config):
    """The first stage: each method chooses its settings by validation, on seeds that the table never sees."""

    seeds: Annotated[tuple[Seed, ...], Field(min_length=1)]
    trials: Count
    """Settings that each method tries, the same number for all; the best mean over `seeds` is kept."""
    space: Grid
    """What methods without a space of their own try."""


class Protocol(Config):
    """What is compared, on what, and how often."""

    title: str
    prepare: PrepareConfig | None = None
    """How the data are made; None expects a prepared data set with --data."""
    findings: tuple[str, ...] | None = None
    """Findings that a given data set must have."""
    folds: Count = 1
    """Parts of a cross-validation by patient: each image is tested once. 1 keeps the data set's own test split."""
    run: dict[str, Any] = Field(default_factory=dict)
    """Settings of a training run that all methods share."""
    tuning: TuningPlan | None = None
    """None compares the methods with the settings that they come with."""
    seeds: Annotated[tuple[Seed, ...], Field(min_length=2)]
    """One replicate each: seed of the drawn positives, of the training and, where data are synthetic, of the images."""
    metric: str = "val_macro_auroc"
    """Validation metric that chooses settings and epochs."""
    lower: str = "an"
    upper: str = "full"
    """Methods between which the gap is measured."""
    against: tuple[str, ...] = ("an", "wan")
    """Methods from which every other is paired."""
    ours: tuple[str, ...] = ("mpc",)
    """Methods that are tested against all rivals, corrected after Holm."""
    oracles: tuple[str, ...] = ("full", "iun")
    """Methods that see true labels: in the table, but no rivals."""
    methods: Annotated[dict[str, MethodEntry], Field(min_length=2)]

    @property
    def generated(self) -> bool:
        """Whether every seed is a data set of its own."""
        return self.prepare is not None and self.prepare.source == "phantom"

    @model_validator(mode="after")
    def consistent(self) -> "Protocol":
        """Named methods exist; every method tries the same number of settings, on seeds of its own."""
        for name in (self.lower, self.upper, *self.against, *self.ours):
            if name not in self.methods:
                raise ValueError(f"{name} is named but not among the methods; add it to methods")
        if self.folds > 1 and (self.prepare is None or self.generated):
            raise ValueError("folds need a real collection in prepare; use folds: 1")
        if self.tuning is not None:
            self._same_budget(self.tuning)
        return self

    def _same_budget(self, tuning: TuningPlan) -> None:
        for name, method in self.methods.items():
            number = len(combinations(method.space or tuning.space))
            if number != tuning.trials:
                raise ValueError(
                    f"methods.{name} tries {number} settings, tuning.trials is {tuning.trials}; match them"
                )
        shared = sorted(set(tuning.seeds) & set(self.seeds))
        if shared and self.generated:
            raise ValueError(f"seed {shared[0]} is used for tuning and for the table; keep them apart")


def combinations(space: Grid) -> list[dict[str, Any]]:
    """Every combination of a grid, in the order of its lists: dotted path -> value."""
    return [dict(zip(space, values, strict=True)) for values in product(*space.values())]
