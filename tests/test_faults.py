"""Training under faults, each one real: killed processes, storage that is away, a full disk, a loss that diverges."""

import json
import os
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
from runs import EXACT, PlainHost, assert_close, assert_same, metrics_of, reproducible, tiny

from mpc.checkpoint import read_info
from mpc.errors import UserError
from pipeline import storage
from pipeline.card import read_card
from pipeline.config import RunConfig
from pipeline.divergence import DivergedError
from pipeline.host import Metrics
from pipeline.loop import Loop
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


def workers(driver: int | None = None) -> list[psutil.Process]:
    """The training workers of a driver's own cluster."""
    found = []
    for process in psutil.Process(driver).children(recursive=True):
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


@pytest.mark.slow
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


@pytest.mark.long
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


CLI = "from infra.cli import main; main()"


def start(run: RunConfig, data: str, out: Path) -> subprocess.Popen[str]:
    """`mpc-cxr train` as a process with a local cluster of its own."""
    config = out.parent / "run.yaml"
    config.write_text(run.model_dump_json())  # JSON is YAML
    command = [sys.executable, "-c", CLI, "train", f"--data={data}", f"--out={out}", f"--config={config}"]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)


def wait(process: subprocess.Popen[str], reached: Callable[[], object]) -> None:
    """Returns once something holds, while the process runs."""
    deadline = time.monotonic() + 300
    while not reached():
        assert process.poll() is None, process.stderr.read()[-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.slow
def test_a_killed_driver_and_one_that_resumes_equal_one_that_was_never_killed(
    phantom_data: str, tmp_path: Path
) -> None:
    run = tiny(train={"epochs": 6, "checkpoint_every": 5, "keep": 2})
    whole, out = undisturbed(run, phantom_data, tmp_path / "whole"), tmp_path / "out"
    metrics = out / "metrics.jsonl"
    with start(run, phantom_data, out) as process:
        wait(process, lambda: metrics.exists() and len(metrics.read_text().splitlines()) >= 3)
        os.killpg(process.pid, signal.SIGKILL)  # the driver and its whole local cluster
    assert len(metrics.read_text().splitlines()) < 6
    result = train(run, phantom_data, str(out), resume=True)
    best = Path(result.best_checkpoint)
    assert_same(best, whole / f"step-{read_info(best).step:08d}")
    assert_same(out / "train" / "step-00000084", whole / "step-00000084")
    for line in result.history:
        assert reproducible(line) == metrics_of(whole / f"step-{line['step']:08d}")
    assert [line["epoch"] for line in result.history] == list(range(1, 7))


@pytest.mark.long
def test_sigterm_ends_two_workers_with_a_checkpoint_and_one_worker_goes_on(phantom_data: str, tmp_path: Path) -> None:
    settings = {"epochs": 1, "batch_size": 24}
    two, one = (tiny(**EXACT, train={**settings, "num_workers": count}) for count in (2, 1))
    whole, out = undisturbed(one, phantom_data, tmp_path / "whole"), tmp_path / "out"
    with start(two, phantom_data, out) as process:
        wait(process, lambda: workers(process.pid))
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=300)
    assert process.returncode == 143, errors[-3000:]
    (folder,) = (out / "train").glob("step-*")
    step, last = read_info(folder).step, max(whole.iterdir())
    assert 1 <= step < read_info(last).step
    said = f"mpc-cxr: stopped: stopped at step {step} of {read_info(last).step}, its checkpoint is stored in {out}"
    assert errors.splitlines()[-1] == f"{said}; --resume goes on from there"
    with pytest.raises(UserError, match=r"begun with optim\.lr = 0\.01, not 0\.02"):
        train(
            one.model_copy(update={"optim": one.optim.model_copy(update={"lr": 0.02})}),
            phantom_data,
            str(out),
            resume=True,
        )
    result = train(one, phantom_data, str(out), resume=True)  # the batch stays: each step is what it was
    assert_close(Path(result.best_checkpoint), last)
