"""Hand-checked values and structure of the MPC step: section 7 of docs/method.md."""

from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor, nn

from mpc import losses
from mpc.build import build_mpc
from mpc.config import MethodConfig
from mpc.errors import UserError
from mpc.method import Batch, Progress
from mpc.model import BatchEncoder, Classifier, Ema, MapDropout, build, fit_weights
from mpc.pseudo import Alignment, align, threshold
from mpc.step import Mpc
from mpc.weights import read_tensors


def probabilities(*rows: list[float]) -> Tensor:
    p = torch.tensor(rows, dtype=torch.float64)
    return torch.log(p / (1 - p))


OBSERVED = torch.tensor([[1, 0, 0, 0], [0, 1, 0, 0]], dtype=torch.float64)
WEAK = probabilities([0.8, 0.3, 0.7, 0.1], [0.2, 0.9, 0.45, 0.05])
STRONG = probabilities([0.7, 0.4, 0.5, 0.2], [0.3, 0.8, 0.5, 0.1])
PERTURBED = probabilities([0.75, 0.35, 0.6, 0.15], [0.25, 0.85, 0.4, 0.1])
BATCHED = probabilities([0.7, 0.25, 0.55, 0.1], [0.2, 0.8, 0.35, 0.05])

MPC_TABLE = [  # tau_pos, tau_neg, selected, L_IPC, L_FPC, L_BTC, total, L_IPC over all entries
    (0.6, 0.4, 7, 0.35271004, 0.27819587, 0.26359070, 0.98195160, 0.30862129),
    (0.6, 0.25, 6, 0.32635745, 0.25276469, 0.25957548, 0.94087580, 0.24476809),
    (0.88, 0.12, 4, 0.22708064, 0.17952011, 0.18411808, 0.76724801, 0.11354032),
    (0.97, 0.03, 2, 0.28990925, 0.22510050, 0.28990925, 0.90576239, 0.07247731),
    (0.4, 0.06, 5, 0.41429467, 0.39653557, 0.45575418, 1.19878783, 0.25893417),
]


def test_assume_negative_and_weak_assume_negative_by_hand() -> None:
    matrix = torch.tensor(
        [[0.22314, 0.35667, 1.20397, 0.10536], [0.22314, 0.10536, 0.59784, 0.05129]], dtype=torch.float64
    )
    torch.testing.assert_close(losses.assume_negative(WEAK, OBSERVED), matrix, atol=5e-6, rtol=0)
    assert losses.assume_negative(WEAK, OBSERVED).mean().item() == pytest.approx(0.35834827, abs=5e-9)
    assert losses.weak_assume_negative(WEAK, OBSERVED).mean().item() == pytest.approx(0.14682477, abs=5e-9)
    for smoothing, value in ((0.1, 0.48725012), (0.05, 0.42279919)):
        smoothed = losses.assume_negative_smoothed(WEAK, OBSERVED, smoothing=smoothing)
        assert smoothed.mean().item() == pytest.approx(value, abs=5e-9)


class Scripted(Classifier):
    """A network whose logits are written down: features of view v are one-hot codes that the head looks up."""

    def __init__(self, *views: Tensor) -> None:
        super().__init__(nn.Identity(), 1, views[0].shape[1])
        self.logits = torch.cat(views).double().requires_grad_()
        self.head = nn.Identity()

    def features(self, images: Tensor, dropped: MapDropout | None = None) -> Tensor:
        return self.logits[images.flatten().long()]


class Lookup(BatchEncoder):
    """Stands where the transformer stands and answers with logits that are written down."""

    def __init__(self, logits: Tensor) -> None:
        nn.Module.__init__(self)
        self.logits = logits

    def forward(self, features: Tensor) -> Tensor:
        return self.logits + 0 * features


def scripted_batch() -> Batch:
    index = torch.arange(4, dtype=torch.uint8).reshape(4, 1, 1, 1)
    return Batch(index[:2], index[2:], OBSERVED, OBSERVED, OBSERVED >= 0, torch.arange(2))


@pytest.mark.parametrize(("tau_pos", "tau_neg", "selected", "ipc", "fpc", "btc", "total", "ipc_all"), MPC_TABLE)
def test_every_term_of_the_step_by_hand(
    tau_pos: float,
    tau_neg: float,
    selected: int,
    ipc: float,
    fpc: float,
    btc: float,
    total: float,
    ipc_all: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # channel dropout is random; the hand-checked value belongs to one outcome of it, which is put in its place
    monkeypatch.setattr("mpc.step.F.dropout", lambda features, rate: PERTURBED + 0 * features)
    method = Mpc(losses.assume_negative, tau_pos=tau_pos, tau_neg=tau_neg, encoder=Lookup(BATCHED))
    output = method.step(Scripted(WEAK, STRONG), scripted_batch(), Progress(0, 1, 1))
    assert output.counts["selected"] == selected
    expected = {"sup": 0.35834827, "ipc": ipc, "fpc": fpc, "btc": btc}
    assert {k: v.item() for k, v in output.terms.items()} == pytest.approx(expected, abs=5e-9)
    assert output.loss.item() == pytest.approx(total, abs=1e-8)

    everything = Mpc(losses.assume_negative, tau_pos=tau_pos, tau_neg=tau_neg, select=False, encoder=Lookup(BATCHED))
    output = everything.step(Scripted(WEAK, STRONG), scripted_batch(), Progress(0, 1, 1))
    assert output.terms["ipc"].item() == pytest.approx(ipc_all, abs=5e-9)


def test_without_fpc_and_btc_the_step_is_lac() -> None:
    method = Mpc(losses.assume_negative, tau_pos=0.6, tau_neg=0.4, lambda_fpc=0, lambda_btc=0)
    output = method.step(Scripted(WEAK, STRONG), scripted_batch(), Progress(0, 1, 1))
    assert output.terms.keys() == {"sup", "ipc"}
    assert output.loss.item() == pytest.approx(0.35834827 + 0.35271004, abs=1e-8)


def test_gradient_of_ipc_reaches_the_strong_view_alone() -> None:
    model = Scripted(WEAK, STRONG)
    method = Mpc(losses.assume_negative, tau_pos=0.6, tau_neg=0.4, lambda_fpc=0, lambda_btc=0)
    with_ipc = torch.autograd.grad(method.step(model, scripted_batch(), Progress(0, 1, 1)).loss, model.logits)[0]
    expected = torch.tensor([[-0.0429, 0.0571, -0.0714, 0.0286], [0.0429, -0.0286, 0, 0.0143]], dtype=torch.float64)
    torch.testing.assert_close(with_ipc[2:], expected, atol=5e-5, rtol=0)
    supervised = losses.assume_negative(model.logits[:2], OBSERVED).mean()
    torch.testing.assert_close(with_ipc[:2], torch.autograd.grad(supervised, model.logits)[0][:2])


def no_loss(logits: Tensor, observed: Tensor) -> Tensor:
    return 0 * logits


def test_fpc_and_btc_send_gradient_into_the_weak_features() -> None:
    torch.manual_seed(0)
    model = Classifier(nn.Flatten(), 8, 4)
    images = torch.rand(3, 1, 2, 4, requires_grad=True)
    observed = torch.eye(4)[:3]
    batch = Batch(images, images.detach(), observed, observed, observed >= 0, torch.arange(3))
    for name in ("fpc", "btc"):
        weights = {"lambda_ipc": 0.0, "lambda_fpc": 0.0, "lambda_btc": 0.0, f"lambda_{name}": 1.0}
        encoder = BatchEncoder(8, 2, 0.0) if name == "btc" else None
        output = Mpc(no_loss, tau_pos=0.6, tau_neg=0.4, encoder=encoder, **weights).step(
            model, batch, Progress(0, 1, 1)
        )
        assert torch.autograd.grad(output.loss, images)[0].abs().sum() > 0, name


def test_alignment_by_hand() -> None:
    aligned = align(
        WEAK, prior=torch.tensor([0.6, 0.4, 0.3, 0.1]).double(), running=torch.tensor([0.5, 0.2, 0.2, 0.1]).double()
    )
    expected = torch.tensor([[0.8571, 0.5333, 0.8, 0.1], [0.2727, 0.96, 0.5838, 0.05]], dtype=torch.float64)
    torch.testing.assert_close(torch.sigmoid(aligned), expected, atol=5e-5, rtol=0)


def test_alignment_undoes_the_shrinkage_of_assume_negative() -> None:
    torch.manual_seed(0)
    alignment = Alignment(kappa=2.0, num_findings=4)
    observed = torch.eye(4).repeat(64, 1)
    for _ in range(300):
        alignment.update(torch.logit(torch.full((256, 4), 0.25)) + 0.1 * torch.randn(256, 4), observed)
    assert torch.sigmoid(alignment(torch.logit(torch.full((1, 4), 0.25)))).mean().item() == pytest.approx(0.5, abs=0.01)


def test_nothing_selected_costs_exactly_nothing() -> None:
    logits = torch.zeros(2, 4, requires_grad=True)
    pseudo = threshold(logits, torch.zeros(2, 4), tau_pos=0.9, tau_neg=0.1)
    loss = losses.masked_mean(losses.bce(logits, pseudo.targets), pseudo.mask, pseudo.mask.sum())
    loss.backward()
    assert loss.item() == 0.0
    assert torch.equal(logits.grad, torch.zeros(2, 4))


def test_extreme_logits_stay_finite() -> None:
    extreme = torch.tensor([[200.0, -200.0]])
    torch.testing.assert_close(losses.bce(extreme, 1 - torch.sigmoid(extreme)), torch.tensor([[200.0, 200.0]]))
    assert torch.equal(losses.entropy(extreme), torch.zeros(1, 2))


def test_ramp_waits_and_rises() -> None:
    method = Mpc(losses.assume_negative, tau_pos=0.6, tau_neg=0.4, lambda_btc=0, warmup_epochs=1, ramp_epochs=2)
    assert [method.ramp(Progress(step, 10, 5)) for step in (0, 9, 10, 20, 30, 40)] == [0, 0, 0, 0.5, 1, 1]


def test_warm_up_skips_the_strong_forward() -> None:
    method = Mpc(losses.assume_negative, tau_pos=0.6, tau_neg=0.4, lambda_fpc=0, lambda_btc=0, warmup_epochs=1)
    output = method.step(Scripted(WEAK), scripted_batch(), Progress(0, 10, 5))  # would fail to look up strong rows
    assert output.terms.keys() == {"sup"}


def test_batch_encoder_attends_across_the_batch() -> None:
    torch.manual_seed(0)
    encoder = BatchEncoder(16, heads=4, dropout=0.0).double()
    features = torch.randn(6, 16, dtype=torch.float64, requires_grad=True)
    out, order = encoder(features), torch.randperm(6)
    torch.testing.assert_close(encoder(features[order]), out[order])  # equivariant
    gradient = torch.autograd.grad((out[0] * torch.randn(16).double()).sum(), features)[0]
    assert (gradient.abs().sum(1) > 0).all()  # row 0 reads every row
    weights = torch.randn(16).double()  # a sum alone is constant after the normalisation: it would prove nothing
    wrong_axis = encoder.layer(features.unsqueeze(0)).squeeze(0)  # the batch where the layer expects it: rows alone
    assert torch.autograd.grad((wrong_axis[0] * weights).sum(), features)[0][1:].abs().sum() == 0
    same = features[:1].expand(5, -1)
    torch.testing.assert_close(encoder(same), encoder(features[:1]).expand(5, -1))


def test_batch_encoder_of_one_row_is_its_closed_form() -> None:
    torch.manual_seed(0)
    layer = BatchEncoder(16, heads=4, dropout=0.0).double().layer
    x = torch.randn(1, 16, dtype=torch.float64)
    v = torch.nn.functional.linear(x, layer.self_attn.in_proj_weight[32:], layer.self_attn.in_proj_bias[32:])
    h = layer.norm1(x + layer.self_attn.out_proj(v))
    expected = layer.norm2(h + layer.linear2(torch.relu(layer.linear1(h))))
    torch.testing.assert_close(layer(x.unsqueeze(1)).squeeze(1), expected)


def test_channel_dropout_on_the_map_equals_dropout_on_pooled_features() -> None:
    torch.manual_seed(0)
    maps = torch.rand(4, 64, 5, 5)
    torch.manual_seed(1)
    pooled_after = nn.functional.dropout2d(maps, 0.5).mean((2, 3))
    torch.manual_seed(1)
    pooled_before = nn.functional.dropout(maps.mean((2, 3)), 0.5)
    torch.testing.assert_close(pooled_after, pooled_before)
    dropped = nn.functional.dropout2d(torch.ones(8, 64, 3, 3), 0.5)
    assert set(dropped.unique().tolist()) == {0.0, 2.0}
    assert (dropped.flatten(2).amin(2) == dropped.flatten(2).amax(2)).all()


def test_evaluation_never_sees_the_batch_encoder() -> None:
    torch.manual_seed(0)
    model = build("test_efficientnet_gn", 4)
    method = build_mpc(MethodConfig(), model)
    assert not any("encoder" in name for name in model.state_dict())
    images = torch.randint(0, 256, (2, 1, 32, 32), dtype=torch.uint8)
    before = model.eval()(images)
    nn.init.normal_(method.encoder.layer.linear1.weight)
    torch.testing.assert_close(model(images), before, rtol=0, atol=0)


def test_evaluation_average_follows_its_warm_up() -> None:
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    ema = Ema(model, 0.999)
    nn.init.ones_(model.weight)
    ema.update(model, step=1)
    assert ema.module.weight.item() == pytest.approx(1 - 2 / 11)
    assert Ema(model, 0.0).get_decay(10**6) == 0.0


def test_autocast_agrees_with_float32() -> None:
    torch.manual_seed(0)
    images = torch.randint(0, 256, (4, 1, 64, 64), dtype=torch.uint8)
    exact = build("test_efficientnet_gn", 4).eval()
    mixed = build("test_efficientnet_gn", 4, amp="bf16").eval()
    mixed.load_state_dict(exact.state_dict())
    assert mixed(images).dtype == torch.float32
    torch.testing.assert_close(mixed(images), exact(images), rtol=1e-2, atol=1e-2)


def test_colour_weights_fit_a_grey_backbone_by_name_and_by_order() -> None:
    colour = timm.create_model("test_resnet", num_classes=0)
    grey = timm.create_model("test_resnet", num_classes=0, in_chans=1)
    for tensors in (colour.state_dict(), {f"x{i}": v for i, v in enumerate(colour.state_dict().values())}):
        fit_weights(grey, tensors, "a file")
        image = torch.rand(2, 1, 32, 32)
        torch.testing.assert_close(grey.eval()(image), colour.eval()(image.expand(-1, 3, -1, -1)), rtol=1e-4, atol=1e-4)
    with pytest.raises(UserError, match="needs shape"):
        fit_weights(timm.create_model("test_efficientnet_gn", num_classes=0, in_chans=1), colour.state_dict(), "a file")


def test_an_unknown_backbone_is_named() -> None:
    with pytest.raises(UserError, match="densenet1221"):
        build("densenet1221", 4)


def test_weights_are_read_without_unpickling_anything_else(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(3.0)}
    torch.save({"state_dict": tensors}, tmp_path / "w.pth")
    assert torch.equal(read_tensors((tmp_path / "w.pth").read_bytes(), "w.pth")["a"], tensors["a"])
    torch.save({"a": Path("x")}, tmp_path / "object.pth")  # an object that only pickle could bring back
    for content in ((tmp_path / "object.pth").read_bytes(), b"no file of tensors"):
        for name in ("w.pth", "w.safetensors"):
            with pytest.raises(UserError, match=r"model\.weights w"):
                read_tensors(content, name)


def test_assume_negative_makes_probabilities_sum_to_one() -> None:
    """Its optimum is E[y_k / n | x] (docs/method.md, 3.2): a network that fits AN predicts one positive an image."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(4096, 16, generator=generator)
    labels = (features @ torch.randn(16, 6, generator=generator) > 0).float()
    labels[labels.sum(1) == 0, 0] = 1
    network = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 6))
    optimizer = torch.optim.Adam(network.parameters(), 3e-3)
    for _ in range(600):
        rows = torch.randint(0, 4096, (256,), generator=generator)
        drawn = torch.multinomial(labels[rows], 1, generator=generator)  # another of the n positives each time
        observed = torch.zeros(256, 6).scatter(1, drawn, 1.0)
        loss = losses.assume_negative(network(features[rows]), observed).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert labels.sum(1).mean() > 2.5
    assert torch.sigmoid(network(features)).sum(1).mean().item() == pytest.approx(1.0, abs=0.05)
