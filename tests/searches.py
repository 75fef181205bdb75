"""Searches as processes of their own, each with a local cluster: started, waited for, killed."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from pipeline.config import RunConfig
from tuning.config import SearchConfig

SEARCH_ALONE = """
import sys
from pipeline.config import RunConfig
from tuning import space
from tuning.config import SearchConfig
from tuning.search import search
data, out, run, config, yaml, resume = sys.argv[1:]
run = RunConfig.model_validate_json(run)
search(run, SearchConfig.model_validate_json(config), space.load(yaml, run), data, out, resume=resume == "resume")
"""


def write_space(folder: Path, text: str) -> str:
    path = folder / "space.yaml"
    path.write_text(text)
    return str(path)


def epochs_of(out: Path) -> dict[str, int]:
    return {f.parent.name: len(f.read_text().splitlines()) for f in out.glob("trials/*/metrics.jsonl")}


class Searches:
    """Starts searches, and ends those that a failed test has left.

    Args:
        folder: where what they say on stderr is kept.
    """

    def __init__(self, folder: Path) -> None:
        self.errors = folder / "errors.txt"
        self._started: list[subprocess.Popen[bytes]] = []

    def start(
        self, data: str, out: str | Path, base: RunConfig, config: SearchConfig, yaml: str, *, resume: bool = False
    ) -> "subprocess.Popen[bytes]":
        """A search in a process and a local cluster of its own."""
        settings = [base.model_dump_json(), config.model_dump_json(), yaml, "resume" if resume else ""]
        command = [sys.executable, "-c", SEARCH_ALONE, data, str(out), *settings]
        with self.errors.open("wb") as file:
            self._started.append(subprocess.Popen(command, start_new_session=True, stderr=file))
        return self._started[-1]

    def ended_well(self, process: "subprocess.Popen[bytes]", seconds: float = 400) -> None:
        """Waits for the end; fails with what the process said if it failed."""
        assert process.wait(timeout=seconds) == 0, self.said()

    def wait_for(
        self, condition: Callable[[], object], process: "subprocess.Popen[bytes]", seconds: float = 300
    ) -> None:
        """Returns once the condition holds; fails with what the process said if it ends before."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert process.poll() is None, self.said()
            assert time.monotonic() < deadline, f"nothing happened in {seconds} s: {self.said()}"
            time.sleep(0.05)

    def kill(self, process: "subprocess.Popen[bytes]") -> None:
        """As the kernel kills: nothing is tidied up."""
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def said(self) -> str:
        """The end of what the last one said."""
        return self.errors.read_text()[-3000:]

    def close(self) -> None:
        """Kills what still runs."""
        for process in self._started:
            if process.poll() is None:
                self.kill(process)
