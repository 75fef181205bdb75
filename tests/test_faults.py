"""Training under faults, each one real: killed processes, storage that is away, a full disk, a loss that diverges."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from proxy import Proxy, drop, throttle
from runs import EXACT, PlainHost, assert_close, assert_same, tiny

from mpc.checkpoint import read_info
from mpc.errors import StoppedError, UserError
from pipeline import storage
from pipeline.card import read_card
from pipeline.config import RunConfig
from pipeline.divergence import DivergedError
from pipeline.loop import Loop, Metrics
from pipeline.record import MetricsLog
from pipeline.train import train


class At:
    """A listener that does something once a step is done."""

    def __init__(self, step: int, act: Callable[[], None]) -> None:
        self.step, self.act, self.done = step, act, False

    def on_start(self, run, card):
        pass

    def on_log(self, line: Metrics) -> None:
        if line["step"] >= self.step and not self.done:
            self.done = True
            self.act()

    def on_epoch(self, metrics):
        pass

    def on_end(self, status, best_checkpoint):
        self.status = status


def workers() -> list[psutil.Process]:
    """The training workers of this process's own cluster."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if process.cmdline()[:1] and process.cmdline()[0].startswith("ray::RayTrainWorker"):
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found


def undisturbed(run: RunConfig, data: str, out: Path) -> Path:
    """The checkpoints of the same run in a plain process that nothing happens to."""
    out.mkdir()
    Loop(run, data, read_card(data), PlainHost(out)).fit()
    return out


def faults_of(out: str) -> list[dict[str, object]]:
    """What faults.jsonl says."""
    uri = storage.join(out, "faults.jsonl")
    lines = storage.read_bytes(uri).decode().splitlines() if storage.exists(uri) else []
    print(*lines, sep="\n")
    return [json.loads(line) for line in lines]


def stored(out: str) -> set[str]:
    """Names of the folders below the run's storage that hold anything."""
    root = storage.join(out, "train").partition("?")[0]
    return {
        parts[0]
        for uri in storage.list_files(storage.join(out, "train"))
        if len(parts := uri.partition("?")[0].removeprefix(root).strip("/").split("/")) > 1
    }


def fetched(uri: str, folder: Path) -> Path:
    """A stored checkpoint as a local folder."""
    folder.mkdir()
    for file in storage.list_files(uri):
        (folder / storage.name(file)).write_bytes(storage.read_bytes(file))
    return folder


def test_a_loss_that_is_not_finite_ends_all_workers_once(phantom_data: str, tmp_path: Path) -> None:
    run = tiny(optim={"lr": 1e30, "clip": 1e30, "name": "sgd"}, train={"num_workers": 2})
    out = str(tmp_path / "run")
    with pytest.raises(DivergedError, match=r"at step \d+, .*diverged\.json lists the images"):
        train(run, phantom_data, out)
    report = json.loads((tmp_path / "run" / "diverged.json").read_text())
    assert len(report["image_ids"]) == 16 * len(report["ranks"])
    assert not faults_of(out)  # trained again it would only diverge again


@pytest.mark.slow
def test_storage_that_is_away_and_a_worker_killed_while_it_uploads(
    phantom_data: str, s3_server: str, bucket: str, tmp_path: Path
) -> None:
    run = tiny(train={"epochs": 3, "checkpoint_every": 10, "log_every": 1, "keep": 2})
    whole = undisturbed(run, phantom_data, tmp_path / "whole")
    proxy = Proxy(s3_server)
    out = f"{bucket}/run?endpoint_override={proxy.endpoint}"

    def kill() -> None:
        proxy.held.wait()
        proxy.mark = None
        assert "step-00000020" in stored(f"{bucket}/run")  # half written
        for process in workers():
            process.kill()
        proxy.release.set()

    def disturb() -> None:
        proxy.fail(*[throttle, drop] * 3)
        proxy.mark = b"step-00000020/checkpoint.json"
        threading.Thread(target=kill, daemon=True).start()

    try:
        result = train(run, phantom_data, out, listeners=[At(9, disturb)])
        assert len(proxy.met) == 6  # the checkpoint of step 10 was stored all the same, and no worker was lost over it
        (fault,) = faults_of(out)
        assert fault["continued"] in (10, 14)  # not 20
        assert fault["lost"] == fault["reached"] - fault["continued"]
        assert fault["reached"] >= 20
        assert "was lost: its worker process has died" in fault["causes"][0]
        best = fetched(result.best_checkpoint, tmp_path / "best")
        assert_same(best, whole / f"step-{read_info(best).step:08d}")
        last = fetched(storage.join(out, "train", "step-00000042"), tmp_path / "last")
        assert_same(last, whole / "step-00000042")
        assert [line["epoch"] for line in result.history] == [1, 2, 3]
        assert stored(out) == {"step-00000040", "step-00000042", f"best-step-{read_info(best).step:08d}"}
    finally:
        proxy.close()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """A disk of its own, whose size in bytes can be set again."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = False

    def sized(size: int) -> Path:
        nonlocal mounted
        options = f"{'remount,' if mounted else ''}size={size}"
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)], check=False, capture_output=True, text=True
        )
        if done.returncode:
            pytest.skip(f"this user may not mount a small disk: {done.stderr.strip()}")
        mounted = True
        return place

    yield sized
    if mounted:
        subprocess.run(["umount", str(place)], check=True)


@pytest.mark.slow
def test_a_full_disk_ends_the_run_in_one_line_and_resume_goes_on(
    phantom_data: str, small_disk: Callable[[int], Path], tmp_path: Path
) -> None:
    run = tiny(train={"checkpoint_every": 10, "max_failures": 0})
    whole = undisturbed(run, phantom_data, tmp_path / "whole")
    size = sum(file.stat().st_size for file in (whole / "step-00000010").iterdir())
    out = small_disk(3 * size // 2) / "run"
    with pytest.raises(UserError, match=r"no space is left for .*--resume") as caught:
        train(run, phantom_data, str(out))
    assert "\n" not in str(caught.value)
    assert stored(str(out)) == {"step-00000010"}
    small_disk(20 * size)
    result = train(run, phantom_data, str(out), resume=True)
    assert_same(Path(result.best_checkpoint), whole / f"step-{read_info(Path(result.best_checkpoint)).step:08d}")
    assert_same(out / "train" / "step-00000028", whole / "step-00000028")


@pytest.mark.slow
def test_sigterm_ends_two_workers_with_a_checkpoint_and_one_worker_goes_on(phantom_data: str, tmp_path: Path) -> None:
    settings = {"epochs": 1, "batch_size": 24}
    two, one = (tiny(**EXACT, train={**settings, "num_workers": count}) for count in (2, 1))
    whole, out = undisturbed(one, phantom_data, tmp_path / "whole"), tmp_path / "out"
    listener = At(1, lambda: None)

    def stop() -> None:
        while not workers():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop, daemon=True).start()
    with pytest.raises(StoppedError, match=r"stopped at step \d+ of \d+, its checkpoint is stored .*--resume"):
        train(two, phantom_data, str(out), listeners=[listener])
    assert listener.status == "KILLED"
    (folder,) = (out / "train").glob("step-*")
    last = max(whole.iterdir())
    assert 1 <= read_info(folder).step < read_info(last).step
    result = train(one, phantom_data, str(out), resume=True)  # the batch stays: each step is what it was
    assert_close(Path(result.best_checkpoint), last)


CLI = "from infra.cli import main; main()"


@pytest.mark.slow
def test_the_command_line_says_how_to_go_on(phantom_data: str, tmp_path: Path) -> None:
    settings = [f"--set={key}={value}" for key, value in FLAT.items()]
    out = tmp_path / "run"
    command = [sys.executable, "-u", "-c", CLI, "train", "--data", phantom_data, "--out", str(out), *settings]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if line.startswith("train: ") and "loss" in line:
                break
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=120)
    assert process.returncode == 143, errors[-3000:]
    assert errors.splitlines()[-1].startswith("mpc-cxr: stopped: stopped at step ")
    (folder,) = (out / "train").glob("step-*")
    step = read_info(folder).step
    assert f"stopped at step {step} of" in errors
    assert len(MetricsLog(str(out)).read()) == step // 14
    shutil.rmtree(out)


FLAT = {
    "model.backbone": "test_efficientnet_gn",
    "data.tasks": 1,
    "data.task_cpus": 0.25,
    "train.worker_cpus": 0.5,
    "train.epochs": 500,
    "train.batch_size": 32,
    "train.log_every": 1,
}
