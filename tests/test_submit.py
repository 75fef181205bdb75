"""Any verb elsewhere: what travels, what is refused before it does, and real jobs on a Ray head with a token."""

import io
import json
import os
import signal
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
import requests
import yaml
from clusters import Head, Tunnel, alive, ray_head

from infra.cluster import ClusterConfig, RayConfig
from infra.settings import load, run_config
from infra.submit import call as calls
from infra.submit.batch import Slurm
from infra.submit.batch import state_of as slurm_state
from infra.submit.call import Call
from infra.submit.kubernetes import state_of as kubernetes_state
from infra.submit.package import Job, job_of, pack
from infra.submit.ray_jobs import RayJobs
from infra.submit.target import State, Status
from mpc.errors import UserError
from tuning.space import load as load_space

MAIN = [sys.executable, "-c", "from infra.cli import main; main()"]
ELSEWHERE = ("--space", "job/space.yaml", "--config", "job/config.yaml")
SECRET = "a-secret-that-nobody-may-see"


def read(line: str) -> Call:
    return calls.read(calls.command_line(), line.split())


def files_of(job: Job) -> dict[str, str]:
    with zipfile.ZipFile(io.BytesIO(job.package)) as archive:
        assert archive.testzip() is None
        return {name: archive.read(name).decode(errors="replace") for name in archive.namelist()}


def run(head: Head, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command line as a process, with what a client of `head` has."""
    environment = head.environment | environment
    return subprocess.run(
        [*MAIN, *arguments], capture_output=True, text=True, timeout=240, check=False, env=environment
    )


def test_settings_space_and_places_travel_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text("loss: {lambda_ipc: 0.3}\ncluster: {kind: ray, shared_paths: [.]}\n")
    Path("space.yaml").write_text(
        "optim.lr: {loguniform: [0.0003, 0.01]}\nloss.sup: {choice: [an, em]}\n"
        "baseline.em_alpha: {uniform: [0.1, 0.4], when: {loss.sup: em}}\n"
    )
    call = read("tune --data data --out s3://bucket/run --config mine.yaml --set optim.lr=0.5 --space space.yaml")
    calls.require_shared(call, call.cluster.shared_paths)
    files = files_of(job_of(call, {}))
    arguments = json.loads(files["job/arguments.json"])
    places = ["--data", str(tmp_path / "data"), "--out", "s3://bucket/run"]
    assert arguments == ["tune", *places, *ELSEWHERE], "what runs there names no file that lies here"
    there = tmp_path / "there"
    there.mkdir()
    monkeypatch.chdir(there)
    for name in ("job/config.yaml", "job/space.yaml"):
        (there / name).parent.mkdir(exist_ok=True)
        (there / name).write_text(files[name])
    settings = load("job/config.yaml")
    assert (settings.loss.lambda_ipc, settings.optim.lr) == (0.3, 0.5)
    assert settings == call.settings.model_copy(update={"cluster": ClusterConfig()})
    space = load_space("job/space.yaml", run_config(settings))
    assert dict(space.describe()) == {
        "optim.lr": "loguniform 0.0003, 0.01",
        "loss.sup": "choice an, em",
        "baseline.em_alpha": "uniform 0.1, 0.4 when loss.sup is em",
    }


def test_a_protocol_travels_without_its_presets() -> None:
    from infra.benchmarking import load as load_protocol

    call = read("benchmark --config phantom-small --out s3://b/x --set seeds=[5,6] --set cluster.kind=slurm")
    text = files_of(job_of(call, {}))["job/config.yaml"]
    tree = yaml.safe_load(text)
    assert not any(method["preset"] for method in tree["methods"].values())
    here = load_protocol("phantom-small", ["seeds=[5,6]"])
    folder = Path(os.environ.get("TMPDIR", "/tmp")) / "protocol.yaml"
    folder.write_text(text)
    assert load_protocol(str(folder))[1] == here[1]
    folder.unlink()


def test_the_wheel_lies_open_in_the_package() -> None:
    call = read("check --data s3://b/data --set cluster.kind=ray")
    files = files_of(job_of(call, {}))
    assert "mpc/step.py" in files
    assert "infra/presets/mpc.yaml" in files
    assert any(name.endswith(".dist-info/METADATA") for name in files)
    assert not [name for name in files if "tests" in name or ".git" in name or name.endswith(".pyc")]
    image = read("check --data s3://b/data --set cluster.kind=ray --set cluster.code=image")
    assert set(files_of(job_of(image, {}))) == {"job/arguments.json"}
    assert "the code is in the image" in job_of(image, {}).size()
    assert pack({"a": "1"}, None) == pack({"a": "1"}, None), "the same package is uploaded once"


def test_only_what_is_no_secret_is_handed_over() -> None:
    call = read("check --data s3://b/d --set cluster.kind=ray")
    environ = {"AWS_REGION": "eu-central-1", "AWS_SECRET_ACCESS_KEY": SECRET, "RAY_AUTH_TOKEN": SECRET}
    job = job_of(call, environ)
    assert {name: value for name, value in job.environment.items() if name != "MPC_CXR_COMMIT"} == {
        "AWS_REGION": "eu-central-1"
    }
    with pytest.raises(UserError, match="AWS_ENDPOINT_URL: holds credentials"):
        job_of(call, {"AWS_ENDPOINT_URL": f"http://me:{SECRET}@store:9000"})


def test_the_tracking_server_of_this_machine_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    line = "train --data s3://b/d --out s3://b/o --set cluster.kind=ray"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow:5000")
    assert read(line).settings.tracking.uri == "http://mlflow:5000"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:{SECRET}@mlflow:5000")
    with pytest.raises(UserError, match="password") as caught:
        read(line)
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("train --data /data/nih --out s3://b/o", r"--data /data/nih: is on this machine"),
        ("train --data s3://b/d --out runs/1", r"--out runs/1: .*cluster\.shared_paths"),
        ("prepare --source nih --root s3://b/a --root /data --out s3://b/o", "--root /data: is on"),
        ("prepare --out s3://b/o --set prepare.key_file=key", r"prepare\.key_file key: is on"),
        ("train --data s3://b/d --out s3://b/o --set model.weights=w.safetensors", r"model\.weights w"),
        ("sync --out s3://b/o --set tracking.uri=sqlite:////home/me/mlflow.db", r"tracking\.uri /home/me/mlflow\.db"),
        ("train --data /shared/../etc --out s3://b/o --set cluster.shared_paths=[/shared]", "--data /shared/../etc"),
    ],
)
def test_paths_that_other_nodes_lack_are_refused(line: str, message: str) -> None:
    call = read(f"{line} --set cluster.kind=slurm")
    with pytest.raises(UserError, match=message):
        calls.require_shared(call, call.cluster.shared_paths)


@pytest.mark.parametrize(
    ("line", "looked_at"),
    [
        ("train --data /shared/nih --out /shared/runs/1 --set cluster.shared_paths=[/shared]", 2),
        ("prepare --source nih --root s3://b/a --out s3://b/o --set prepare.table.file=labels.csv", 2),
        ("train --data s3://b/d --out s3://b/o --set model.weights=imagenet --set prepare.key_file=key", 2),
        ("config show", 0),
    ],
)
def test_paths_that_all_nodes_have_are_taken(line: str, looked_at: int) -> None:
    call = read(f"{line} --set cluster.kind=slurm")
    calls.require_shared(call, call.cluster.shared_paths)
    assert len(list(calls.places(call))) == looked_at


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "submit nothing: is no verb"),
        ("trian --data x", "submit trian: is no verb that can run elsewhere; name one of .*train"),
        ("jobs status x", "submit jobs: is no verb"),
        ("submit train", "submit submit: is no verb"),
        ("config", "submit config: is no verb"),
        ("train --data s3://b/d --out s3://b/o --set cluster.kid=ray", "unknown key cluster.kid"),
        ("train --data s3://b/d --out s3://b/o --set loss.sup=x --set cluster.kind=ray", "loss.sup = 'x'"),
    ],
)
def test_mistakes_are_found_before_anything_travels(line: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read(line)


def test_retries_continue_what_they_left() -> None:
    line = "train --data s3://b/d --out s3://b/o --set cluster.kind=slurm"
    arguments = json.loads(files_of(job_of(read(line), {}, resume=True))["job/arguments.json"])
    assert "--resume" in arguments
    assert "--resume" not in json.loads(files_of(job_of(read(line), {}))["job/arguments.json"])
    config = json.loads(files_of(job_of(read("config show"), {}, resume=True))["job/arguments.json"])
    assert config == ["config", "show", "--config", "job/config.yaml"], "verbs that cannot resume start again"


def test_without_a_cluster_the_verb_runs_here(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_ADDRESS")}
    line = ["submit", "check", "--data", str(tmp_path), "--follow", "--set", "cluster.kind=local"]
    done = subprocess.run([*MAIN, *line], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("mpc-cxr: error: ")
    assert "dataset.json" in done.stderr


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        ({}, State(Status.WAITING)),
        ({"jobDeploymentStatus": "Initializing"}, State(Status.WAITING, "Initializing")),
        ({"jobDeploymentStatus": "Running", "jobStatus": "RUNNING"}, State(Status.RUNNING, "Running")),
        ({"jobDeploymentStatus": "Complete", "jobStatus": "SUCCEEDED"}, State(Status.SUCCEEDED, "Complete")),
        (
            {"jobDeploymentStatus": "Failed", "jobStatus": "FAILED", "reason": "AppFailed", "message": "code 1"},
            State(Status.FAILED, "AppFailed: code 1"),
        ),
        ({"jobDeploymentStatus": "Failed", "reason": "ValidationFailed"}, State(Status.FAILED, "ValidationFailed")),
        ({"jobDeploymentStatus": "Retrying", "jobStatus": "FAILED"}, State(Status.WAITING, "Retrying")),
        ({"jobDeploymentStatus": "Suspended", "jobStatus": "STOPPED"}, State(Status.STOPPED, "Suspended")),
    ],
)
def test_what_the_operator_writes_is_understood(status: dict[str, str], expected: State) -> None:
    assert kubernetes_state(status) == expected


@pytest.mark.parametrize(
    ("queued", "status"),
    [
        ("PENDING Resources", Status.WAITING),
        ("RUNNING None", Status.RUNNING),
        ("CANCELLED None", Status.STOPPED),
        ("COMPLETED None", Status.FAILED),
        ("NODE_FAIL None", Status.FAILED),
        ("", Status.FAILED),
    ],
)
def test_a_batch_job_without_an_exit_code_has_not_succeeded(queued: str, status: Status) -> None:
    assert slurm_state(queued, "7").status is status


def test_a_batch_job_is_known_by_its_folder(tmp_path: Path) -> None:
    target = Slurm(load(None, ["cluster.kind=slurm", f"cluster.slurm.folder={tmp_path}"]).cluster)
    folder = tmp_path / "mpc-train-1"
    folder.mkdir()
    (folder / "log.txt").write_text("epoch 1\nepoch 2\n")
    (folder / "exit_code").write_text("2\n")
    assert target.state("mpc-train-1").exit_code == 2
    assert list(target.logs("mpc-train-1", follow=True)) == ["epoch 1\nepoch 2\n"]
    (folder / "exit_code").write_text("0\n")
    assert target.state("mpc-train-1").status is Status.SUCCEEDED
    with pytest.raises(UserError, match="mpc-train-2: is not known in"):
        target.state("mpc-train-2")
    with pytest.raises(UserError, match="is not known"):
        target.state("../mpc-train-1")


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    """A head of one CPU, with a token, on this machine."""
    with ray_head() as found:
        yield found


def test_a_verb_on_a_cluster(head: Head, tmp_path: Path) -> None:
    done = run(head, "submit", "config", "show", "--set", "optim.lr=0.625", "--follow", AWS_SECRET_ACCESS_KEY=SECRET)
    assert done.returncode == 0, done.stderr + done.stdout
    assert "lr: 0.625" in done.stdout
    assert "KiB of it the project's wheel" in done.stdout
    assert done.stdout.splitlines()[-1].endswith(": succeeded, Job finished successfully.")
    assert not done.stderr
    name = done.stdout.split(" as ")[1].partition(":")[0]
    again = run(head, "jobs", "logs", name)
    assert "lr: 0.625" in again.stdout
    assert run(head, "jobs", "status", name).returncode == 0


@pytest.mark.slow
def test_a_verb_that_fails_there_fails_here(head: Head, tmp_path: Path) -> None:
    done = run(head, "submit", "--follow", "check", "--data", str(tmp_path))
    assert done.returncode == 2, "as it does here"
    assert "holds no dataset.json" in done.stdout
    assert "failed" in done.stdout.splitlines()[-1]


def test_nothing_runs_without_the_token(head: Head, tmp_path: Path) -> None:
    home = {"HOME": str(tmp_path), "RAY_AUTH_TOKEN_PATH": ""}
    for environment, message in (
        (home, "no token for the cluster"),
        ({"RAY_AUTH_TOKEN": "another-token-0123456789"}, "refuses the token"),
        (home | {"RAY_AUTH_MODE": "disabled"}, "no token for the cluster"),
    ):
        done = run(head, "submit", "config", "show", "--follow", **environment)
        assert done.returncode == 2, done.stdout
        assert len(done.stderr.splitlines()) == 1, done.stderr
        assert message in done.stderr


def test_strangers_get_nothing_over_http(head: Head) -> None:
    wrong = {"Authorization": "Bearer another-token-0123456789"}
    for headers, status in (({}, 401), (wrong, 403)):
        for method, path in (
            ("POST", "/api/jobs/"),
            ("GET", "/api/jobs/"),
            ("GET", "/api/jobs/x/logs"),
            ("DELETE", "/api/jobs/x"),
            ("PUT", "/api/packages/gcs/_ray_pkg_0123456789abcdef.zip"),
            ("GET", "/nodes?view=summary"),
            ("GET", "/api/v0/logs/file?filename=gcs_server.out"),
        ):
            said = requests.request(
                method, f"{head.address}{path}", headers=headers, json={"entrypoint": "id"}, timeout=30
            )
            assert said.status_code == status, (method, path)
            assert "id" not in said.headers.get("submission_id", "")


@pytest.mark.long
def test_strangers_join_no_cluster(head: Head, tmp_path: Path) -> None:
    driver = [sys.executable, "-c", "import sys, ray; ray.init(address=sys.argv[1], logging_level=50)", head.gcs]
    node = ["ray", "start", f"--address={head.gcs}", "--num-cpus=1", "--block"]
    other = head.environment | {"RAY_ADDRESS": "", "HOME": str(tmp_path)}
    without = other | {"RAY_AUTH_MODE": "disabled", "RAY_AUTH_TOKEN_PATH": ""}
    strangers = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for command in (driver, node)
        for environment in (without, other | {"RAY_AUTH_TOKEN": "another-token-0123456789"})
    ]
    for stranger in strangers:
        said, _ = stranger.communicate(timeout=240)
        assert stranger.returncode != 0
        assert "auth" in said.lower(), said
    assert alive(head) == 1


def test_what_is_not_there(head: Head) -> None:
    done = run(head, "jobs", "status", "mpc-train-00000000")
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1), done.stderr
    assert "mpc-train-00000000: is not known" in done.stderr
    done = run(head, "jobs", "status", "x", RAY_ADDRESS="http://127.0.0.1:9")
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1), done.stderr
    assert "does not answer" in done.stderr


def test_a_head_that_fails_says_why() -> None:
    """The head's whole traceback arrives, in which the reason comes last: here, as Ray 2.60 said it of a full disk."""
    trace = 'Traceback (most recent call last):\n  File "job_head.py", line 419, in submit_job\n    resp = await it\n'
    reason = "ray.exceptions.RuntimeEnvSetupError: Failed to upload working_dir: [Errno 28] No space left on device"

    class FailingHead(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.answer(200, json.dumps({"version": "4", "ray_version": "2.60.0", "ray_commit": "unknown"}))

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.answer(500, f"{trace}RuntimeError: Request failed with status code 500: {trace}{reason}\n.")

        def answer(self, status: int, text: str) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), FailingHead) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        cluster = ClusterConfig(auth="disabled", ray=RayConfig(address=f"http://127.0.0.1:{server.server_port}"))
        with pytest.raises(UserError) as caught:
            RayJobs(cluster).submit(job_of(read("check --data s3://b/d --set cluster.kind=ray"), {}))
        server.shutdown()
    assert str(caught.value).endswith(f"{server.server_port}: {reason}; see the cluster's own log")


@pytest.mark.slow
def test_neither_ctrl_c_nor_a_lost_tunnel_ends_a_job(head: Head, tmp_path: Path) -> None:
    out = str(tmp_path / "data")
    long = ["--set", "prepare.phantom.images=60000", "--set", "prepare.image_size=32", "--set", "prepare.shard_mib=0.2"]
    with following(head, "submit", "--follow", "prepare", "--out", out, *long) as client:
        name = line_with(client, "submitted").split(" as ")[1].partition(":")[0]
        line_with(client, "Running entrypoint")
        client.send_signal(signal.SIGINT)
        assert client.wait(60) == 130
        assert f"mpc-cxr jobs logs {name} --follow" in client.stderr.read()
    tunnel = Tunnel(int(head.address.rpartition(":")[2]))
    through = head._replace(environment=head.environment | {"RAY_ADDRESS": f"http://127.0.0.1:{tunnel.port}"})
    with following(through, "jobs", "logs", name, "--follow") as client:
        line_with(client, "Running entrypoint")
        tunnel.cut()
        assert client.wait(60) == 1
        assert "the job goes on" in client.stderr.read()
    assert "running" in run(head, "jobs", "status", name).stdout
    with following(head, "jobs", "logs", name, "--follow") as client:
        line_with(client, "before any image is read")
        assert run(head, "jobs", "stop", name).returncode == 0
        assert client.wait(60) == 1
        assert "stopped" in client.stdout.read()
    assert run(head, "jobs", "status", name).returncode == 1


def following(head: Head, *arguments: str) -> "subprocess.Popen[str]":
    """A client that follows; a background job of a shell would ignore Ctrl-C, and so would what it starts."""
    return subprocess.Popen(
        [*MAIN[:1], "-u", *MAIN[1:], *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=head.environment,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def line_with(client: "subprocess.Popen[str]", text: str) -> str:
    """The next line of the client that holds `text`."""
    assert client.stdout is not None
    assert client.stderr is not None
    for line in client.stdout:
        if text in line:
            return line
    pytest.fail(f"no {text!r} before the end: {client.stderr.read()}")


def test_the_cluster_knows_no_secret(head: Head) -> None:
    code = "from ray.job_submission import JobSubmissionClient as C; [print(job) for job in C().list_jobs()]"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=head.environment, check=True
    )
    assert "mpc-config-show" in done.stdout
    assert SECRET not in done.stdout
    assert "gcs://_ray_pkg_" in done.stdout
