"""Settings that change while a run trains: refused where they cannot, in force where they can, exact after a resume."""

from pathlib import Path
from typing import Any

import pytest
import torch
from runs import PlainHost, tiny

from mpc.checkpoint import load_weights
from mpc.errors import UserError
from pipeline.card import read_card
from pipeline.config import RunConfig
from pipeline.dotted import validate
from pipeline.loop import Loop
from pipeline.setup import relative_rate

TERMS = {"lambda_ipc": 0.5, "lambda_fpc": 0.0, "lambda_btc": 0.1, "warmup_epochs": 0.0, "ramp_epochs": 0.0}


def scheduled(*changes: tuple[int, dict[str, Any]], epochs: int = 3, **loss: float) -> RunConfig:
    schedule = [{"epoch": epoch, "settings": settings} for epoch, settings in changes]
    return tiny(loss={**TERMS, **loss}, train={"epochs": epochs, "batch_size": 8, "schedule": schedule})


def history(run: RunConfig, data: str, out: Path, stop_after: int | None = None) -> list[dict[str, Any]]:
    """The epochs of a run in this process, which may be stopped after some; its checkpoints stay in `out`."""
    lines: list[dict[str, Any]] = []

    class Host(PlainHost):
        def report(self, metrics: dict[str, Any], checkpoint: Path) -> None:
            lines.append(metrics)
            super().report(metrics, checkpoint)
            if len(lines) == stop_after:
                raise KeyboardInterrupt

    out.mkdir(exist_ok=True)
    try:
        Loop(run, data, read_card(data), Host(out)).fit()
    except KeyboardInterrupt:
        assert stop_after is not None
    return lines


def test_settings_change_at_their_epochs(few_data: str, tmp_path: Path) -> None:
    first = {"optim.lr": 0.001, "loss.lambda_ipc": 0.2, "loss.lambda_btc": 0.3, "optim.weight_decay": 0.5}
    run = scheduled((1, first), (2, {"optim.lr": 0.0005}))
    loop = Loop(run, few_data, read_card(few_data), PlainHost(tmp_path))
    lines = history(run, few_data, tmp_path / "whole")
    steps = loop.plan.steps_per_epoch
    for line, lr, weights in zip(lines, (0.003, 0.001, 0.0005), ((0.5, 0.1), (0.2, 0.3), (0.2, 0.3)), strict=True):
        factor = relative_rate(line["step"], warmup=round(0.05 * 3 * steps), total=3 * steps)
        assert line["lr"] == pytest.approx(lr * factor)
        terms = weights[0] * line["loss_ipc"] + weights[1] * line["loss_btc"]
        assert line["loss"] == pytest.approx(line["loss_sup"] + terms, rel=1e-5)
        assert line["settings"]["optim.lr"] == lr
        assert line["settings"]["loss.lambda_ipc"] == weights[0]
    (tmp_path / "halves").mkdir()
    history(run, few_data, tmp_path / "halves", stop_after=2)
    again = history(run, few_data, tmp_path / "halves")
    assert [line["epoch"] for line in again] == [3]
    last = max((tmp_path / "whole").glob("step-*")).name
    whole, halves = (load_weights(tmp_path / name / last, "model") for name in ("whole", "halves"))
    assert all(torch.equal(whole[name], halves[name]) for name in whole), "a resumed schedule is the same schedule"


def test_strengths_of_views_and_perturbation_change_at_their_epochs(few_data: str, tmp_path: Path) -> None:
    """Without any operation the strong view is the weak one, and without dropout the features are: equal terms."""
    calm = {"views.strong.ops": 0, "views.strong.blur": 0.0, "views.strong.cutout": 0.0, "views.red.p": 0.0}
    run = scheduled((1, {**calm, "model.perturb.rate": 0.0}), epochs=2, lambda_fpc=0.5)
    before, after = history(run, few_data, tmp_path / "out")
    assert before["loss_ipc"] != pytest.approx(before["loss_fpc"], rel=1e-3)
    assert after["loss_ipc"] == pytest.approx(after["loss_fpc"], rel=1e-5)


@pytest.mark.parametrize(
    ("changes", "method", "message"),
    [
        ([(1, {"model.backbone": "resnet18"})], "mpc", "model.backbone cannot change while mpc trains"),
        ([(1, {"loss.lambda_ipc": 0.2})], "an", "loss.lambda_ipc cannot change while an trains"),
        ([(1, {"loss.lambda_fpc": 0.0})], "mpc", "cannot go from 0.5 to 0.0"),
        ([(1, {"optim.lr": -1})], "mpc", "optim.lr = -1"),
        ([(1, {"views.red.rms": 0.09})], "mpc", "folds the image"),
        ([(2, {"optim.lr": 0.1}), (1, {"optim.lr": 0.2})], "mpc", "epochs must rise"),
        ([(8, {"optim.lr": 0.1})], "mpc", "lie below train.epochs 8"),
    ],
)
def test_a_schedule_that_cannot_be_followed_is_one_line(
    changes: list[tuple[int, dict[str, Any]]], method: str, message: str
) -> None:
    schedule = [{"epoch": epoch, "settings": settings} for epoch, settings in changes]
    with pytest.raises(UserError) as caught:
        validate(RunConfig, {"train": {"method": method, "schedule": schedule}}, "best.yaml")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("gpus", "workers", "message"), [(1.5, 1, "neither a whole number"), (0.5, 2, "NCCL")])
def test_gpus_that_cannot_be_shared(gpus: float, workers: int, message: str) -> None:
    train = {"gpus": gpus, "num_workers": workers, "use_gpu": True}
    with pytest.raises(UserError, match=message):
        validate(RunConfig, {"train": train}, "--set")
