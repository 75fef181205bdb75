"""What doctor finds in good and in bad states: a real bucket, a real reader's key, a real cluster; and what to do."""

import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from clusters import ray_head
from conftest import READER_KEY, READER_SECRET

from infra.doctor import Finding, examine
from infra.doctor.bucket import clock, rights
from infra.doctor.cluster import clock as cluster_clock
from infra.doctor.cluster import compare
from infra.doctor.plan import plans
from infra.doctor.services import reachable
from infra.settings import load
from pipeline import storage
from tuning.store import client_of, experiment_id

MAIN = [sys.executable, "-c", "from infra.cli import main; main()"]


def by_name(findings: list[Finding]) -> dict[str, Finding]:
    return {finding.name: finding for finding in findings}


def test_a_bucket_with_all_rights(bucket: str) -> None:
    found = by_name(rights(f"{bucket}/runs/1"))
    assert found["write"].ok, found["write"].remedy
    assert found["write"].found == f"{bucket}/runs/1: list, put, get, multipart, delete, with conditions"
    assert found["clock"].ok
    assert storage.is_empty(bucket), "doctor leaves nothing behind"


def test_a_bucket_that_one_may_only_read(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", READER_KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", READER_SECRET)
    found = by_name(rights(f"{bucket}/runs"))["write"]
    assert not found.ok
    assert found.found == f"{bucket}/runs: list, without conditions"
    for name, right in (("put", "s3:PutObject"), ("multipart", "s3:AbortMultipartUpload"), ("delete", "s3:DeleteObj")):
        assert f"{name}: AccessDenied" in found.remedy
        assert right in found.remedy


def test_a_wrong_key(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    found = by_name(rights(bucket))["write"]
    assert not found.ok
    assert "list: SignatureDoesNotMatch" in found.remedy
    assert found.found.startswith(f"{bucket}: nothing")


def test_no_such_bucket_and_no_such_server(s3_server: str) -> None:
    (absent,) = rights("s3://nobody-made-this/runs")
    assert not absent.ok
    assert "'nobody-made-this'" in absent.remedy
    assert "create it" in absent.remedy
    (away,) = rights("s3://bucket/runs?endpoint_override=http://127.0.0.1:9")
    assert "does not answer" in away.remedy


def test_clocks() -> None:
    now = datetime(2026, 3, 1, 12, 0, 0, tzinfo=UTC)
    assert clock("Sun, 01 Mar 2026 11:59:30 GMT", now) == Finding(
        "clock", True, "30 s ahead of the storage", "set this machine's clock by NTP, for example with chrony"
    )
    late = clock("Sun, 01 Mar 2026 12:20:00 GMT", now - timedelta(0))
    assert (late.ok, late.found) == (False, "1200 s behind the storage")
    assert cluster_clock(105.0, 100.0, 110.0).found == "agrees with the cluster's"
    assert cluster_clock(200.0, 100.0, 110.0) == Finding(
        "cluster clock", False, "at most 90 s from the cluster's", "set the clocks of both sides by NTP"
    )


def test_two_sides_of_a_cluster() -> None:
    here = {"python": "3.11.9", "ray": "2.60.0", "mpc-cxr": "0.1.0", "torch": "2.15.0"}
    assert compare(here, here)[0].ok
    assert compare(here, here | {"python": "3.11.2"})[0].ok, "patches of Python are compatible"
    other = compare(here, here | {"torch": "2.15.0+cpu"})[0]
    assert (other.ok, other.found) == (True, "torch 2.15.0 here, 2.15.0+cpu there")
    for change in ({"ray": "2.59.0"}, {"python": "3.12.9"}):
        different = compare(here, here | change)[0]
        assert not different.ok
        assert f"{next(iter(change.values()))} there" in different.found
    missing = compare(here, {name: version for name, version in here.items() if name != "mpc-cxr"})[0]
    assert (missing.ok, missing.found) == (False, "mpc-cxr 0.1.0 here, None there")


def test_plans_against_resources() -> None:
    settings = load(None, ["train.num_workers=4", "train.worker_cpus=2", "train.use_gpu=true"])
    run, search = plans(settings, [{"CPU": 16.0, "GPU": 4.0}], "the cluster")
    assert (run.ok, search.ok) == (True, True)
    assert run.found == "the cluster has 16 CPUs for 8.5, 4 GPUs for 4"
    assert search.found == "the cluster carries 1 trials at a time"
    run, search = plans(settings, [{"CPU": 16.0, "GPU": 3.0}], "the cluster")
    assert (run.ok, search.ok) == (False, False)
    assert "lower train.num_workers" in run.remedy
    assert "3 GPUs" in search.remedy


def test_tracking_store_and_registry(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    (yet,) = reachable(uri)
    assert yet.ok
    assert "made at the first run" in yet.found
    experiment_id(client_of(uri), uri, "one")
    assert [(finding.name, finding.ok) for finding in reachable(uri)] == [("tracking", True), ("registry", True)]
    (tmp_path / "mlflow.db").write_bytes(b"this is no database")
    (broken,) = reachable(uri)
    assert not broken.ok
    assert "mend tracking.uri" in broken.remedy


def test_a_server_that_is_away_and_none_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    (away,) = reachable("http://127.0.0.1:9")
    assert not away.ok
    assert away.remedy.startswith("ConnectionRefusedError: [Errno 111] Connection refused; start the server")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    found = by_name(examine(load(), None, "s3://bucket/x?endpoint_override=http://127.0.0.1:9"))
    assert not found["tracking"].ok
    assert "MLFLOW_TRACKING_URI" in found["tracking"].remedy


ASK = """
import sys
from infra.doctor.cluster import examine_cluster
from infra.settings import load
for finding in examine_cluster(load(None, sys.argv[1:])):
    print(finding.name, finding.ok, finding.found, finding.remedy, sep=" | ")
"""


def asked(environment: dict[str, str], *settings: str) -> str:
    """The part of doctor that asks the cluster, as a process of its own: Ray reads a token once."""
    command = [sys.executable, "-c", ASK, *settings]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=True, env=environment)
    return done.stdout


@pytest.mark.slow
def test_a_cluster_in_good_and_bad_states(tmp_path: Path) -> None:
    with ray_head(cpus=2) as head:
        command = [*MAIN, "doctor", "--out", str(tmp_path)]
        well = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False, env=head.environment)
        assert well.returncode == 0, well.stdout + well.stderr
        assert "the same on both sides: python" in well.stdout
        assert "the cluster of 1 node has 2 CPUs for 1.5" in well.stdout
        assert "agrees with the cluster's" in well.stdout
        assert not list(tmp_path.iterdir()), "doctor leaves nothing behind"
        broken = asked(head.environment, "cluster.python=no-such-python")
        assert "cluster | False | ray | the probe mpc-doctor-" in broken
        assert "no-such-python" in broken
        stranger = head.environment | {"RAY_AUTH_TOKEN": "another-token-0123456789"}
        found = asked(stranger)
        assert found.startswith("cluster | False | ray | http://127.0.0.1")
        assert "refuses the token" in found
    assert "does not answer" in asked(stranger)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["cluster.kind=slurm"], "sinfo: is not installed here"),
        (
            ["cluster.kind=kuberay", "cluster.image=registry.example.com/mpc-cxr:0.1.0"],
            "kubectl: is not installed here",
        ),
    ],
)
def test_a_cluster_whose_tool_is_missing(
    settings: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    found = by_name(examine(load(None, settings), None, str(tmp_path)))["cluster"]
    assert not found.ok
    assert message in found.remedy
