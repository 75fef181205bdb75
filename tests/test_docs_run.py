"""Every command of the README and of the docs is run, page after page, on small data in the places that they name."""

import json
import re
import shlex
import shutil
import time
from pathlib import Path

import pytest
import yaml
from test_docs import ROOT, calls, write_files
from world import build

from infra.cli.app import run
from pipeline import identity, storage

pytestmark = pytest.mark.slow

ELSEWHERE = {
    "jobs": "needs a cluster that submit started: tests/test_submit.py",
    "serve": "answers until Ctrl-C: tests/test_serve.py",
}
"""Verbs that do not run here, and where they do."""
PLANNED = {
    "benchmark": "takes hours: tests/test_benchmark.py runs a small one",
    "submit": "needs a cluster: tests/test_submit.py and tests/test_proof.py",
}
"""Verbs that do not go past --dry-run here, and where they do."""
ASKS = {"doctor": re.compile(r"cluster\.|endpoint_override"), "submit": re.compile(r"cluster\.(kind=ray|ray\.)")}
"""What marks calls that ask a running cluster, even in a dry run: tests/test_doctor.py, tests/test_submit.py."""
NETWORK = ("model.backbone=test_efficientnet_gn", "model.weights=none")
RUN = ("train.epochs=1", "train.batch_size=16", "train.worker_cpus=0.5", "data.tasks=1", "data.task_cpus=0.25")
SMALLER = {
    "prepare": ("prepare.image_size=32", "prepare.phantom.images=300", "prepare.reduce_to=null"),
    "train": (*NETWORK, *RUN, "train.num_workers=1", "train.min_workers=null"),
    "tune": (*NETWORK, *RUN, "search.max_trials=2", "search.max_concurrent=1"),
    "demo": ("train.epochs=2", "search.max_trials=2", "prepare.phantom.images=800"),
    "evaluate": ("evaluate.resamples=100",),
    "explain": ("explain.limit=2",),
    "register": ("evaluate.resamples=100",),
    "promote": ("gate.kind=none",),  # these few patients give no interval: tests/test_promotion.py
}
"""Settings that make a verb's work small; the documented ones are taken first, so that they too must be accepted."""

WRITERS = {"prepare", "train", "tune", "evaluate", "explain", "predict", "demo"}
"""Verbs whose --out is theirs to write; `sync` reads it."""


def pages() -> list[str]:
    """The README, then the pages in the order in which the site shows them."""
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    return ["README.md", *(page for entry in nav for page in entry.values() if isinstance(page, str))]


class Tour:
    """A person who follows the docs from page to page.

    Args:
        folder: stands for the root of the file system and is the working directory.
        bucket: stands for s3://bucket.
    """

    def __init__(self, folder: Path, bucket: str) -> None:
        self.folder, self.bucket = folder, bucket
        self.seen: set[str] = set()
        self.tracking = f"tracking.uri=sqlite:///{folder}/mlflow.db"

    def localised(self, text: str) -> str:
        """The same with the places of this tour."""
        for place in ("data", "secrets"):
            text = text.replace(f"/{place}/", f"{self.folder}/{place}/")
        return text.replace("s3://bucket", self.bucket)

    def open(self, page: str) -> None:
        """Saves the settings that a page shows."""
        write_files(page, self.folder)
        for file in self.folder.glob("*.yaml"):
            file.write_text(self.localised(file.read_text().replace(str(self.folder), "")))

    def follow(self, call: str) -> str | None:
        """Runs one documented call; what went wrong, if anything did."""
        verb, *rest = shlex.split(self.localised(call), comments=True)
        known = verb if verb == "demo" else call  # minutes, and README and start page show the same one
        if verb in ELSEWHERE or known in self.seen or (verb in ASKS and ASKS[verb].search(call)):
            return None
        self.seen.add(known)
        arguments = [verb, *rest, *(word for setting in self.settings(verb) for word in ("--set", setting))]
        if verb in PLANNED and "--dry-run" not in rest:
            arguments = [verb, "--dry-run", *arguments[1:]]
        if verb in WRITERS and "--out" in rest and "--resume" not in rest:
            self.clear(rest[rest.index("--out") + 1])
        started = time.monotonic()
        code = run(arguments)
        print(f"{time.monotonic() - started:6.1f} s  {code}  {call}", flush=True)
        return None if code == 0 else f"code {code}: {shlex.join(arguments)}"

    def settings(self, verb: str) -> tuple[str, ...]:
        """What makes a call small, and its records those of this tour."""
        tracked = (self.tracking,) if verb not in {"config", "prepare", "check", "benchmark", "submit"} else ()
        return (*SMALLER.get(verb, ()), *tracked)

    def clear(self, out: str) -> None:
        """Makes room for what an earlier page wrote to the same place."""
        if out.startswith("s3://"):
            storage.delete(out)
        else:
            shutil.rmtree(self.folder / out, ignore_errors=True)


def test_a_person_who_follows_the_docs_meets_no_error(
    ray_session: None, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(tmp_path, bucket)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(identity.VARIABLE, "0123456789abcdef-a-key-of-a-test")
    tour, wrong = Tour(tmp_path, bucket), []
    documented = calls()
    for page in pages():
        tour.open(page)
        wrong += [fault for where, call in documented if where == page and (fault := tour.follow(call))]
    assert not wrong, "\n".join(wrong)
    assert len(tour.seen) > 30
    metrics = json.loads((tmp_path / "runs" / "demo" / "test" / "metrics.json").read_text())
    assert metrics["synthetic"] is True
    assert (tmp_path / "runs" / "demo" / "report.html").exists()
