"""Switches of the step beyond its defaults: two strong views, the place of FPC, what BTC reads and learns."""

from typing import Any

import pytest
import torch
from torch import Tensor

from mpc.build import build_mpc
from mpc.config import MethodConfig
from mpc.errors import UserError
from mpc.losses import assume_negative, bce, entropy_maximization
from mpc.method import Batch, Progress
from mpc.model import Classifier, MapDropout, build, last_stage_input
from mpc.pseudo import threshold
from mpc.step import Mpc

ROWS, FINDINGS, START = 4, 5, Progress(0, 1, 1)
WITHOUT_DROPOUT = {"btc": {"dropout": 0.0}, "loss": {"warmup_epochs": 0, "ramp_epochs": 0}}


def network(backbone: str = "test_efficientnet_gn") -> Classifier:
    torch.manual_seed(0)
    return build(backbone, FINDINGS).train()


def batch(strong_views: int = 1) -> Batch:
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, ((1 + strong_views) * ROWS, 1, 32, 32), generator=generator, dtype=torch.uint8)
    observed = torch.nn.functional.one_hot(torch.arange(ROWS) % FINDINGS, FINDINGS).float()
    return Batch(images[:ROWS], images[ROWS:], observed, observed, observed >= 0, torch.arange(ROWS))


def method(model: Classifier, /, **sections: dict[str, Any]) -> Mpc:
    torch.manual_seed(2)
    merged = {k: {**WITHOUT_DROPOUT.get(k, {}), **sections.get(k, {})} for k in {*WITHOUT_DROPOUT, *sections}}
    built = build_mpc(MethodConfig.model_validate(merged), model)
    assert isinstance(built, Mpc)
    return built


def terms(model: Classifier, batch: Batch, /, **sections: dict[str, Any]) -> dict[str, float]:
    torch.manual_seed(3)
    return {name: term.item() for name, term in method(model, **sections).step(model, batch, START).terms.items()}


def test_two_strong_views_give_the_mean_of_their_losses() -> None:
    model, both = network(), batch(strong_views=2)
    first, second = (both._replace(strong=half) for half in both.strong.chunk(2))
    one, other, together = (terms(model, part)["ipc"] for part in (first, second, both))
    assert one != pytest.approx(other, rel=1e-3)
    assert together == pytest.approx((one + other) / 2, rel=1e-5)


def encoded_logits(model: Classifier, batch: Batch, which: str) -> tuple[Tensor, Mpc]:
    step = method(model, btc={"input": which})
    weak, strong = model.features(batch.weak), model.features(batch.strong)
    rows = {"weak": weak, "strong": strong, "both": torch.cat([weak, strong])}[which]
    return model.head(step.encode(rows)), step


@pytest.mark.parametrize("which", ["weak", "strong", "both"])
def test_btc_reads_the_features_that_it_is_told_to(which: str) -> None:
    model, data = network(), batch()
    logits, step = encoded_logits(model, data, which)
    views = len(logits) // ROWS
    pseudo = threshold(model(data.weak), data.observed, tau_pos=step.tau_pos, tau_neg=step.tau_neg)
    loss = (bce(logits, pseudo.targets.repeat(views, 1)) * pseudo.mask.repeat(views, 1)).sum()
    expected = (loss / (views * pseudo.mask.sum())).item()
    assert terms(model, data, btc={"input": which})["btc"] == pytest.approx(expected, rel=1e-5)


def test_btc_learns_observed_labels_pseudo_labels_or_half_of_each() -> None:
    model, data = network(), batch()
    logits, _ = encoded_logits(model, data, "both")
    pseudo, observed, half = (
        terms(model, data, btc={"input": "both", "target": target})["btc"] for target in ("pseudo", "observed", "both")
    )
    assert observed == pytest.approx(assume_negative(logits, data.observed.repeat(2, 1)).mean().item(), rel=1e-5)
    assert half == pytest.approx((pseudo + observed) / 2, rel=1e-6)


@pytest.mark.parametrize("backbone", ["test_efficientnet_gn", "test_resnet", "densenet121", "test_convnext"])
def test_channels_dropped_before_the_last_stage_leave_the_other_rows_alone(backbone: str) -> None:
    model, images = network(backbone).eval(), batch().weak  # no batch statistics, so that rows do not see each other
    plain = model.features(images)
    torch.manual_seed(4)
    kept = model.features(images, MapDropout(2, 0.0))
    torch.testing.assert_close(kept[:ROWS], plain, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(kept[ROWS:], plain[:2], rtol=1e-4, atol=1e-5)
    dropped = model.features(images, MapDropout(2, 0.5))
    torch.testing.assert_close(dropped[:ROWS], plain, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(dropped[ROWS:], plain[:2], rtol=1e-3, atol=1e-4)
    assert len(model.features(images)) == ROWS  # nothing stays hooked


def test_fpc_before_the_last_stage_sends_its_gradient_through_both_stages() -> None:
    model = network()
    step = method(model, model={"perturb": {"place": "before_last_stage"}}, loss={"lambda_ipc": 0, "lambda_btc": 0})
    output = step.step(model, batch(), START)
    assert output.terms.keys() == {"sup", "fpc"}
    (output.loss - step.sup_loss(model(batch().weak), batch().observed).mean()).backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
    assert any(p.grad.abs().sum() > 0 for p in last_stage_input(model.backbone).parameters())


def test_a_backbone_without_stages_is_refused() -> None:
    with pytest.raises(UserError, match=r"set model\.perturb\.place=last"):
        network("test_vit").features(batch().weak.repeat(1, 1, 5, 5), MapDropout(2, 0.5))


def test_a_lambda_of_zero_skips_its_branch() -> None:
    model = network()
    for name in ("ipc", "fpc", "btc"):
        left = terms(model, batch(), loss={f"lambda_{name}": 0})
        assert left.keys() == {"sup", "ipc", "fpc", "btc"} - {name}


def test_entropy_maximisation_is_a_choice_of_the_supervised_loss() -> None:
    model, data = network(), batch()
    only = {"lambda_ipc": 0, "lambda_fpc": 0, "lambda_btc": 0}
    mine = terms(model, data, loss={"sup": "em", **only}, baseline={"em_alpha": 0.3})["sup"]
    assert mine == pytest.approx(
        entropy_maximization(model(data.weak), data.observed, alpha=0.3).mean().item(), rel=1e-6
    )
