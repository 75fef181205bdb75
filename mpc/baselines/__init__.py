"""The rivals of MPC behind the same protocol (docs/method.md, section 5). LAC-PLC and FixMatch-like are MPC presets."""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from mpc import losses
from mpc.baselines.apl import EmApl
from mpc.baselines.base import Baseline, Plain
from mpc.baselines.epr import Epr
from mpc.baselines.full import Full, Iun
from mpc.baselines.gr import Gr
from mpc.baselines.large_loss import LargeLoss, LargeLossPermanent
from mpc.baselines.role import Role
from mpc.baselines.splc import Splc
from mpc.errors import UserError

if TYPE_CHECKING:
    from mpc.config import MethodConfig

__all__ = ["NAMES", "Baseline", "build"]


def _kappa(config: "MethodConfig") -> float:
    if config.pseudo.kappa is None:
        raise UserError("EPR and ROLE need the mean number of positives an image; set pseudo.kappa")
    return config.pseudo.kappa


_BUILDERS: dict[str, Callable[["MethodConfig"], Baseline]] = {
    "full": lambda c: Full(),
    "iun": lambda c: Iun(),
    "an": lambda c: Plain(losses.assume_negative),
    "an_ls": lambda c: Plain(partial(losses.assume_negative_smoothed, smoothing=c.loss.label_smoothing)),
    "wan": lambda c: Plain(losses.weak_assume_negative),
    "epr": lambda c: Epr(_kappa(c)),
    "role": lambda c: Role(_kappa(c)),
    "em": lambda c: Plain(partial(losses.entropy_maximization, alpha=c.baseline.em_alpha)),
    "em_apl": lambda c: EmApl(
        c.baseline.em_alpha, c.baseline.apl_beta, theta=c.baseline.apl_theta, warmup=c.baseline.apl_warmup
    ),
    "ll_r": lambda c: LargeLoss(c.baseline.ll_delta, drop=True),
    "ll_ct": lambda c: LargeLoss(c.baseline.ll_delta, drop=False),
    "ll_cp": lambda c: LargeLossPermanent(c.baseline.ll_delta),
    "splc": lambda c: Splc(c.baseline.splc_tau),
    "gr": lambda c: Gr(c.baseline.gr_q2, c.baseline.gr_q3),
}
NAMES = tuple(_BUILDERS)
"""What `train.method` accepts beside `mpc`."""


def build(name: str, config: "MethodConfig") -> Baseline:
    """The baseline called `name` with its settings from `config`.

    Raises:
        UserError: no such baseline, or a setting that it needs is absent.
    """
    if name not in _BUILDERS:
        raise UserError(f"train.method {name!r} is unknown; choose mpc, {', '.join(NAMES)}")
    return _BUILDERS[name](config)
