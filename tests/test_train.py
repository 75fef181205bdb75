"""Training through the public door: exact continuation, equal workers, refusals."""

import gc
import json
import weakref
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from runs import EXACT, PlainHost, assert_equal, assert_same, tiny

from mpc.baselines import NAMES
from mpc.checkpoint import load_weights, read_info
from mpc.errors import UserError
from pipeline.card import read_card
from pipeline.divergence import DivergedError
from pipeline.host import Metrics
from pipeline.loop import Loop
from pipeline.plan import make_plan
from pipeline.record import MetricsLog
from pipeline.scoring import require_validation
from pipeline.stream import scan
from pipeline.train import train

RELABELLING = {"mpc", "ll_r", "ll_ct", "ll_cp", "splc"}


@pytest.mark.parametrize("place", ["stream", "device"])
def test_a_run_continues_from_every_checkpointed_step_bit_for_bit(
    place: str, phantom_data: str, tmp_path: Path
) -> None:
    """A run that ends after each of its checkpoints, in a loop of its own every time, equals one that never ended."""
    views = {"place": place, "strong": {"count": 2}}
    run = tiny(
        views=views, train={"checkpoint_every": 5}, pseudo={"align": "distribution", "kappa": 2.5, "source": "ema"}
    )
    card = read_card(phantom_data)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    whole.mkdir(), broken.mkdir()
    Loop(run, phantom_data, card, PlainHost(whole)).fit()
    names = sorted(folder.name for folder in whole.iterdir())
    per_epoch = make_plan(card, seed=0, batch_size=32).steps_per_epoch
    steps = {*range(5, 2 * per_epoch, 5), per_epoch, 2 * per_epoch}
    assert names == [f"step-{step:08d}" for step in sorted(steps)]  # most of them inside an epoch
    for _ in names:
        with pytest.raises(KeyboardInterrupt):
            Loop(run, phantom_data, card, PlainHost(broken, once=True)).fit()
    for name in names:
        assert_same(whole / name, broken / name)


def test_a_loop_leaves_nothing_behind(phantom_data: str, tmp_path: Path) -> None:
    """Trials share a process: a loop in a reference cycle held its network until the collector came by, if it did."""
    gc.disable()
    try:
        loop = Loop(tiny(train={"epochs": 1}), phantom_data, read_card(phantom_data), PlainHost(tmp_path))
        loop.fit()
        seen = weakref.ref(loop), weakref.ref(loop.model)
        del loop
        assert [reference() for reference in seen] == [None, None]
    finally:
        gc.enable()


def test_views_on_the_device_are_drawn_anew_in_every_step(phantom_data: str, tmp_path: Path) -> None:
    card, seen = read_card(phantom_data), []
    loop = Loop(tiny(views={"place": "device"}), phantom_data, card, PlainHost(tmp_path))
    step = loop.method.step
    loop.method.step = lambda model, batch, progress: seen.append(batch) or step(model, batch, progress)
    loop.fit()
    first, again = (
        {int(r): view for b in part for r, view in zip(b.row, b.strong, strict=True)} for part in (seen[:14], seen[14:])
    )
    common = first.keys() & again.keys()
    assert len(common) > 300
    assert sum(torch.equal(first[row], again[row]) for row in common) < 0.05 * len(common)
    assert all(not torch.equal(b.weak, b.strong) for b in seen)


@pytest.mark.parametrize("method", ["mpc", *NAMES])
def test_every_method_trains_and_says_what_it_did(method: str, phantom_data: str, tmp_path: Path) -> None:
    run = tiny(train={"method": method}, pseudo={"kappa": 2.5})
    metrics = Loop(run, phantom_data, read_card(phantom_data), PlainHost(tmp_path)).fit()
    assert metrics["epoch"] == 2
    assert 0 < metrics["mean_sum_p"] < 14
    assert ("pseudo_recall" in metrics) == (method in RELABELLING)  # the others make no pseudo-labels


def test_a_loss_that_is_not_finite_stops_the_run_with_its_step(phantom_data: str, tmp_path: Path) -> None:
    run = tiny(optim={"lr": 1e30, "clip": 1e30, "name": "sgd"})
    card = read_card(phantom_data)
    with pytest.raises(DivergedError, match=r"at step \d+, learning rate .*rows") as caught:
        Loop(run, phantom_data, card, PlainHost(tmp_path)).fit()
    report = json.loads((tmp_path / "diverged.json").read_text())
    assert f"at step {report['step']}, learning rate {report['learning_rate']:.3g}" in str(caught.value)
    rows = make_plan(card, seed=0, batch_size=32).batch(report["step"])
    assert report["rows"] == rows.tolist()
    ids = {row: name for b in scan(phantom_data, card, "train") for row, name in zip(*columns(b), strict=True)}
    assert report["image_ids"] == [ids[row] for row in rows]


def columns(batch: pa.RecordBatch) -> tuple[list[int], list[str]]:
    return batch["row"].to_pylist(), batch["image_id"].to_pylist()


@pytest.mark.slow
def test_two_workers_equal_one_at_the_same_global_batch(
    phantom_data: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "pipeline.follow")  # what -v shows: every rank
    steps = read_card(phantom_data).rows("train").stop // 24
    assert 15 <= steps <= 20
    results = []
    for workers in (1, 2):
        run = tiny(**EXACT, train={"epochs": 1, "batch_size": 24, "num_workers": workers})
        results.append(train(run, phantom_data, str(tmp_path / str(workers))))
    one, two = (load_weights(Path(result.best_checkpoint), "model") for result in results)
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=0, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
    ours, theirs = (result.metrics for result in results)
    for name in ("loss", "loss_ipc", "loss_fpc", "loss_btc", "selected_share", "val_macro_auroc", "val_macro_ap"):
        assert theirs[name] == pytest.approx(ours[name], abs=1e-4), name
    paces = [record.getMessage().partition(",")[0] for record in caplog.records if "waiting" in record.getMessage()]
    assert sorted(paces) == sorted(
        ["worker 0: step 7", "worker 0: step 14"] * 2 + ["worker 1: step 7", "worker 1: step 14"]
    )


@pytest.mark.long
def test_a_data_loader_trains_the_same_weights(phantom_data: str, tmp_path: Path) -> None:
    results = []
    for backend in ("ray", "torch"):
        run = tiny(data={"backend": backend}, train={"epochs": 1})
        results.append(train(run, phantom_data, str(tmp_path / backend)))
    by_ray, by_torch = (load_weights(Path(result.best_checkpoint), "model") for result in results)
    assert_equal(by_ray, by_torch)


def test_a_finished_run_leaves_its_record(phantom_data: str, tmp_path: Path) -> None:
    seen: list[Metrics] = []

    class Listener:
        def on_start(self, run, card):
            assert card.synthetic

        def on_log(self, line):
            assert line["eta_s"] >= 0

        def on_epoch(self, metrics):
            seen.append(metrics)

        def on_end(self, status, best_checkpoint):
            seen.append({"status": status})

    out = str(tmp_path / "run")
    result = train(tiny(), phantom_data, out, listeners=[Listener()])
    history = MetricsLog(out).read()
    assert [line["epoch"] for line in history] == [1, 2]
    assert seen == [*history, {"status": "FINISHED"}]
    assert result.metrics == max(history, key=lambda line: line["val_macro_auroc"])
    info = read_info(Path(result.best_checkpoint))
    assert info.config == tiny().model_dump(mode="json")
    assert info.data_digest == read_card(phantom_data).digest
    assert set(info.thresholds) <= set(info.findings)
    assert {"selected_share", "pseudo_positives", "mean_sum_p", "pseudo_recall"} <= result.metrics.keys()
    with pytest.raises(UserError, match="--resume"):
        train(tiny(), phantom_data, out)
    with pytest.raises(UserError, match=r"begun with optim\.lr = 0\.003, not 0\.1"):
        train(tiny(optim={"lr": 0.1}), phantom_data, out, resume=True)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"train": {"num_workers": 8, "batch_size": 32}}, "lower train.num_workers"),
        ({"train": {"use_gpu": True}}, "train.use_gpu=false"),
        ({"train": {"method": "ll_cp", "num_workers": 2}}, "method ll_cp keeps a table over all rows"),
        ({"train": {"num_workers": 2, "min_workers": 1, "worker_cpus": 1}}, "would fill a node of 2 CPUs"),
        ({"train": {"batch_size": 5000}}, "train.batch_size 5000"),
        ({"model": {"backbone": "test_efficientnet_gm"}}, "is not a timm model"),
        ({"btc": {"heads": 7}}, "btc.heads 7"),
        ({"model": {"weights": "nowhere.pth"}}, "nowhere.pth"),
    ],
)
def test_what_cannot_run_is_refused_in_one_line(
    phantom_data: str, tmp_path: Path, sections: dict[str, dict[str, object]], message: str
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        train(tiny(**sections), phantom_data, str(tmp_path / "run"))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()  # a refused run leaves nothing that would ask for --resume


def test_a_validation_split_that_ranks_nothing_is_refused(phantom_data: str) -> None:
    card = read_card(phantom_data)
    require_validation(card)
    val = card.counts["val"].model_copy(update={"positives": dict.fromkeys(card.findings, 0)})
    with pytest.raises(UserError, match=r"larger prepare\.split\.val"):
        require_validation(card.model_copy(update={"counts": {**card.counts, "val": val}}))
