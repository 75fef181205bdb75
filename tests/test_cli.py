"""The command line from outside, as a process: one line for a mistake, its exit code, nothing heavy before its time."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = {"ray", "torch", "mlflow", "pyarrow", "albumentations", "pandas"}
SMALL = ["--set", "prepare.image_size=32", "--set", "prepare.phantom.images=200"]


def call(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from infra.cli import main; main()", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=240, check=False, env={**os.environ, **environment}
    )


def the_line(done: subprocess.CompletedProcess[str]) -> str:
    """The one line on stderr of a user error."""
    assert done.returncode == 2, done.stderr + done.stdout
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("mpc-cxr: error: ")
    return lines[0].removeprefix("mpc-cxr: error: ")


@pytest.fixture
def nih(tmp_path: Path) -> Path:
    """A collection of the NIH's layout whose images are not images."""
    root = tmp_path / "nih"
    (root / "images").mkdir(parents=True)
    names = [f"{patient:08d}_000.png" for patient in range(40)]
    for name in names:
        (root / "images" / name).write_bytes(b"this is no image")
    rows = [f"{name},{'Edema|Mass' if n % 2 else 'Hernia'},{n},PA" for n, name in enumerate(names)]
    header = "Image Index,Finding Labels,Patient ID,View Position"
    (root / "Data_Entry_2017.csv").write_text("\n".join([header, *rows]) + "\n")
    return root


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ("config show --set loss.lambda_icp=1", ["unknown key loss.lambda_icp", "did you mean loss.lambda_ipc?"]),
        ("config show --set loss.lambda_ipc=-1", ["loss.lambda_ipc = -1", "greater than or equal to 0"]),
        ("config show --config mcp", ["--config mcp", "neither one of the presets", "mpc-cxr config presets"]),
        ("prepare --source nih --out {tmp}/out", ["nih", "needs --root"]),
        ("prepare --source nih --root {tmp}/nowhere --out {tmp}/out", ["{tmp}/nowhere", "table"]),
        ("check --data {tmp}/nowhere", ["{tmp}/nowhere", "mpc-cxr prepare"]),
        ("train --data {tmp}/nowhere --out {tmp}/out --dry-run", ["{tmp}/nowhere", "mpc-cxr prepare"]),
        ("train --data {tmp} --out {tmp}", ["--out {tmp}", "not empty", "--resume"]),
        ("tune --data {tmp} --out {tmp}/out --space nothing", ["--space nothing", "mpc"]),
        ("evaluate --data {tmp} --out {tmp}/out", ["--checkpoint", "--model", "exactly one"]),
        ("predict --checkpoint {tmp} --images {tmp} --out {tmp}/out", ["--checkpoint {tmp}", "checkpoint.json"]),
        ("register --checkpoint {tmp} --model models:/a/3", ["--model models:/a/3", "plain name"]),
        ("promote --model mpc-cxr", ["--model mpc-cxr", "models:/mpc-cxr/3"]),
        ("demo --resume", ["--resume", "--out"]),
        ("train --data x", ["--out", "mpc-cxr train --help"]),
        ("train --data x --out y --epochs 3", ["--epochs", "mpc-cxr train --help"]),
        ("trian", ["trian", "train"]),
        ("evaluate --split validation", ["validation", "val"]),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(arguments: str, parts: list[str], tmp_path: Path) -> None:
    (tmp_path / "something").touch()
    line = the_line(call(*arguments.format(tmp=tmp_path).split()))
    for part in parts:
        assert part.format(tmp=tmp_path) in line, line


def test_missing_column(nih: Path, tmp_path: Path) -> None:
    table = nih / "Data_Entry_2017.csv"
    table.write_text(table.read_text().replace("Finding Labels", "Findings"))
    line = the_line(call("prepare", "--source", "nih", "--root", str(nih), "--out", str(tmp_path / "out")))
    assert "Data_Entry_2017.csv" in line
    assert "Finding Labels" in line


def test_unreadable_images_over_the_limit(nih: Path, tmp_path: Path) -> None:
    line = the_line(call("prepare", "--source", "nih", "--root", str(nih), "--out", str(tmp_path / "out")))
    assert "of 40 images" in line
    assert "prepare.max_bad" in line


def test_empty_split(tmp_path: Path) -> None:
    line = the_line(call("prepare", "--out", str(tmp_path / "out"), *SMALL, "--set", "prepare.split.val=0"))
    assert "'val' is empty" in line
    assert "val=0" in line


def test_unreachable_bucket() -> None:
    line = the_line(call("check", "--data", "s3://bucket/data", AWS_ENDPOINT_URL_S3="http://127.0.0.1:9"))
    assert "http://127.0.0.1:9" in line
    assert "does not answer" in line


def test_dry_run_writes_nothing(tmp_path: Path) -> None:
    done = call("prepare", "--out", str(tmp_path / "out"), *SMALL, "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "would prepare" in done.stdout
    assert not (tmp_path / "out").exists()


def test_traceback_with_v_alone() -> None:
    done = call("config", "show", "-v", "--set", "loss.sup=bce")
    assert done.returncode == 2
    assert "Traceback" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("mpc-cxr: error: --set: loss.sup = 'bce'")


def test_settings_and_schema_are_shown() -> None:
    shown = call("config", "show", "--config", "wan", "--set", "optim.lr=0.5")
    assert "lr: 0.5" in shown.stdout
    assert "sup: wan" in shown.stdout
    assert "Weight of instance-level consistency" in call("config", "schema").stdout
    assert "lac-plc" in call("config", "presets").stdout


def test_help_needs_nothing_heavy() -> None:
    code = f"import sys; from infra.cli.app import run; run(['--help']); sys.exit(str({HEAVY!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.strip() == "set()"
    for verb in ("demo", "prepare", "train", "tune", "predict", "doctor"):
        assert verb in done.stdout


def test_doctor_finds_what_is_wrong(tmp_path: Path) -> None:
    well = call("doctor", "--out", str(tmp_path))
    assert well.returncode == 0, well.stdout
    assert not list(tmp_path.iterdir()), "doctor leaves nothing behind"
    ill = call("doctor", "--out", str(tmp_path), "--data", str(tmp_path / "nowhere"), "--set", "train.worker_cpus=1000")
    assert ill.returncode == 1
    assert "train.worker_cpus" in ill.stdout
    assert "mpc-cxr prepare" in ill.stdout


@pytest.mark.slow
def test_ctrl_c_is_130(tmp_path: Path) -> None:
    size = ["--set", "prepare.phantom.images=20000", "--set", "prepare.image_size=32"]
    command = [
        sys.executable,
        "-u",
        "-c",
        "from infra.cli import main; main()",
        "prepare",
        "--out",
        str(tmp_path / "out"),
    ]
    with subprocess.Popen(
        [*command, *size],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # a background job of a shell ignores Ctrl-C, and so would everything that it starts
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()  # the first shard is there
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.splitlines()[-1].startswith("mpc-cxr: interrupted:")
