"""Two real gloo processes against one: the same gradient, and runs that go on with as many ranks or with fewer."""

import shutil
import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from conftest import free_port
from runs import EXACT, PlainHost, assert_close, assert_same, tiny
from torch import Tensor, nn

from mpc.losses import assume_negative
from mpc.method import Batch, Progress
from mpc.model import BatchEncoder, Classifier
from mpc.step import Mpc
from pipeline.card import read_card
from pipeline.config import RunConfig
from pipeline.host import Metrics
from pipeline.loop import Loop

ROWS, SIDE, FINDINGS = 8, 4, 5


def network() -> tuple[Classifier, Mpc]:
    torch.manual_seed(0)
    model = Classifier(nn.Sequential(nn.Flatten(), nn.Linear(SIDE * SIDE, 12)), 12, FINDINGS).double()
    encoder = BatchEncoder(12, heads=4, dropout=0.0).double()
    return model, Mpc(assume_negative, tau_pos=0.55, tau_neg=0.45, perturb_rate=0.0, encoder=encoder, btc_global=True)


def batch(rows: slice) -> Batch:
    generator = torch.Generator().manual_seed(1)
    weak, strong = torch.randint(0, 256, (2, ROWS, 1, SIDE, SIDE), generator=generator)
    observed = nn.functional.one_hot(torch.arange(ROWS) % FINDINGS, FINDINGS).double()
    return Batch(
        weak[rows], strong[rows], observed[rows], observed[rows], observed[rows] >= 0, torch.arange(ROWS)[rows]
    )


def gradient(model: Classifier, method: Mpc, rows: slice) -> Tensor:
    Classifier.features, restore = features_in_double, Classifier.features
    try:
        parameters = [*model.parameters(), *method.parameters()]
        grads = torch.autograd.grad(method.step(model, batch(rows), Progress(0, 1, 1)).loss, parameters)
    finally:
        Classifier.features = restore
    return torch.cat([g.flatten() for g in grads])


def features_in_double(self: Classifier, images: Tensor, dropped: None) -> Tensor:
    return self.backbone(images.double() / 255.0)


class RankHost(PlainHost):
    """One of two plain processes as host of the loop."""

    world_size = 2

    def __init__(self, rank: int, out: Path) -> None:
        super().__init__(out)
        self.rank = rank

    def report(self, metrics: Metrics, checkpoint: Path) -> None:
        if self.rank == 0:
            super().report(metrics, checkpoint)


def continue_work(rank: int, port: int, config: str, data: str, folder: str) -> None:
    """A run of two ranks, and one that goes on from its first checkpoint."""
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    run, card = RunConfig.model_validate_json(config), read_card(data)
    whole, broken = Path(folder, "whole"), Path(folder, "broken")
    Loop(run, data, card, RankHost(rank, whole)).fit()
    if rank == 0:
        shutil.copytree(min(whole.iterdir()), broken / min(whole.iterdir()).name)
    dist.barrier()
    Loop(run, data, card, RankHost(rank, broken)).fit()
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_continue_bit_for_bit_and_one_goes_on_to_the_same(phantom_data: str, tmp_path: Path) -> None:
    """Sums of the epoch are every rank's own: a checkpoint that held one rank's made the metrics of the epoch wrong."""
    run = tiny(**EXACT, data={"backend": "torch"}, train={"epochs": 1, "batch_size": 24, "checkpoint_every": 7})
    whole, broken, alone = (tmp_path / name for name in ("whole", "broken", "alone"))
    whole.mkdir()
    mp.spawn(continue_work, args=(free_port(), run.model_dump_json(), phantom_data, str(tmp_path)), nprocs=2)
    names = sorted(folder.name for folder in whole.iterdir())
    assert names[0] == "step-00000007"
    assert names == sorted(folder.name for folder in broken.iterdir())
    for name in names:
        assert_same(whole / name, broken / name)
    shutil.copytree(whole / names[0], alone / names[0])
    Loop(run, phantom_data, read_card(phantom_data), PlainHost(alone)).fit()
    assert_close(alone / names[-1], whole / names[-1])


def work(rank: int, port: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    model, method = network()
    half = ROWS // 2
    grad = gradient(model, method, slice(rank * half, rank * half + half))
    dist.all_reduce(grad)
    torch.save(grad / 2, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_give_the_gradient_of_one_process(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(work, args=(port, str(tmp_path)), nprocs=2)
    expected = gradient(*network(), slice(None))
    for rank in range(2):
        torch.testing.assert_close(torch.load(tmp_path / f"{rank}.pt", weights_only=True), expected, rtol=0, atol=1e-14)
