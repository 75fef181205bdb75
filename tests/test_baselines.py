"""Hand-checked values of every baseline (section 7 of docs/method.md), edge cases, and training over the protocol."""

import copy
import math
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from mpc import baselines, losses
from mpc.baselines.apl import EmApl, em_apl, lowest
from mpc.baselines.epr import Epr, expected_positives
from mpc.baselines.full import Full, Iun
from mpc.baselines.gr import schedule
from mpc.baselines.large_loss import LargeLoss, LargeLossPermanent, correct, quota, reject
from mpc.baselines.role import Role, role
from mpc.baselines.splc import Splc
from mpc.build import build_method
from mpc.config import BaselineConfig, MethodConfig, PseudoConfig
from mpc.errors import UserError
from mpc.method import Batch, Progress
from mpc.model import Classifier


def logits_of(rows: list[list[float]]) -> Tensor:
    p = torch.tensor(rows, dtype=torch.float64)
    return torch.log(p / (1 - p))


S = logits_of([[0.8, 0.3, 0.7, 0.1], [0.2, 0.9, 0.45, 0.05]])
THETA = logits_of([[0.99, 0.5, 0.7, 0.2], [0.4, 0.99, 0.3, 0.1]])
Z = torch.tensor([[1, 0, 0, 0], [0, 1, 0, 0]], dtype=torch.float64)
Y = torch.tensor([[1, 0, 1, 0], [0, 1, 0, 0]], dtype=torch.float64)
KNOWN = torch.tensor([[True, True, True, False], [True] * 4])
FIRST, SECOND = Progress(0, 10, 8), Progress(10, 10, 8)
CONFIG = MethodConfig(pseudo=PseudoConfig(kappa=1.5))


def batch(observed: Tensor = Z, labels: Tensor = Y, known: Tensor = KNOWN, rows: tuple[int, ...] = (0, 1)) -> Batch:
    return Batch(torch.zeros(len(rows), 1, 4, 4), None, observed, labels, known, torch.tensor(rows))


def total(method: baselines.Baseline, progress: Progress = FIRST, logits: Tensor = S, **changes: Any) -> float:
    terms, _ = method.terms(logits, batch(**changes), progress)
    return float(sum(term.detach() for term in terms.values()))


def exactly(value: float) -> Any:
    return pytest.approx(value, abs=1e-8, rel=0)


@pytest.mark.parametrize(("name", "value"), [("an", 0.35834827), ("an_ls", 0.48725012), ("wan", 0.14682477)])
def test_assumed_negatives_by_hand(name: str, value: float) -> None:
    assert total(baselines.build(name, CONFIG)) == exactly(value)


def test_an_with_half_the_smoothing_by_hand() -> None:
    config = CONFIG.model_copy(update={"loss": CONFIG.loss.model_copy(update={"label_smoothing": 0.05})})
    assert total(baselines.build("an_ls", config)) == exactly(0.42279919)


def test_epr_by_hand() -> None:
    assert expected_positives(S.sigmoid(), 1.5).item() == exactly(0.00390625)
    assert total(Epr(1.5)) == exactly(0.04496926)


def test_role_by_hand() -> None:
    assert float(sum(role(S, THETA, Z, 1.5).values())) == exactly(0.57782467)


def test_entropy_maximization_by_hand() -> None:
    assert total(baselines.build("em", CONFIG)) == exactly(-0.03228369)
    soft = torch.zeros(2, 4, dtype=torch.float64)
    soft[0, 3], soft[1, 3] = 0.12, 0.02
    assert em_apl(S, Z, soft, soft > 0, alpha=0.2, beta=0.02).mean().item() == exactly(-0.01799571)


@pytest.mark.parametrize(("count", "value"), [(2, 0.13312205), (6, 0.04106301), (7, 0.04106301), (100, 0.04106301)])
def test_large_loss_rejection_by_hand(count: int, value: float) -> None:
    loss, marked = reject(S, Z, count)
    assert loss.mean().item() == exactly(value)
    assert not (marked & (Z > 0)).any()  # observed positives stay, however many are asked for
    assert marked.sum() == min(count, 6)


def test_large_loss_correction_by_hand() -> None:
    loss, marked = correct(S, Z, 2)
    assert loss.mean().item() == exactly(0.27751988)
    assert marked.nonzero().tolist() == [[0, 2], [1, 2]]


def test_full_supervision_and_iun_by_hand() -> None:
    # rows of -log p or -log(1 - p), the unknown entry [0, 3] at no cost; IUN also leaves the hidden positive [0, 2] out
    rest = [-math.log(1 - p) for p in (0.3, 0.2, 0.45, 0.05)]
    positives = -math.log(0.8) - math.log(0.9)
    assert total(Full()) == exactly((sum(rest) + positives - math.log(0.7)) / 8)
    assert total(Iun()) == exactly((sum(rest) + positives) / 8)


def test_only_full_and_iun_read_true_labels() -> None:
    for name in baselines.NAMES:
        values = []
        for labels, known in ((Y, KNOWN), (1 - Y, ~KNOWN)):
            torch.manual_seed(0)
            method = baselines.build(name, CONFIG)
            method.setup(2, 4)
            values.append(total(method, SECOND, labels=labels, known=known))
        assert (values[0] != values[1]) == (name in ("full", "iun")), name


def test_of_equal_losses_the_earlier_goes() -> None:
    logits = torch.zeros(2, 3)
    observed = torch.tensor([[1.0, 0, 0], [0, 1, 0]])
    for count, expected in ((1, [[0, 1]]), (3, [[0, 1], [0, 2], [1, 0]])):
        marked = losses.largest_unobserved(losses.assume_negative(logits, observed), observed, count)
        assert marked.nonzero().tolist() == expected
    assert losses.largest_unobserved(logits, torch.ones(2, 3), 2).sum() == 0


def test_large_loss_quota_follows_the_epoch() -> None:
    assert [quota(448, e * 0.002) for e in range(3)] == [0, 1, 2]
    assert quota(1000, 0.1 * 3) == 300  # 0.30000000000000004
    method = LargeLoss(delta=0.25, drop=True)
    assert total(method, FIRST) == exactly(0.35834827)
    assert total(method, SECOND) == exactly(0.13312205)  # 8 * 0.25 = 2
    assert total(LargeLoss(delta=0.25, drop=False), SECOND) == exactly(0.27751988)


def test_permanent_correction_stays_and_grows() -> None:
    method = LargeLossPermanent(delta=0.125)  # one entry a batch
    method.setup(5, 4)
    assert total(method, FIRST, rows=(3, 1)) == exactly(0.35834827)
    assert not method.flipped.any()
    assert total(method, SECOND, rows=(3, 1)) == exactly(correct(S, Z, 1)[0].mean().item())
    assert method.flipped.nonzero().tolist() == [[3, 2]]
    assert total(method, SECOND, rows=(3, 1)) == exactly(0.27751988)  # the next largest beside the first
    assert method.flipped.nonzero().tolist() == [[1, 2], [3, 2]]
    for _ in range(10):
        total(method, SECOND, rows=(3, 1))
    assert method.flipped.sum() == 6  # never an observed positive
    assert not method.flipped[0].any()


def test_role_table_starts_as_written_and_by_row() -> None:
    torch.manual_seed(0)
    method = Role(kappa=1.5)
    method.setup(500, 4)
    start = method.table.detach().clone()
    assert start.abs().max() <= math.log(0.6 / 0.4) + 1e-6
    assert start.abs().max() > 0.4
    total(method, rows=(7, 400))
    expected = start.clone()
    expected[7, 0] = expected[400, 1] = 5.2933
    torch.testing.assert_close(method.table.detach(), expected, atol=1e-4, rtol=0)
    with torch.no_grad():
        method.table[7, 0] = 1.0
    total(method, rows=(7, 400))
    assert method.table[7, 0] == 1.0  # set once, then learnt
    terms, _ = method.terms(S, batch(rows=(7, 400)), FIRST)
    sum(terms.values()).backward()
    assert method.table.grad.any(1).nonzero().flatten().tolist() == [7, 400]


def test_role_halves_teach_across_without_gradient() -> None:
    logits, estimates = S.clone().requires_grad_(), THETA.clone().requires_grad_()
    terms = role(logits, estimates, Z, 1.5)
    (terms["sup"] + terms["epr"] + terms["fit"]).backward()
    assert estimates.grad is None
    before = logits.grad.clone()
    terms["estimate"].backward()
    assert torch.equal(logits.grad, before)
    assert estimates.grad.any()


def test_gradient_of_expected_positives() -> None:
    p = S.sigmoid().requires_grad_()
    expected_positives(p, 1.5).backward()
    torch.testing.assert_close(p.grad, torch.full_like(p, 2 * (1.75 - 1.5) / 16 / 2))


def two_ranks(rank: int, port: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    logits = S[rank : rank + 1].clone().requires_grad_()
    value = expected_positives(logits.sigmoid(), 1.5)
    value.backward()
    refused = []
    for name in ("role", "em_apl", "ll_cp"):
        try:
            baselines.build(name, CONFIG).setup(2, 4)
        except UserError as error:
            refused.append("set train.num_workers=1" in str(error))
    torch.save({"value": value.detach(), "grad": logits.grad / 2, "refused": refused}, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.long
def test_two_ranks_share_expected_positives_and_refuse_tables(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(two_ranks, args=(port, str(tmp_path)), nprocs=2)
    logits = S.clone().requires_grad_()
    value = expected_positives(logits.sigmoid(), 1.5)
    value.backward()
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        torch.testing.assert_close(found["value"], value.detach())
        torch.testing.assert_close(found["grad"], logits.grad[rank : rank + 1])
        assert found["refused"] == [True] * 3


def test_apl_labels_the_least_likely_and_keeps_them() -> None:
    torch.manual_seed(0)
    method = EmApl(alpha=0.2, beta=0.02, theta=0.9, warmup=0.5)
    method.setup(20, 2)
    observed = torch.zeros(18, 2)
    observed[:8, 0] = observed[8:, 1] = 1.0
    epochs = 4  # labels are given at the ends of epochs 2 and 3, each time half of 90 %
    rows = batch(observed=observed, labels=observed, known=observed >= 0, rows=tuple(range(18)))
    scores = torch.randn(20, 2)
    given = []
    for epoch in range(epochs):
        method.terms(torch.zeros(18, 2), rows, Progress(epoch * 5, 5, epochs))
        method.on_epoch_end(lambda: scores)
        given.append(method.labelled.sum(0).tolist())
    assert given == [[0, 0], [int(0.45 * 10), int(0.45 * 8)], [2 * 4, 2 * 3], [8, 6]]
    assert not method.labelled[18:].any()  # rows that training never saw
    assert not (method.labelled[:18] & (observed > 0)).any()
    for k in range(2):
        free = (observed[:, k] == 0).nonzero().flatten()
        order = free[scores[free, k].argsort()]
        assert set(method.labelled[:, k].nonzero().flatten().tolist()) == set(order[: given[-1][k]].tolist())
    torch.testing.assert_close(method.soft[method.labelled], scores[method.labelled].sigmoid())


def test_apl_marks_by_column_and_by_index() -> None:
    scores = torch.tensor([[0.5, 0.1], [0.5, 0.2], [0.1, 0.3]])
    eligible = torch.tensor([[True, False], [True, True], [False, True]])
    assert lowest(scores, eligible, torch.tensor([1, 5])).tolist() == [[True, False], [False, True], [False, True]]


def test_apl_with_a_score_of_zero_still_counts_as_labelled() -> None:
    method = EmApl(alpha=0.2, beta=0.5, theta=1.0, warmup=0.0)
    method.setup(2, 4)
    total(method, Progress(0, 5, 2))
    method.on_epoch_end(lambda: torch.full((2, 4), -1000.0))
    assert (method.labelled == (Z == 0)).all()
    expected = (losses.positives_only(S, Z) + (1 - Z) * 0.5 * torch.nn.functional.softplus(S)).mean().item()
    assert total(method, Progress(5, 5, 2)) == exactly(expected)


def test_splc_by_hand() -> None:
    def focal(p: float, positive: bool) -> float:
        if not positive:
            return p**2 * -math.log(1 - p)
        shifted = 1 / (1 + (1 - p) / p * math.e)  # sigmoid(s - 1)
        return (1 - shifted) ** 2 * -math.log(shifted)

    rows = [(0.8, True), (0.3, False), (0.7, False), (0.1, False), (0.2, False), (0.9, True), (0.45, False)]
    rows.append((0.05, False))
    assert total(Splc(0.6), FIRST) == exactly(sum(focal(*row) for row in rows) / 8)
    rows[2] = (0.7, True)  # the hidden positive, p > .6
    assert total(Splc(0.6), SECOND) == exactly(sum(focal(*row) for row in rows) / 8)


def test_gr_by_hand() -> None:
    settings = {"slope": 1.0, "bias": -2.0, "center": 0.65, "width": 1.25}  # the middle of the schedule
    loss = losses.generalized_robust(S, Z, **settings)
    p = 0.7
    k = 1 / (1 + math.exp(-(1.0 * p - 2.0)))
    v = math.exp(-((p - 0.65) ** 2) / (2 * 1.25**2))
    assert loss[0, 2].item() == exactly(v * (k * (1 - p**0.01) / 0.01 + (1 - k) * p))  # q3 = 1: 1 - (1 - p) = p
    assert loss[0, 0].item() == exactly(-math.log(0.8))
    s = S.clone().requires_grad_()
    losses.generalized_robust(s, Z, **settings)[0, 2].backward()
    slope = v * (-k * p ** (0.01 - 1) + (1 - k)) * p * (1 - p)  # k and v carry no gradient
    assert s.grad[0, 2].item() == exactly(slope)


def test_gr_schedule_runs_from_first_to_last_epoch() -> None:
    steps = [schedule(Progress(5 * e, 5, 8)) for e in range(8)]
    assert steps[0] == {"slope": 0.0, "bias": -2.0, "center": 0.5, "width": 2.0}
    assert steps[7] == pytest.approx({"slope": 2.0, "bias": -2.0, "center": 0.8, "width": 0.5})
    assert schedule(Progress(3, 5, 8)) == steps[0]
    assert schedule(Progress(0, 5, 1)) == steps[0]


@pytest.mark.parametrize("name", baselines.NAMES)
@pytest.mark.parametrize("extreme", [200.0, -200.0])
def test_extreme_logits_stay_finite(name: str, extreme: float) -> None:
    logits = torch.full((2, 4), extreme, requires_grad=True)
    method = baselines.build(name, CONFIG)
    method.setup(2, 4)
    terms, _ = method.terms(logits, batch(Z.float(), Y.float()), SECOND)
    loss = torch.stack(list(terms.values())).sum()
    assert torch.isfinite(loss)
    assert torch.isfinite(torch.autograd.grad(loss, logits)[0]).all()


class Linear(Classifier):
    """A network small enough to train in a test."""

    def __init__(self) -> None:
        super().__init__(nn.Flatten(), 16, 4)


def train(method: Any, model: Classifier, steps: range, optimizer: torch.optim.Optimizer) -> list[float]:
    torch.manual_seed(1)
    images = torch.randint(0, 256, (8, 1, 4, 4), dtype=torch.uint8)
    observed = nn.functional.one_hot(torch.arange(8) % 4, 4).float()
    seen = []
    for step in steps:
        rows = torch.arange(4) + 4 * (step % 2)
        one = Batch(images[rows], None, observed[rows], observed[rows], observed[rows] >= 0, rows)
        output = method.step(model, one, Progress(step, 2, 6))
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        seen.append(output.loss.item())
        assert output.loss.item() == pytest.approx(sum(t.item() for t in output.terms.values()), rel=1e-5, abs=1e-6)
        assert output.counts["images"] == 4
        if step % 2 == 1:
            method.on_epoch_end(lambda: model(images).detach())
    return seen


def start(name: str) -> tuple[Any, Classifier, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = Linear()
    config = CONFIG.model_copy(update={"baseline": BaselineConfig(ll_delta=0.05)})
    method = build_method(name, config, model)
    method.setup(8, 4)
    return method, model, torch.optim.AdamW(method.param_groups(model, 0.01))


@pytest.mark.parametrize("name", baselines.NAMES)
def test_every_baseline_trains_and_resumes_exactly(name: str) -> None:
    method, model, optimizer = start(name)
    assert not method.needs_strong
    train(method, model, range(6), optimizer)
    states = copy.deepcopy([part.state_dict() for part in (method, model, optimizer)])
    straight = train(method, model, range(6, 12), optimizer)
    resumed = start(name)
    for part, state in zip(resumed, states, strict=True):
        part.load_state_dict(state)
    assert train(resumed[0], resumed[1], range(6, 12), resumed[2]) == straight


def test_table_learns_faster_than_the_network_and_does_not_decay() -> None:
    method, _, optimizer = start("role")
    network, table = optimizer.param_groups
    assert table["lr"] == pytest.approx(10 * network["lr"])
    assert table["weight_decay"] == 0
    assert table["params"][0] is method.table


def test_corrections_reach_the_monitors() -> None:
    model = Linear()
    method = Splc(tau=0.01)
    labels = torch.ones(2, 4)
    observed = Z.float()
    one = Batch(torch.zeros(2, 1, 4, 4), None, observed, labels, labels > 0, torch.arange(2))
    counts = method.step(model, one, SECOND).counts
    assert counts["pseudo_positives"] == counts["hidden"] == counts["recovered"] == 6


def test_unknown_or_incomplete_methods_are_refused() -> None:
    with pytest.raises(UserError, match="'splcc' is unknown; choose mpc, full"):
        build_method("splcc", CONFIG, Linear())
    with pytest.raises(UserError, match=r"set pseudo\.kappa"):
        baselines.build("role", MethodConfig())
