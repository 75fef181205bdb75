"""How a search ends: by Ctrl-C, with its hours, after its server was away; and what every record then says of it."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
from conftest import free_port
from mlflow.entities import Run
from mlflow.tracking import MlflowClient
from proxy import Proxy, drop
from safetensors.torch import save_file
from searches import epochs_of, write_space
from servers import mlflow_running

from infra.console import PlainDisplay
from infra.searching import begin, search
from infra.settings import Settings, run_config
from mpc.errors import UserError
from pipeline.card import read_card
from pipeline.record import claim, read_lines
from tuning.domains import Dimension, Space
from tuning.interruption import interruptible
from tuning.listeners import write_record
from tuning.outcome import identity
from tuning.record import RunRecord, Status

SETTINGS = {
    "model": {"backbone": "test_efficientnet_gn"},
    "loss": {"lambda_btc": 0.0, "lambda_fpc": 0.0, "warmup_epochs": 0.2, "ramp_epochs": 0.2},
    "data": {"tasks": 1, "task_cpus": 0.25},
    "train": {"epochs": 4, "batch_size": 8, "worker_cpus": 0.75},
    "search": {
        "metric": "loss_sup",
        "mode": "min",
        "cpus_for_data": 0.25,
        "searcher": "random",
        "scheduler": "none",
        "max_trials": 3,
        "max_concurrent": 1,
        "keep_trials": 1,
    },
}
SPACE = Space((Dimension("optim.lr", "loguniform", (0.001, 0.01)),))
LINE = [sys.executable, "-c", "from infra.cli import main; main()"]


def runs_of(store: str) -> dict[str, Run]:
    """The runs in MLflow, by their names."""
    client = MlflowClient(tracking_uri=store)
    found = client.search_runs([client.get_experiment_by_name("mpc-cxr").experiment_id])
    return {run.info.run_name: run for run in found}


class Late(PlainDisplay):
    """A display whose clock jumps a day ahead once a trial has trained an epoch."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__("trials")
        self.monkeypatch, self.lines = monkeypatch, list[str]()

    def line(self, text: str) -> None:
        self.lines.append(text)

    def __call__(self, done: int, total: int, text: str) -> None:
        if done:
            late = SimpleNamespace(monotonic=lambda: time.monotonic() + 24 * 3600)
            self.monkeypatch.setattr("tuning.budget.time", late)


@pytest.mark.filterwarnings("ignore:Exception ignored in.*(progress.csv|result.json)")  # Tune leaves them open then
def test_a_trial_that_the_hours_end_has_ended_in_every_record(
    few_data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    out, store, display = Path("search"), f"sqlite:///{tmp_path}/mlflow.db", Late(monkeypatch)
    longer = {"train": {**SETTINGS["train"], "epochs": 1000}, "search": {**SETTINGS["search"], "max_hours": 20}}
    (trial,) = search(Settings.model_validate({**SETTINGS, **longer}), SPACE, few_data, str(out), store, display).trials
    assert trial.status == "stopped"
    assert trial.started is not None
    assert trial.ended is not None
    assert trial.ended > trial.started
    assert any(f"{trial.trial_id}: stopped" in line for line in display.lines)
    assert json.loads((out / "trials" / trial.trial_id / "tracking.json").read_text())["status"] == "FINISHED"
    assert {name: found.info.status for name, found in runs_of(store).items()} == {
        "search": "FINISHED",
        trial.trial_id: "FINISHED",
    }


def test_a_second_ctrl_c_is_raised_at_once() -> None:
    def run() -> None:
        with interruptible():
            seen = signal.getsignal(signal.SIGINT)  # Tune notes who listens, and puts it back at its signal
            signal.signal(signal.SIGUSR1, lambda number, frame: signal.signal(signal.SIGINT, seen))
            signal.raise_signal(signal.SIGINT)
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where a shell runs the tests behind
    try:
        with pytest.raises(KeyboardInterrupt):
            run()
    finally:
        signal.signal(signal.SIGINT, before)


class Warned(PlainDisplay):
    """A display that somebody warns with SIGUSR1 once a trial has trained an epoch."""

    def __call__(self, done: int, total: int, text: str) -> None:
        if done:
            signal.raise_signal(signal.SIGUSR1)


@pytest.mark.filterwarnings("ignore:Exception ignored in.*(progress.csv|result.json)")  # Tune leaves them open then
def test_a_search_that_is_warned_can_be_resumed(few_data: str, tmp_path: Path) -> None:
    """At SIGUSR1 Tune saves, and returns as if the search had ended."""
    out, store = tmp_path / "search", f"sqlite:///{tmp_path}/mlflow.db"
    settings = Settings.model_validate({**SETTINGS, "search": {**SETTINGS["search"], "max_trials": 1}})
    with pytest.raises(KeyboardInterrupt):
        search(settings, SPACE, few_data, str(out), store, Warned("trials"))
    assert not (out / "search.json").exists(), "it has not ended"
    (name,) = epochs_of(out)
    assert {key: found.info.status for key, found in runs_of(store).items()} == {"search": "KILLED", name: "KILLED"}
    (trial,) = search(settings, SPACE, few_data, str(out), store, PlainDisplay("trials"), resume=True).trials
    assert (trial.trial_id, trial.status, trial.epochs) == (name, "finished", 4)


def test_a_search_begins_with_one_of_the_same_pretrained_weights(
    few_data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "weights").mkdir()
    network = timm.create_model("test_efficientnet_gn", in_chans=1, num_classes=0)
    save_file(network.state_dict(), tmp_path / "weights" / "net.safetensors")
    monkeypatch.chdir(tmp_path)
    tree = {
        **SETTINGS,
        "model": {**SETTINGS["model"], "weights": "weights/net.safetensors"},
        "train": {**SETTINGS["train"], "epochs": 1},
        "search": {**SETTINGS["search"], "max_trials": 1},
    }
    store = f"sqlite:///{tmp_path}/mlflow.db"
    search(Settings.model_validate(tree), SPACE, few_data, "first", store, PlainDisplay("trials"))
    tree["search"] = {**tree["search"], "warm_start": ["first"]}
    beginning = begin(Settings.model_validate(tree), SPACE, few_data, store)
    assert (len(beginning.known), list(beginning.left_out)) == (1, [])


@pytest.mark.slow
def test_ctrl_c_ends_a_search_that_resume_continues(few_data: str, tmp_path: Path) -> None:
    out, store = tmp_path / "search", f"sqlite:///{tmp_path}/mlflow.db"
    (tmp_path / "settings.yaml").write_text(json.dumps({**SETTINGS, "tracking": {"uri": store}}))  # which is YAML too
    command = [*LINE, "tune", "--data", few_data, "--out", str(out), "--config", str(tmp_path / "settings.yaml")]
    command += ["--space", write_space(tmp_path, "optim.lr: {loguniform: [0.001, 0.01]}")]
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    )
    deadline = time.monotonic() + 300
    while not (len(epochs_of(out)) == 2 and min(epochs_of(out).values()) >= 2):  # the first is through, the next is not
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=120)[1]
    assert process.returncode == 130, said
    assert not (out / "search.json").exists(), "it has not ended"
    before = {name: read_lines(f"{out}/trials/{name}/metrics.jsonl") for name in epochs_of(out)}
    stored = {path.parents[1].name for path in (out / "tune").rglob("model.safetensors")}
    assert stored == set(before), "what goes on keeps its checkpoint"
    first, second = sorted(before, key=lambda name: -len(before[name]))
    assert {name: found.info.status for name, found in runs_of(store).items()} == {
        "search": "KILLED",
        first: "FINISHED",
        second: "KILLED",
    }
    done = subprocess.run([*command, "--resume"], capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    after = {name: read_lines(f"{out}/trials/{name}/metrics.jsonl") for name in before}
    for name, lines in before.items():
        known = lines if len(lines) == 4 else lines[:-1]  # its last epoch may not have been stored yet
        assert after[name][: len(known)] == known, "no epoch is trained again, by its seconds"
        assert len(after[name]) == 4
    runs = runs_of(store)
    assert [found.info.status for found in runs.values()] == ["FINISHED"] * 4, "the search and three trials"
    assert runs.keys() == {"search", *epochs_of(out)}
    parents = {found.data.tags.get("mlflow.parentRunId") for name, found in runs.items() if name != "search"}
    assert parents == {runs["search"].info.run_id}


def test_a_refused_resume_leaves_every_record_as_it_was(few_data: str, tmp_path: Path) -> None:
    out, store = tmp_path / "search", f"sqlite:///{tmp_path}/mlflow.db"
    settings = Settings.model_validate(SETTINGS)
    claim(str(out), identity(run_config(settings), settings.search, SPACE, read_card(few_data)), resume=False)
    write_record(str(out), RunRecord(key="k", name="search", status=Status.FINISHED))
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    other = Settings.model_validate({**SETTINGS, "train": {**SETTINGS["train"], "epochs": 7}})
    with pytest.raises(UserError, match=r"train\.epochs = 4, not 7"):
        search(other, SPACE, few_data, str(out), store, PlainDisplay("trials"), resume=True)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert not (tmp_path / "mlflow.db").exists()


def test_a_search_killed_before_its_first_trial_is_begun_by_resume(few_data: str, tmp_path: Path) -> None:
    out, store = tmp_path / "search", f"sqlite:///{tmp_path}/mlflow.db"
    one = {**SETTINGS, "train": {**SETTINGS["train"], "epochs": 1}, "search": {**SETTINGS["search"], "max_trials": 1}}
    settings = Settings.model_validate(one)
    claim(str(out), identity(run_config(settings), settings.search, SPACE, read_card(few_data)), resume=False)
    with pytest.raises(UserError, match="continue it with --resume"):
        search(settings, SPACE, few_data, str(out), store, PlainDisplay("trials"))
    result = search(settings, SPACE, few_data, str(out), store, PlainDisplay("trials"), resume=True)
    assert [trial.status for trial in result.trials] == ["finished"]


def test_checkpoints_that_are_gone_cost_no_record(
    few_data: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out, store = tmp_path / "search", f"sqlite:///{tmp_path}/mlflow.db"
    two = {**SETTINGS["search"], "max_trials": 2, "keep_trials": 2}
    settings = Settings.model_validate({**SETTINGS, "train": {**SETTINGS["train"], "epochs": 1}, "search": two})

    def best(*, resume: bool) -> str:
        """The best trial; what it was to leave is lost at once."""
        name = search(settings, SPACE, few_data, str(out), store, PlainDisplay("trials"), resume=resume).best.trial_id
        for place in (out / "tune" / name).glob("checkpoint_*"):
            shutil.rmtree(place)
        (out / "search.json").unlink()
        return name

    first, second = best(resume=False), best(resume=True)
    assert first != second
    assert f"trial {first} was better than {second}, but its checkpoints are gone" in caplog.text
    with pytest.raises(UserError, match="no checkpoint of any trial is left"):
        best(resume=True)
    record = json.loads((out / "search.json").read_text())
    assert record["best"] == first
    assert [trial["status"] for trial in record["trials"]] == ["finished", "finished"]


class Outage(PlainDisplay):
    """A display that takes a server away with the end of the first trial, and gives it back with that of the second."""

    def __init__(self, proxy: Proxy) -> None:
        super().__init__("trials")
        self.proxy, self.ended, self.met = proxy, 0, 0

    def line(self, text: str) -> None:
        self.ended += 1
        self.met = max(self.met, len(self.proxy.met))
        self.proxy.fail(*[drop] * (10_000 if self.ended == 1 else 0))


@pytest.mark.slow
def test_a_server_that_is_away_in_mid_search_has_all_of_it_at_the_end(
    few_data: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    address, out = f"http://127.0.0.1:{free_port()}", tmp_path / "search"
    arguments = ["server", "--host", "127.0.0.1", "--port", address.rpartition(":")[2], "--workers", "1"]
    arguments += ["--backend-store-uri", f"sqlite:///{tmp_path}/db", "--artifacts-destination", str(tmp_path / "kept")]
    proxy = Proxy(address)
    display, settings = Outage(proxy), Settings.model_validate(SETTINGS)
    with mlflow_running(arguments, f"{address}/health", tmp_path):
        result = search(settings, SPACE, few_data, str(out), proxy.endpoint, display)
        runs = runs_of(address)
        client = MlflowClient(tracking_uri=address)
        for trial in result.trials:
            run = runs[trial.trial_id]
            lines = read_lines(f"{out}/trials/{trial.trial_id}/metrics.jsonl")
            history = client.get_metric_history(run.info.run_id, "loss_sup")
            assert [(item.step, item.value) for item in history] == [
                (line["epoch"], line["loss_sup"]) for line in lines
            ]
            assert run.data.tags["mlflow.parentRunId"] == runs["search"].info.run_id
    proxy.close()
    assert display.met, "the server was asked while it was away"
    assert [run.info.status for run in runs.values()] == ["FINISHED"] * 4
    assert "did not take" not in caplog.text
