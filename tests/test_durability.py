"""What a search survives: a lost machine, a killed driver, storage and tracking that are away; what is left on disk."""

import json
import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from conftest import free_port
from mlflow.tracking import MlflowClient
from proxy import Proxy, drop
from searches import Searches, epochs_of, write_space

from infra.console import PlainDisplay
from infra.searching import search as searched
from infra.settings import Settings
from pipeline import storage
from pipeline.config import RunConfig
from pipeline.record import MetricsLog, read_lines
from tuning.config import SearchConfig
from tuning.domains import Dimension, Space
from tuning.sync import sync

BASE = {
    "model": {"backbone": "test_efficientnet_gn"},
    "loss": {"lambda_btc": 0.0, "lambda_fpc": 0.0, "warmup_epochs": 0.2, "ramp_epochs": 0.2},
    "data": {"tasks": 1, "task_cpus": 0.25},
    "train": {"epochs": 3, "batch_size": 8, "worker_cpus": 0.75},
}
LOSS = {"metric": "loss_sup", "mode": "min", "cpus_for_data": 0.25}
GOOD_THEN_BAD = 11
"""A seed of random search that draws the good rate once, then the bad one three times."""
ONE_BAD_OF_THREE = 10
"""A seed of a population: of two equally bad trials neither would be the worst when its turn comes."""
GOOD_OR_BAD = "optim.lr: {choice: [0.003, 0.000000001]}"
LR = Space((Dimension("optim.lr", "loguniform", (0.001, 0.01)),))


def run(**train: Any) -> RunConfig:
    return RunConfig.model_validate({**BASE, "train": {**BASE["train"], **train}})


def size(folder: Path) -> int:
    """Bytes of all files below a folder, some of which may vanish meanwhile."""
    total = 0
    for root, _, files in os.walk(folder):
        for name in files:
            try:
                total += (Path(root) / name).stat().st_size
            except FileNotFoundError:
                continue
    return total


class Watching(PlainDisplay):
    """A display that looks at the disk with each epoch."""

    def __init__(self, folder: Path) -> None:
        super().__init__("trials")
        self.folder, self.sizes = folder, [0]

    def __call__(self, done: int, total: int, text: str) -> None:
        self.sizes.append(size(self.folder))


def test_a_search_without_its_tracking_server_ends_and_fills_no_disk(few_data: str, tmp_path: Path) -> None:
    epochs, trials, out = 4, 3, tmp_path / "search"
    config = {
        **LOSS,
        "searcher": "random",
        "scheduler": "none",
        "max_trials": trials,
        "max_concurrent": 1,
        "keep_trials": 1,
    }
    settings = Settings.model_validate({**run(epochs=epochs).model_dump(), "search": config})
    display = Watching(out)
    result = searched(settings, LR, few_data, str(out), f"http://127.0.0.1:{free_port()}", display)
    assert [trial.status for trial in result.trials] == ["finished"] * trials
    weights = list((out / "tune").rglob("model.safetensors"))
    assert [path.parents[1].name for path in weights] == [result.best.trial_id]
    one = size(weights[0].parent)
    # of the running trial the best, the last two and the one just written, of those that have ended the best one's
    assert 4 * one < max(display.sizes) < 5.5 * one, "all that was trained would be 12"
    assert size(out) < 1.5 * one + size(Path(result.best_checkpoint)), "the best one's, and its copy as best/"
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    summary = sync(str(out), uri)
    assert (summary.runs, summary.epochs) == (1 + trials, epochs * trials)
    client = MlflowClient(tracking_uri=uri)
    found = client.search_runs([client.get_experiment_by_name("mpc-cxr").experiment_id])
    children = [item for item in found if "mlflow.parentRunId" in item.data.tags]
    assert {item.data.metrics["cost"] for item in children} == {trial.cost for trial in result.trials}
    assert {item.data.metrics["loss_sup"] for item in children} == {
        MetricsLog(str(out / "trials" / trial.trial_id)).read()[-1]["loss_sup"] for trial in result.trials
    }


@pytest.mark.long
def test_a_search_on_s3_is_killed_and_goes_on_with_what_asha_had_compared(
    few_data: str, bucket: str, searches: Searches, tmp_path: Path
) -> None:
    """The first trial is good, the others are bad: without memory, the next one had nothing to be compared with."""
    yaml = write_space(tmp_path, GOOD_OR_BAD)
    asha = {"scheduler": "asha", "grace_epochs": 1, "reduction_factor": 2, "max_concurrent": 1}
    config = SearchConfig(**LOSS, **asha, searcher="random", max_trials=4, seed=GOOD_THEN_BAD, keep_trials=1)
    out = f"{bucket}/search"
    started = lambda: storage.list_files(bucket, ["trial.json"])  # noqa: E731
    killed = searches.start(few_data, out, run(), config, yaml)
    searches.wait_for(lambda: len(started()) == 2, killed)  # the first one is through
    searches.kill(killed)
    records = storage.list_files(bucket, ["metrics.jsonl"])
    first = next(uri for uri in records if len(read_lines(uri)) == 3)
    before = read_lines(first)
    searches.ended_well(searches.start(few_data, out, run(), config, yaml, resume=True))
    record = json.loads(storage.read_bytes(f"{out}/search.json"))
    trials = [trial for trial in record["trials"] if trial["status"] != "lost"]
    good = [trial for trial in trials if trial["params"]["optim.lr"] == 0.003]
    assert [(trial["status"], trial["epochs"]) for trial in good] == [("finished", 3)]
    bad = [trial for trial in trials if trial not in good]
    assert [trial["status"] for trial in bad] == ["stopped"] * 3
    # the one that was killed may have been on its way to the next comparison
    assert sorted(trial["epochs"] for trial in bad)[:2] == [1, 1]
    assert read_lines(first) == before, "what was finished is not run again"
    left = {uri.split("/")[-3] for uri in storage.list_files(f"{out}/tune", ["model.safetensors"])}
    assert left == {record["best"]}
    assert storage.exists(f"{out}/best/model.safetensors")


@pytest.mark.long
def test_a_bucket_that_is_away_for_a_while_costs_no_trial(
    few_data: str, bucket: str, s3_server: str, searches: Searches, tmp_path: Path
) -> None:
    proxy = Proxy(s3_server)
    out = f"{bucket}/search?endpoint_override={proxy.endpoint}"
    asha = {"scheduler": "asha", "grace_epochs": 1, "reduction_factor": 2, "seed": GOOD_THEN_BAD}
    config = SearchConfig(**LOSS, **asha, searcher="random", max_trials=2, max_concurrent=1)
    try:
        searching = searches.start(few_data, out, run(max_failures=0), config, write_space(tmp_path, GOOD_OR_BAD))
        searches.wait_for(lambda: storage.list_files(bucket, ["metrics.jsonl"]), searching)
        proxy.fail(*[drop] * 1000)
        searches.wait_for(lambda: len(proxy.met) >= 6, searching)
        proxy.fail()
        searches.ended_well(searching)
    finally:
        proxy.close()
    record = json.loads(storage.read_bytes(f"{bucket}/search/search.json"))
    assert [(trial["status"], trial["epochs"]) for trial in record["trials"]] == [("finished", 3), ("stopped", 1)]


LOSE_A_NODE = """
import sys, threading, time
import tuning
import ray
from ray.cluster_utils import Cluster
from pipeline.config import RunConfig
from tuning import space
from tuning.config import SearchConfig
from tuning.search import search

data, out, run, config, yaml = sys.argv[1:]
small = {"num_cpus": 1, "object_store_memory": 150 * 2**20}
cluster = Cluster(initialize_head=True, head_node_args=small)
ray.init(address=cluster.address, log_to_driver=False)
node = cluster.add_node(**small)  # after the driver has found its own machine, the head


class Listener:
    starts, epochs, lost = [], set(), False

    def on_trial_start(self, trial_id, params):
        self.starts.append(trial_id)

    def on_trial_epoch(self, trial_id, metrics):
        self.epochs.add(trial_id)
        if len(self.epochs) == 2 and not self.lost:  # one trial on each machine
            self.lost = True
            cluster.remove_node(node, allow_graceful=False)

    def on_trial_end(self, trial_id, status):
        pass


run, listener = RunConfig.model_validate_json(run), Listener()
search(run, SearchConfig.model_validate_json(config), space.load(yaml, run), data, out, listeners=[listener])
print("starts", len(listener.starts), "nodes", sum(n["Alive"] for n in ray.nodes()), flush=True)
ray.shutdown()
cluster.shutdown()
"""


@pytest.mark.long
def test_a_trial_goes_on_elsewhere_when_its_machine_is_lost(few_data: str, tmp_path: Path) -> None:
    yaml = write_space(tmp_path, "optim.lr: {loguniform: [0.001, 0.01]}")
    config = SearchConfig(**LOSS, searcher="random", scheduler="none", max_trials=3)
    out = tmp_path / "search"
    arguments = [few_data, str(out), run().model_dump_json(), config.model_dump_json(), yaml]
    command = [sys.executable, "-c", LOSE_A_NODE, *arguments]
    with TemporaryDirectory() as place:  # a cluster notes its address there, and others would take it for theirs
        environment = {**os.environ, "RAY_TMPDIR": place}
        done = subprocess.run(command, capture_output=True, text=True, timeout=400, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "starts 4 nodes 1" in done.stdout.splitlines(), "one of three trials began twice"
    trials = json.loads((out / "search.json").read_text())["trials"]
    assert [(trial["status"], trial["epochs"]) for trial in trials] == [("finished", 3)] * 3


@pytest.mark.long
def test_a_population_is_killed_and_goes_on(few_data: str, searches: Searches, tmp_path: Path) -> None:
    config = SearchConfig(
        **LOSS,
        searcher="random",
        scheduler="pbt",
        max_trials=3,
        max_concurrent=1,
        seed=ONE_BAD_OF_THREE,
        pbt={"quantile": 0.34},
    )
    out, yaml = tmp_path / "search", write_space(tmp_path, GOOD_OR_BAD)
    killed = searches.start(few_data, out, run(epochs=6), config, yaml)
    searches.wait_for(lambda: len(epochs_of(out)) == 3 and max(epochs_of(out).values()) >= 2, killed)
    searches.kill(killed)
    searches.ended_well(searches.start(few_data, out, run(epochs=6), config, yaml, resume=True))
    record = json.loads((out / "search.json").read_text())
    trials = [trial for trial in record["trials"] if trial["status"] != "lost"]
    assert [trial["status"] for trial in trials] == ["finished"] * 3
    assert any(leg["donor"] for trial in trials for leg in trial["legs"]), "a bad trial goes on from a good one"
    best = next(trial for trial in trials if trial["trial_id"] == record["best"])
    assert best["legs"][-1]["settings"]["optim.lr"] in (0.003, 0.000000001)
