"""Benchmarks with real Ray: protocols, the table against scikit-learn, folds, lone failures, resumption."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from sklearn.metrics import average_precision_score, roc_auc_score
from test_nih import collection

from infra.benchmarking import load
from infra.settings import presets
from mpc.errors import UserError
from pipeline.manifest import matrix
from tuning.benchmark.protocol import Protocol, combinations
from tuning.benchmark.report import markdown, write_page
from tuning.benchmark.run import benchmark, table_cells, tuning_cells

TINY: dict[str, Any] = {
    "title": "tiny",
    "prepare": {
        "source": "phantom",
        "findings": ["Effusion", "Mass", "Nodule"],
        "image_size": 32,
        "row_group": 64,
        "phantom": {"images": 300},
        "split": {"by": "hash", "val": 0.2, "test": 0.4},
    },
    "run": {
        "model": {"backbone": "test_efficientnet_gn", "weights": "none"},
        "data": {"tasks": 1, "task_cpus": 0.25},
        "train": {"epochs": 1, "batch_size": 16, "worker_cpus": 0.75},
    },
    "tuning": {"seeds": [0], "trials": 2, "space": {"optim.lr": [1e-3, 1e-5]}},
    "seeds": [100, 101],
    "against": ["an"],
    "oracles": ["full"],
    "methods": {
        "full": {"run": {"train": {"method": "full"}}},
        "an": {"run": {"train": {"method": "an"}}},
        "mpc": {"preset": "mpc"},
    },
}


def written(folder: Path, **changes: Any) -> str:
    path = folder / "protocol.yaml"
    path.write_text(yaml.safe_dump({**TINY, **changes}))
    return str(path)


def cell_files(out: Path, name: str) -> dict[str, Path]:
    return {file.parent.name: file for file in out.glob(f"*/cells/*/{name}")}


@pytest.mark.parametrize("name", sorted(presets("protocols")))
def test_shipped_protocols_are_sound(name: str) -> None:
    protocol, methods = load(name)
    assert {"an", "wan", "full", "mpc", "mpc-abstract", "lac-plc-wan"} <= methods.keys()
    cells = table_cells(protocol, None, "out", None)
    assert (
        len({(cell.name, cell.data) for cell in cells})
        == len(cells)
        == len(methods) * len(protocol.seeds) * protocol.folds
    )
    if protocol.tuning is not None:
        assert len(tuning_cells(protocol, "out", None)) == len(methods) * protocol.tuning.trials * len(
            protocol.tuning.seeds
        )
    assert (
        len(
            {
                run.model_dump_json(include={"model": {"backbone", "weights"}, "train": {"epochs"}})
                for run in methods.values()
            }
        )
        == 1
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lower": "wan"}, "wan is named but not among the methods"),
        ({"folds": 3}, "folds need a real collection"),
        ({"seeds": [0, 1]}, "seed 0 is used for tuning and for the table"),
        ({"tuning": {**TINY["tuning"], "trials": 3}}, "tries 2 settings, tuning.trials is 3"),
        ({"methods": {**TINY["methods"], "x": {"preset": "nothing"}}}, "neither one of the presets"),
        ({"methods": {**TINY["methods"], "x": {"run": {"loss": {"sup": "bce"}}}}}, "methods.x: loss.sup"),
        ({"run": {"optim": {"rate": 1}}}, "unknown key optim.rate"),
        ({"tuning": {**TINY["tuning"], "space": {"optim.lr": [1e-3, -1]}}}, "optim.lr"),
        ({"epochs": 3}, "unknown key epochs"),
    ],
)
def test_a_protocol_that_cannot_be_run_is_refused_in_one_line(changes: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as refused:
        load(written(tmp_path, **changes))
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


def test_every_combination_of_a_space_is_one_trial() -> None:
    assert combinations({"a.b": (1, 2), "c.d": ("x",)}) == [{"a.b": 1, "c.d": "x"}, {"a.b": 2, "c.d": "x"}]
    assert combinations({}) == [{}]


@pytest.mark.parametrize(
    ("prepare", "data", "roots", "message"),
    [
        (TINY["prepare"], "somewhere", (), "leave --data out"),
        (None, None, (), "needs --data"),
        ({"source": "nih"}, None, (), "needs --root"),
        ({"source": "nih"}, None, ("somewhere",), "none.pth: no such file; set run.model.weights"),
    ],
)
def test_data_that_a_protocol_needs_or_does_not_read(
    prepare: Any, data: Any, roots: Any, message: str, tmp_path: Path
) -> None:
    weights = ["run.model.weights=none.pth"] if roots else []
    protocol, methods = load(written(tmp_path, prepare=prepare), weights)
    with pytest.raises(UserError, match=message):
        benchmark(protocol, methods, str(tmp_path / "out"), roots=roots, data=data)


@pytest.fixture(scope="module")
def finished(ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[Protocol, Any, Path, dict[str, Any]]:
    """A benchmark one of whose methods diverges."""
    folder = tmp_path_factory.mktemp("benchmark")
    wild = {
        "run": {"train": {"method": "wan"}, "optim": {"clip": 1e30, "name": "sgd"}},
        "space": {"optim.lr": [1e30, 1e-3]},
    }
    protocol, methods = load(written(folder, methods={**TINY["methods"], "wild": wild}))
    return protocol, methods, folder / "out", benchmark(protocol, methods, str(folder / "out"))


def test_the_table_is_what_scikit_learn_makes_of_the_predictions(finished: Any) -> None:
    _, _, out, found = finished
    auroc, ap = [], []
    for seed in (100, 101):
        table = pq.read_table(out / f"table/cells/an-seed{seed}-fold0/predictions.parquet")
        p, y = matrix(table["probabilities"]).astype(float), matrix(table["labels"])
        auroc.append(np.mean([roc_auc_score(y[:, k], p[:, k]) for k in range(3)]))
        ap.append(np.mean([average_precision_score(y[:, k], p[:, k]) for k in range(3)]))
    an = found["methods"]["an"]
    assert list(an["auroc"]["values"].values()) == pytest.approx(auroc, abs=1e-12)
    assert an["ap"]["mean"]["mean"] == pytest.approx(np.mean(ap), abs=1e-12)
    difference = found["methods"]["full"]["ap"]["against"]["an"]["difference"]["mean"]
    assert difference == pytest.approx(found["methods"]["full"]["ap"]["mean"]["mean"] - np.mean(ap), abs=1e-12)


def test_tuning_never_opens_the_test_split_and_chooses_by_validation(finished: Any) -> None:
    protocol, _, out, found = finished
    assert not [name for name in cell_files(out, "predictions.parquet") if "try" in name]
    for name, choice in found["choices"].items():
        best = max((t for t in choice["trials"] if t[protocol.metric] is not None), key=lambda t: t[protocol.metric])
        assert choice["settings"] == best["settings"], name
    assert len(cell_files(out, "metrics.jsonl")) == 2 * 4 - 1 + 2 * 4  # one cell diverged before its first epoch
    assert found["choices"]["wild"]["settings"] == {"optim.lr": 1e-3}  # the setting that diverged is no choice
    assert list(found["failed_while_tuning"]) == ["wild-try0-seed0-fold0"]
    assert found["failed"] == {}


def test_a_benchmark_leaves_no_checkpoints_and_says_all_of_it(finished: Any) -> None:
    _, _, out, found = finished
    assert not list(out.rglob("*.safetensors"))
    assert json.loads((out / "results.json").read_text())["methods"].keys() == {"full", "an", "mpc", "wild"}
    assert found["tests"]["mpc"]["ap"].keys() == {"an", "wild"}  # `full` sees true labels: no rival
    assert found["curves"]["mpc"]["pseudo_recall"]
    assert "mpc minus" in markdown(found)
    page = Path(write_page(found, str(out))).read_text()
    assert "SYNTHETIC DATA" in page
    assert "http" not in page.replace("http-equiv", "")


def test_a_finished_benchmark_is_read_again_and_another_is_refused(finished: Any) -> None:
    protocol, methods, out, found = finished
    before = {name: file.stat().st_mtime_ns for name, file in cell_files(out, "metrics.jsonl").items()}
    again = benchmark(protocol, methods, str(out), resume=True)
    assert again["methods"] == found["methods"]
    assert {name: file.stat().st_mtime_ns for name, file in cell_files(out, "metrics.jsonl").items()} == before
    other = protocol.model_copy(update={"seeds": (100, 102)})
    with pytest.raises(UserError, match="begun with"):
        benchmark(other, methods, str(out), resume=True)
    with pytest.raises(UserError, match="--resume"):
        benchmark(protocol, methods, str(out))


def test_what_tuning_chose_stays_once_the_table_has_begun(finished: Any) -> None:
    """A cell that failed while tuning, and succeeds when the benchmark is resumed, might have been chosen."""
    protocol, methods, out, found = finished
    values = [trial[protocol.metric] for trial in found["choices"]["mpc"]["trials"]]
    other = min(range(len(values)), key=lambda number: values[number])
    texts = {file: file.read_text() for file in (out / "tuning").rglob(f"mpc-try{other}-*/metrics.jsonl")}
    for file, text in texts.items():
        lines = [{**json.loads(line), protocol.metric: 1.0} for line in text.splitlines()]
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    try:
        assert benchmark(protocol, methods, str(out), resume=True)["choices"] == found["choices"]
    finally:
        for file, text in texts.items():
            file.write_text(text)


def test_folds_test_every_image_once(ray_session: None, tmp_path: Path) -> None:
    labels = ["Effusion", "Mass", "Effusion|Mass", "No Finding"]
    rows = [(f"{i:08d}_000.png", labels[i % 4], str(i // 2), "50", "M", "PA") for i in range(120)]
    root = collection(tmp_path / "nih", rows)
    prepare = {"source": "nih", "findings": ["Effusion", "Mass"], "image_size": 16, "split": {"by": "hash", "val": 0.3}}
    settings = written(
        tmp_path,
        prepare=prepare,
        folds=3,
        tuning=None,
        run={**TINY["run"], "model": {"backbone": "test_efficientnet_gn"}},
        methods={name: TINY["methods"][name] for name in ("full", "an")},
        ours=[],
    )
    protocol, methods = load(settings)
    found = benchmark(protocol, methods, str(tmp_path / "out"), roots=[str(root)])
    assert found["images_tested"] == 120
    for seed in (100, 101):
        files = [
            f for name, f in cell_files(tmp_path / "out", "predictions.parquet").items() if f"an-seed{seed}" in name
        ]
        tested = [image for file in files for image in pq.read_table(file)["image_id"].to_pylist()]
        assert len(files) == 3
        assert sorted(tested) == sorted(row[0].removesuffix(".png") for row in rows)


@pytest.mark.slow
def test_a_benchmark_without_a_run_that_ended_well_is_told_in_one_line(ray_session: None, tmp_path: Path) -> None:
    methods = {name: TINY["methods"][name] for name in ("full", "an")}
    bad = {"run": {**TINY["run"], "optim": {"lr": 1e30}}, "methods": methods, "ours": []}
    tuned = load(written(tmp_path, **bad, tuning={"seeds": [0], "trials": 1, "space": {"optim.warmup": [0.0]}}))
    with pytest.raises(UserError, match=r"none of 2 runs ended well, first an-try0-seed0-fold0: .*not finite"):
        benchmark(*tuned, str(tmp_path / "tuned"))
    protocol = written(tmp_path, **bad, tuning=None)
    with pytest.raises(UserError, match=r"none of 4 runs ended well, first an-seed100-fold0: .*not finite") as refused:
        benchmark(*load(protocol), str(tmp_path / "out"))
    assert "\n" not in str(refused.value)
    assert len(json.loads((tmp_path / "out" / "results.json").read_text())["failed"]) == 4


def start(protocol: str, out: Path, log: Path, *more: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", "from infra.cli import main; main()", "benchmark", "--config", protocol]
    with log.open("ab") as stream:
        return subprocess.Popen(
            [*command, "--out", str(out), *more], stdout=stream, stderr=stream, start_new_session=True
        )


@pytest.mark.long
def test_a_killed_benchmark_continues_without_training_finished_cells_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where Tune's state on disk is older than what the cells have done, as it may be by two seconds."""
    monkeypatch.setenv("TUNE_GLOBAL_CHECKPOINT_S", "0")
    out, log = tmp_path / "out", tmp_path / "log"
    train = {**TINY["run"]["train"], "epochs": 3}
    protocol = written(tmp_path, run={**TINY["run"], "train": train}, tuning=None)
    killed = start(protocol, out, log)
    state, aside = out / "table" / "tune", tmp_path / "aside"

    def wait_for(condition: Callable[[], object]) -> None:
        deadline = time.monotonic() + 180
        while not condition():
            assert killed.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)

    wait_for(lambda: any("checkpoint_000000" in file.read_text() for file in state.glob("experiment_state-*.json")))
    shutil.copytree(state, aside, ignore=lambda folder, names: [n for n in names if (Path(folder) / n).is_dir()])
    wait_for(lambda: len(cell_files(out, "metrics.json")) == 2)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    shutil.copytree(aside, state, dirs_exist_ok=True)
    before = {name: file.stat().st_mtime_ns for name, file in cell_files(out, "metrics.json").items()}
    assert start(protocol, out, log, "--resume").wait(300) == 0, log.read_text()
    after = {name: file.stat().st_mtime_ns for name, file in cell_files(out, "metrics.json").items()}
    assert len(after) == 6
    assert {name: after[name] for name in before} == before
    assert all(len(file.read_text().splitlines()) == 3 for file in cell_files(out, "metrics.jsonl").values())
    assert json.loads((out / "results.json").read_text())["incomplete"] == []
    assert not list(out.rglob("*.safetensors"))
