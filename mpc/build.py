"""Builders: configuration objects stop here, the classes below take plain typed arguments."""

from functools import partial

from torch import Tensor

from mpc import baselines, losses
from mpc.config import MethodConfig, PixelSpec
from mpc.method import Method
from mpc.model import BatchEncoder, Classifier, build
from mpc.pseudo import Alignment
from mpc.step import Mpc, SupLoss


def build_model(
    config: MethodConfig,
    num_findings: int,
    pixels: PixelSpec,
    *,
    tensors: dict[str, Tensor] | None = None,
    weights: str | None = None,
    amp: str = "off",
) -> Classifier:
    """The classifier that `config.model` describes; `weights` overrides its choice (evaluation starts from `none`)."""
    model = config.model
    return build(
        model.backbone,
        num_findings,
        weights=weights or model.weights,
        tensors=tensors,
        drop=model.drop,
        mean=pixels.mean,
        std=pixels.std,
        amp=amp,
    )


def build_sup_loss(config: MethodConfig) -> SupLoss:
    """The supervised loss that `config.loss.sup` names."""
    if config.loss.sup == "wan":
        return losses.weak_assume_negative
    if config.loss.sup == "em":
        return partial(losses.entropy_maximization, alpha=config.baseline.em_alpha)
    if config.loss.sup == "an_ls":
        return partial(losses.assume_negative_smoothed, smoothing=config.loss.label_smoothing)
    return losses.assume_negative


def build_method(name: str, config: MethodConfig, model: Classifier, teacher: Classifier | None = None) -> Method:
    """The method called `name`: `mpc`, or a baseline.

    Raises:
        UserError: no method has that name.
    """
    return build_mpc(config, model, teacher) if name == "mpc" else baselines.build(name, config)


def build_mpc(config: MethodConfig, model: Classifier, teacher: Classifier | None = None) -> Method:
    """MPC with the switches of `config`, for `model`; `teacher` is the evaluation average, used if so configured."""
    loss, pseudo, btc = config.loss, config.pseudo, config.btc
    encoder = BatchEncoder(model.num_features, btc.heads, btc.dropout) if loss.lambda_btc > 0 else None
    alignment = Alignment(pseudo.kappa, model.num_findings) if pseudo.align == "distribution" and pseudo.kappa else None
    return Mpc(
        build_sup_loss(config),
        tau_pos=pseudo.tau_pos,
        tau_neg=pseudo.tau_neg,
        soft=pseudo.form == "soft",
        select=loss.norm == "selected",
        lambda_ipc=loss.lambda_ipc,
        lambda_fpc=loss.lambda_fpc,
        lambda_btc=loss.lambda_btc,
        perturb_rate=config.model.perturb.rate,
        perturb_map=config.model.perturb.place == "before_last_stage",
        encoder=encoder,
        btc_input=btc.input,
        btc_target=btc.target,
        btc_global=btc.scope == "global",
        encoder_lr_scale=btc.lr_scale,
        alignment=alignment,
        teacher=teacher if pseudo.source == "ema" else None,
        warmup_epochs=loss.warmup_epochs,
        ramp_epochs=loss.ramp_epochs,
    )


def adjust(method: Method, config: MethodConfig) -> None:
    """Gives MPC under way the weights, thresholds and rates of `config`; other methods read none of them anew."""
    if isinstance(method, Mpc):
        method.sup_loss = build_sup_loss(config)
        method.tau_pos, method.tau_neg = config.pseudo.tau_pos, config.pseudo.tau_neg
        method.lambda_ipc, method.lambda_fpc = config.loss.lambda_ipc, config.loss.lambda_fpc
        method.lambda_btc = config.loss.lambda_btc
        method.perturb_rate = config.model.perturb.rate
