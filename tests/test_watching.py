"""What a person sees of a training run: a bar on a real terminal, plain lines elsewhere, every rank with -v."""

import os
import pty
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from factory import bare_card
from runs import tiny

from infra.console import progress
from infra.listeners import EpochLines

WIDTH = "180"
LINE = {"images_per_s": 321.4, "data_wait_share": 0.0153, "eta_s": 9.0, "steps": 999}


class Terminal:
    """A pseudo-terminal whose other end is read as it is written."""

    def __init__(self) -> None:
        self.screen, self.end = pty.openpty()
        self.parts: list[bytes] = []
        self.reader = threading.Thread(target=self._read)
        self.reader.start()

    def _read(self) -> None:
        while True:
            try:
                part = os.read(self.screen, 4096)
            except OSError:  # Linux says so when nobody holds the other end any more
                return
            self.parts.append(part)

    def text(self) -> str:
        """All that was written, once the writers have closed their end; colours and movements are left out."""
        self.reader.join(timeout=300)
        assert not self.reader.is_alive()
        os.close(self.screen)
        return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", b"".join(self.parts).decode())


@contextmanager
def on_terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[Terminal]:
    """Lets standard output be a terminal of this width."""
    terminal = Terminal()
    monkeypatch.setenv("COLUMNS", WIDTH)
    monkeypatch.setenv("TERM", "xterm")
    with monkeypatch.context() as patch, os.fdopen(terminal.end, "w") as end:
        patch.setattr(sys, "stdout", end)
        yield terminal


def run(lines: EpochLines) -> None:
    """Tells of a run of two epochs with 16 steps each."""
    lines.on_start(tiny(), bare_card(rows=16 * 32))
    for step in (7, 14):
        lines.on_log({"step": step, "loss": 1 / step, "loss_sup": 0.5, "loss_ipc": 0.25, **LINE})
    scores = {"val_macro_auroc": 0.71234, "val_macro_ap": None}
    lines.on_epoch({"epoch": 1, "step": 16, "loss": 0.5, "loss_sup": 0.25, **LINE, **scores})
    lines.on_end("FINISHED", "somewhere")


def test_a_terminal_shows_a_bar_and_keeps_one_line_an_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    with on_terminal(monkeypatch) as terminal, progress("train", seconds=0.0) as display:
        run(EpochLines(display))
    text = terminal.text()
    assert re.search(r"train .*━.* 16/32 .*:\d\d 321 images/s, 1\.5% waiting for data", text)
    kept = [line for line in text.splitlines() if line.startswith("epoch ")]
    assert [line.rstrip() for line in kept] == [
        "epoch 1/2: loss 0.5000, sup 0.2500, validation macro AUROC 0.712, AP –"
    ]


def test_elsewhere_every_line_of_the_log_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with progress("train", seconds=0.0) as display:
        run(EpochLines(display))
    found = capsys.readouterr().out.splitlines()
    begin, first, second, epoch, end = found
    assert begin == "train: 0/32 (0 %) starting"
    pattern = (
        r"train: {}/32 \(\d+ %, about \d+ s left\) loss {}, sup 0\.5000, ipc 0\.2500, 321 images/s, 1\.5% waiting.*"
    )
    assert re.fullmatch(pattern.format(7, r"0\.1429"), first)
    assert re.fullmatch(pattern.format(14, r"0\.0714"), second)
    assert epoch.startswith("epoch 1/2: loss 0.5000, sup 0.2500, validation macro AUROC 0.712")
    assert end.startswith("train: 16/32 (50 %")


@pytest.mark.long
def test_verbose_shows_every_rank_beside_the_bar(phantom_data: str, tmp_path) -> None:
    sections = {
        "model.backbone": "test_efficientnet_gn",
        "train.epochs": 1,
        "train.batch_size": 24,
        "train.log_every": 5,
    }
    resources = {"train.num_workers": 2, "train.worker_cpus": 0.5, "data.tasks": 1, "data.task_cpus": 0.25}
    settings = [part for key, value in {**sections, **resources}.items() for part in ("--set", f"{key}={value}")]
    command = [sys.executable, "-c", "from infra.cli import main; main()", "train", "-v"]
    terminal = Terminal()
    done = subprocess.run(
        [*command, "--data", phantom_data, "--out", str(tmp_path / "run"), *settings],
        stdout=terminal.end,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
        env={**os.environ, "COLUMNS": WIDTH, "TERM": "xterm"},
    )
    os.close(terminal.end)
    text = terminal.text()
    assert done.returncode == 0, done.stderr
    assert "━" in text
    for rank in range(2):
        line = rf"worker {rank}: step 10, \d+\.\d images/s of all, \d+\.\d % of its time waiting for data"
        assert re.search(line, done.stderr), done.stderr
