"""Searches on a real GPU: trials that share it, weights that go from trial to trial, a killed driver."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from searches import Searches, epochs_of, write_space

from pipeline.config import RunConfig
from pipeline.record import MetricsLog
from tuning.config import SearchConfig
from tuning.domains import Dimension, Space
from tuning.search import search

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")

BASE: dict[str, Any] = {
    "model": {"backbone": "test_efficientnet_gn"},
    "loss": {"warmup_epochs": 0.2, "ramp_epochs": 0.2},
    "data": {"tasks": 1, "task_cpus": 0.25},
    "train": {"epochs": 3, "batch_size": 8, "worker_cpus": 0.5, "use_gpu": True, "gpus": 0.5, "amp": "bf16"},
}
LOSS = {"metric": "loss_sup", "mode": "min", "cpus_for_data": 0.5, "searcher": "random"}
LR = Space((Dimension("optim.lr", "loguniform", (0.001, 0.01)),))
ONE_BAD_OF_THREE = 10
"""A seed of random search."""
GOOD_OR_BAD = Space((Dimension("optim.lr", "choice", (0.003, 0.000000001)),))


def run(**train: Any) -> RunConfig:
    return RunConfig.model_validate({**BASE, "train": {**BASE["train"], **train}})


def check_device(out: Path) -> None:
    """Every epoch of every trial found the memory of its GPU in use."""
    files = list(out.glob("trials/*/metrics.jsonl"))
    assert files
    for file in files:
        assert all(line["system/gpu_0_memory_usage_megabytes"] > 0 for line in MetricsLog(str(file.parent)).read())


def test_as_many_trials_as_the_shares_allow(few_data: str, tmp_path: Path) -> None:
    out = tmp_path / "search"
    result = search(run(), SearchConfig(**LOSS, scheduler="none", max_trials=3), LR, few_data, str(out))
    assert [(trial.status, trial.epochs) for trial in result.trials] == [("finished", 3)] * 3
    check_device(out)
    first, second, third = sorted(result.trials, key=lambda trial: trial.started)
    assert second.started < first.ended, "two halves of a GPU"
    assert third.started > min(first.ended, second.ended), "there is no third"


def test_a_population_hands_weights_on(few_data: str, tmp_path: Path) -> None:
    """Two trials share the GPU, the third waits: the worst goes on from the weights of the best."""
    out, pbt = tmp_path / "search", {"interval": 1, "quantile": 0.34, "resample": 0.0}
    config = SearchConfig(**LOSS, scheduler="pbt", max_trials=3, seed=ONE_BAD_OF_THREE, pbt=pbt)
    result = search(run(epochs=6), config, GOOD_OR_BAD, few_data, str(out))
    assert [trial.status for trial in result.trials] == ["finished"] * 3
    assert any(leg["donor"] for trial in result.trials for leg in trial.legs)
    check_device(out)


def test_a_killed_search_goes_on(few_data: str, searches: Searches, tmp_path: Path) -> None:
    out, yaml = tmp_path / "search", write_space(tmp_path, "optim.lr: {loguniform: [0.001, 0.01]}")
    config = SearchConfig(**LOSS, scheduler="asha", max_trials=4, grace_epochs=1, reduction_factor=2)
    killed = searches.start(few_data, out, run(), config, yaml)
    searches.wait_for(lambda: len(epochs_of(out)) >= 2, killed)
    searches.kill(killed)
    searches.ended_well(searches.start(few_data, out, run(), config, yaml, resume=True))
    trials = json.loads((out / "search.json").read_text())["trials"]
    known = [trial for trial in trials if trial["status"] != "lost"]
    assert len(known) == 4
    assert {trial["status"] for trial in known} <= {"finished", "stopped"}
    assert any(trial["status"] == "finished" for trial in known)
    check_device(out)
