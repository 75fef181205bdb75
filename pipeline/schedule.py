"""Settings that change while a run trains: population based training finds such a schedule, `train` replays it."""

from collections.abc import Iterator
from typing import Annotated, Any, NamedTuple, TypeVar

from pydantic import Field, ValidationError

from mpc.config import Config, MethodConfig
from pipeline.dotted import explain, flat, merge, nested

WEIGHTS = ("loss.lambda_ipc", "loss.lambda_fpc", "loss.lambda_btc")
"""A term that is off stays off: its branch has no encoder, and the stream draws no view for it."""
OF_VIEWS = ("views.hflip", "views.weak.crop")
OF_STRONG_VIEWS = (
    *("views.strong.ops", "views.strong.magnitude", "views.strong.blur", "views.strong.cutout"),
    *("views.red.rms", "views.red.sigma", "views.red.p"),
)
OF_OPTIMISER = ("optim.lr", "optim.weight_decay", "optim.clip")
OF_MPC = (
    *WEIGHTS,
    *("loss.label_smoothing", "baseline.em_alpha", "pseudo.tau_pos", "pseudo.tau_neg", "model.perturb.rate"),
    *OF_STRONG_VIEWS,
)


class Change(Config):
    """Settings that take other values from an epoch on."""

    epoch: Annotated[int, Field(ge=1)]
    """Epochs done when they change."""
    settings: dict[str, Any]
    """Dotted paths and their new values."""


def changeable(method: str) -> tuple[str, ...]:
    """Settings that may change while `method` trains: those that it reads anew in each step."""
    return (*(OF_MPC if method == "mpc" else ()), *OF_VIEWS, *OF_OPTIMISER)


R = TypeVar("R", bound=MethodConfig)


def settings_at(run: R, changes: tuple[Change, ...], epoch: float) -> R:
    """The run once `epoch` epochs are done, without its schedule."""
    tree = run.model_dump(mode="json")
    tree["train"]["schedule"] = []
    for change in changes:
        for path, value in change.settings.items() if change.epoch <= epoch else ():
            tree = merge(tree, nested(path, value))
    return type(run).model_validate(tree)


def in_force(now: MethodConfig, changes: tuple[Change, ...]) -> dict[str, Any]:
    """The values that `now` has of all settings that ever change."""
    values = flat(now.model_dump(mode="json"))
    return {path: values[path] for change in changes for path in change.settings}


def check_schedule(run: MethodConfig, changes: tuple[Change, ...], method: str, epochs: int) -> None:
    """Refuses a schedule that cannot be followed.

    Raises:
        ValueError: epochs out of order or past the end, settings that cannot change, values that they cannot take.
    """
    before, last = flat(run.model_dump(mode="json")), 0
    for change in changes:
        where = f"train.schedule, epoch {change.epoch}"
        if not last < change.epoch < epochs:
            raise ValueError(f"{where}: epochs must rise and lie below train.epochs {epochs}")
        last = change.epoch
        fixed = sorted(change.settings.keys() - set(changeable(method)))
        if fixed:
            raise ValueError(
                f"{where}: {fixed[0]} cannot change while {method} trains; what can: {', '.join(changeable(method))}"
            )
        for path in WEIGHTS:
            new = change.settings.get(path, before[path])
            if (new == 0) != (before[path] == 0):
                raise ValueError(
                    f"{where}: {path} cannot go from {before[path]} to {new}: a term is on or off for a whole run"
                )
        try:
            settings_at(run, changes, change.epoch)
        except ValidationError as error:
            raise ValueError(f"{where}: {explain(error)}") from error


class Stage(NamedTuple):
    """Steps with the same settings."""

    epoch: int
    """Epochs done where it begins."""
    stop: int
    """The step at which it ends."""


def stages(changes: tuple[Change, ...], epochs: int, steps_per_epoch: int, step: int) -> Iterator[Stage]:
    """What is left of a run from `step` on, cut where settings change."""
    starts = [0, *(change.epoch for change in changes)]
    for start, end in zip(starts, [*starts[1:], epochs], strict=True):
        if step < end * steps_per_epoch:
            yield Stage(start, end * steps_per_epoch)
