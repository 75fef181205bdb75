"""What a search draws from: domains of single settings, and the space of them with its conditions."""

import math
import random
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from mpc.errors import UserError

if TYPE_CHECKING:
    from optuna import Trial
    from optuna.distributions import BaseDistribution


class Kind(NamedTuple):
    """What a domain of numbers is like."""

    integer: bool
    log: bool
    """Drawn evenly in the logarithm."""
    stepped: bool
    """In steps from the lower bound on: a third number gives the step."""


KINDS = {
    "uniform": Kind(False, False, False),
    "loguniform": Kind(False, True, False),
    "quniform": Kind(False, False, True),
    "qloguniform": Kind(False, True, True),
    "int": Kind(True, False, False),
    "logint": Kind(True, True, False),
    "qint": Kind(True, False, True),
    "qlogint": Kind(True, True, True),
}
"""Domains of numbers: `[low, high]`, or `[low, high, step]` for those with a q; both ends belong to them."""
CHOICE, WHEN = "choice", "when"

Settings = dict[str, Any]
"""Dotted path and value of what one trial tries; a setting whose condition does not hold is absent."""


class Dimension(NamedTuple):
    """One searched value."""

    path: str
    kind: str
    """`choice`, or one of `KINDS`."""
    values: tuple[Any, ...]
    when: tuple[tuple[str, tuple[Any, ...]], ...] = ()
    """Choices elsewhere, and their values, under which this one is searched; else it keeps the base's value."""

    def edges(self) -> tuple[Any, ...]:
        """Values that must be valid for every value in between to be: both bounds, or each choice."""
        return self.values if self.kind == CHOICE else self.values[:2]

    def active(self, settings: Mapping[str, Any]) -> bool:
        """Whether its condition holds."""
        return all(path in settings and settings[path] in allowed for path, allowed in self.when)

    def fit(self, value: Any) -> Any:
        """The nearest value of the domain."""
        if self.kind == CHOICE:
            return value
        kind, (low, high) = KINDS[self.kind], self.values[:2]
        if kind.stepped or kind.integer:
            step = self.values[2] if kind.stepped else 1
            value = low + round((value - low) / step) * step
        value = min(max(value, low), high)
        return round(value) if kind.integer else round(float(value), 12) if kind.stepped else float(value)

    def draw(self) -> Any:
        """A value at random, by Python's own generator, which Ray's population based training uses too."""
        if self.kind == CHOICE:
            return random.choice(self.values)
        kind, (low, high) = KINDS[self.kind], self.values[:2]
        low, high = (low - 0.5, high + 0.5) if kind.integer and not kind.stepped else (low, high)
        value = math.exp(random.uniform(math.log(low), math.log(high))) if kind.log else random.uniform(low, high)
        return self.fit(value)

    def distribution(self) -> "BaseDistribution":
        """The domain in Optuna's terms; steps in the logarithm, which it does not know, are left to `fit`."""
        from optuna import distributions

        if self.kind == CHOICE:
            return distributions.CategoricalDistribution(self.values)
        kind, (low, high) = KINDS[self.kind], self.values[:2]
        step = self.values[2] if kind.stepped and not kind.log else None
        if kind.integer:
            return distributions.IntDistribution(low, high, log=kind.log, step=step or 1)
        return distributions.FloatDistribution(low, high, log=kind.log, step=step)

    def suggest(self, trial: "Trial") -> Any:
        """A value that Optuna proposes."""
        if self.kind == CHOICE:
            return trial.suggest_categorical(self.path, self.values)
        domain: Any = self.distribution()
        ask = trial.suggest_int if KINDS[self.kind].integer else trial.suggest_float
        return self.fit(ask(self.path, domain.low, domain.high, step=domain.step, log=domain.log))

    def points(self) -> Iterator[Any]:
        """Every value, once; domains of numbers from `low` on.

        Raises:
            UserError: there is no end of them.
        """
        if self.kind == CHOICE:
            yield from dict.fromkeys(self.values)
            return
        kind, (low, high) = KINDS[self.kind], self.values[:2]
        if not (kind.integer or kind.stepped):
            raise UserError(f"{self.path}: a grid needs steps, {self.kind} has none; write choice, or q{self.kind}")
        step = self.values[2] if kind.stepped else 1
        yield from (self.fit(low + number * step) for number in range(round((high - low) / step) + 1))

    def written(self) -> dict[str, Any]:
        """The domain as a space's file holds it."""
        condition = {WHEN: {path: list(allowed) for path, allowed in self.when}} if self.when else {}
        return {self.kind: list(self.values), **condition}

    @classmethod
    def of(cls, path: str, written: Mapping[str, Any]) -> "Dimension":
        """The dimension that `written` came from; nothing is checked."""
        kind = next(name for name in written if name != WHEN)
        when = tuple((name, tuple(allowed)) for name, allowed in written.get(WHEN, {}).items())
        return cls(path, kind, tuple(written[kind]), when)

    def holds(self, value: Any) -> bool:
        """Whether a value is one of the choices, or lies within the bounds."""
        if self.kind == CHOICE:
            return value in self.values
        return isinstance(value, int | float) and self.values[0] <= value <= self.values[1]

    def share(self, value: Any) -> float:
        """Where a value it holds lies from the lower bound, 0, to the upper one, 1; choices lie evenly in between."""
        if self.kind == CHOICE:
            options = list(self.points())
            return options.index(value) / max(1, len(options) - 1)
        low, high, value = (math.log(v) if KINDS[self.kind].log else v for v in (*self.values[:2], value))
        return float((value - low) / (high - low))

    def at(self, share: float) -> float:
        """The number at a share of a domain of numbers."""
        low, high = self.values[:2]
        return float(low * (high / low) ** share if KINDS[self.kind].log else low + share * (high - low))

    def text(self) -> str:
        """The domain for people."""
        shown = f"{self.kind} {', '.join(map(str, self.values))}"
        conditions = [f"{path} is {' or '.join(map(str, allowed))}" for path, allowed in self.when]
        return f"{shown} when {' and '.join(conditions)}" if conditions else shown


class Space(NamedTuple):
    """What is searched; a dimension stands behind those that its condition names."""

    dimensions: tuple[Dimension, ...]

    @property
    def conditional(self) -> bool:
        """Whether any dimension has a condition."""
        return any(dimension.when for dimension in self.dimensions)

    def describe(self) -> list[tuple[str, str]]:
        """Path and domain of every dimension, for people."""
        return [(dimension.path, dimension.text()) for dimension in self.dimensions]

    def suggest(self, trial: "Trial") -> Settings:
        """Settings that Optuna proposes; what is not active is not asked for."""
        settings: Settings = {}
        for dimension in self.dimensions:
            if dimension.active(settings):
                settings[dimension.path] = dimension.suggest(trial)
        return settings

    def fit(self, settings: Mapping[str, Any]) -> Settings:
        """The nearest settings that lie in the space, where every dimension is active."""
        return {dimension.path: dimension.fit(settings[dimension.path]) for dimension in self.dimensions}

    def grid(self) -> Iterator[Settings]:
        """Every combination, each once, one at a time: there may be billions.

        Raises:
            UserError: a dimension has no steps.
        """
        return self.combinations(lambda dimension: dimension.points())

    def combinations(self, values: Any, settings: Settings | None = None, at: int = 0) -> Iterator[Settings]:
        """Every combination of `values(dimension)` over the dimensions, without those that are not active."""
        settings = settings or {}
        if at == len(self.dimensions):
            yield dict(settings)
            return
        dimension = self.dimensions[at]
        if not dimension.active(settings):
            yield from self.combinations(values, settings, at + 1)
            return
        for value in values(dimension):
            yield from self.combinations(values, {**settings, dimension.path: value}, at + 1)
