"""What strangers may hand us and what they get: files that would run, leave their place, or fill the memory; secrets.

docs/security.md names, for each promise, the test that keeps it.
"""

import io
import logging
import os
import pickle
import re
import shutil
import subprocess
import sys
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pydicom
import pytest
import ray
import yaml
from conftest import SECRET_KEY
from factory import FINDINGS, tiny_checkpoint
from mlflow.tracking import MlflowClient
from pictures import dicom, encoded
from pydantic import ValidationError
from test_table_source import NAMES, WIDE, collection

from infra.cli.app import run
from infra.cluster import ClusterConfig
from infra.kuberay.network import ray_policy
from infra.submit.ray_jobs import RayJobs
from mpc.config import ViewsConfig
from mpc.errors import UserError
from pipeline import identity, storage
from pipeline.card import QUARANTINE_FILE, DatasetCard, read_card
from pipeline.check import check
from pipeline.decode import DecodeError, decode
from pipeline.dicom import UNPACKED
from pipeline.headers import header_task
from pipeline.images import find_images
from pipeline.inference import load_model
from pipeline.plain_types import refuse_extension_types
from pipeline.plan import make_plan
from pipeline.predictions import read_table
from pipeline.spans import SpanReader, TrainingData
from pipeline.stream import scan
from tuning.registry import download, register

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
STARTERS = (".py", ".yaml", ".sh", ".j2")


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.canary}",)


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    """A file that appears when a payload runs."""
    return tmp_path / "owned"


def pickles(canary: Path, count: int) -> pa.Array:
    """A column of Ray Data's own type for objects: its values are pickles."""
    from ray.data.extensions import ArrowPythonObjectArray

    return ArrowPythonObjectArray.from_objects([Payload(canary)] * count)


def nested(column: pa.Array) -> pa.Array:
    """The same one level deeper."""
    return pa.ListArray.from_arrays(pa.array(range(len(column) + 1), pa.int32()), column)


MARKED = pa.field("x", pa.binary(), metadata={"ARROW:extension:name": "unknown.to.this.process"})


@pytest.mark.parametrize(
    "field",
    [
        MARKED,
        pa.field("x", pa.list_(MARKED)),
        pa.field("x", pa.struct([pa.field("inner", pa.large_list(MARKED))])),
        pa.field("x", pa.map_(pa.string(), MARKED)),
    ],
    ids=["plain", "list", "struct of list", "map"],
)
def test_a_type_is_refused_however_deep_it_lies(field: pa.Field) -> None:
    plain = pa.schema([pa.field("image", pa.binary()), pa.field("labels", pa.list_(pa.int8(), 3))])
    refuse_extension_types(plain, "shard")
    with pytest.raises(UserError, match="shard: column x has extension type"):
        refuse_extension_types(plain.append(field), "shard")


@pytest.mark.parametrize("wrap", [lambda column: column, nested], ids=["plain", "nested"])
@pytest.mark.parametrize("name", ["uri", "source"])
def test_a_table_of_images_is_not_unpickled(tmp_path: Path, canary: Path, wrap: Callable, name: str) -> None:
    path = tmp_path / "images.parquet"
    pq.write_table(pa.table({name: wrap(pickles(canary, 1))}), path)
    for read in (find_images, read_table):
        with pytest.raises(UserError, match=f"column {name} has extension type"):
            read(str(path))
    assert not canary.exists()
    pq.read_table(path)[name].to_pylist()
    assert canary.exists(), "the payload is live"


def test_a_shard_is_not_unpickled(phantom_data: str, tmp_path: Path, canary: Path) -> None:
    card = read_card(phantom_data)
    folder = hostile_copy(phantom_data, card, tmp_path / "data", canary)
    plan = make_plan(card, seed=0, batch_size=32)
    reader = SpanReader(TrainingData(str(folder), card, ViewsConfig()), plan, 0, 1)
    (span,) = plan.spans(0, 1, 32)
    for read in (lambda: list(reader(span)), lambda: list(scan(str(folder), card, "train"))):
        with pytest.raises(UserError, match="column image_id has extension type"):
            read()
    pq.write_table(pa.table({"reason": pickles(canary, 1)}), folder / QUARANTINE_FILE)
    faults = check(str(folder))
    assert any(fault.startswith(f"{QUARANTINE_FILE}: column reason has extension type") for fault in faults), faults
    assert any("the card says" in fault or "SHA-256 differs" in fault for fault in faults)
    assert not canary.exists()


def hostile_copy(data: str, card: DatasetCard, folder: Path, canary: Path) -> Path:
    """A data set whose first training shard holds pickles where the ids of its images were."""
    shutil.copytree(data, folder)
    shard = folder / card.shards_of("train")[0].path
    table = pq.read_table(shard)
    position = table.column_names.index("image_id")
    hostile = table.set_column(position, "image_id", pickles(canary, len(table)))
    pq.write_table(hostile, shard, row_group_size=card.shards_of("train")[0].row_groups[0])
    return folder


def test_a_registered_model_runs_no_code_of_its_own(
    tmp_path: Path, canary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    store = f"sqlite:///{tmp_path / 'mlflow.db'}"
    tiny_checkpoint(tmp_path / "best")
    version = register(tmp_path / "best", "cxr", store)
    place = Path(MlflowClient(tracking_uri=store).get_model_version_download_uri("cxr", version.version))
    evil = f"import os; os.system('touch {canary}')\n"
    (place / "served_model.py").write_text(evil)
    (place / "code" / "sitecustomize.py").write_text(evil)
    (place / "python_model.pkl").write_bytes(pickle.dumps(Payload(canary)))
    model = yaml.safe_load((place / "MLmodel").read_text())
    model["flavors"]["python_function"] |= {"python_model": "python_model.pkl", "loader_module": "sitecustomize"}
    (place / "MLmodel").write_text(yaml.safe_dump(model))
    folder = download(version.uri, store)
    assert load_model(folder).info.findings == FINDINGS
    assert {file.suffix for file in folder.rglob("*") if file.is_file()} == {".safetensors", ".json", ".txt"}
    (place / "artifacts" / "model.safetensors").write_bytes(pickle.dumps(Payload(canary)))
    with pytest.raises(UserError, match="not a safetensors file"):
        load_model(download(version.uri, store))
    assert not canary.exists()


def test_a_checkpoint_of_pickles_ends_in_one_line(
    tmp_path: Path, canary: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    tiny_checkpoint(tmp_path / "best")
    for file in (tmp_path / "best").iterdir():
        if file.suffix != ".json":
            file.write_bytes(pickle.dumps(Payload(canary)))
    (tmp_path / "0.png").write_bytes(encoded(np.arange(64, dtype=np.uint8).reshape(8, 8)))
    line = ["predict", "--checkpoint", str(tmp_path / "best"), "--images", str(tmp_path), "--out", str(tmp_path / "o")]
    assert run(line) == 2
    assert len(capfd.readouterr().err.splitlines()) == 1
    assert not canary.exists()


@pytest.mark.parametrize("path", ["../secret.png", "a/../../secret.png", "./../secret.png"])
def test_a_table_names_no_image_outside_its_folder(tmp_path: Path, path: str) -> None:
    (tmp_path / "secret.png").write_bytes(encoded(np.arange(64, dtype=np.uint8).reshape(8, 8)))
    (tmp_path / "sent").mkdir()
    (tmp_path / "sent" / "images.csv").write_text(f"uri\n{path}\n")
    with pytest.raises(UserError, match="leaves the table's folder"):
        find_images(str(tmp_path / "sent" / "images.csv"))
    (tmp_path / "sent" / "images.csv").write_text("uri\ns3://bucket/x.png?endpoint_override=http://elsewhere\n")
    with pytest.raises(UserError, match="names a server of its own"):
        find_images(str(tmp_path / "sent" / "images.csv"))
    (tmp_path / "sent" / "images.csv").write_text("uri\na/../b.png\ns3://bucket/x.png\n")
    assert len(find_images(str(tmp_path / "sent" / "images.csv"))) == 2


def deflated_bomb() -> bytes:
    """A DICOM file of a few hundred KiB that unpacks to more than the largest image."""
    buffer = io.BytesIO()
    dataset = pydicom.dcmread(io.BytesIO(dicom(np.arange(64, dtype=np.uint8).reshape(8, 8))))
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.DeflatedExplicitVRLittleEndian
    dataset.save_as(buffer, enforce_file_format=True)
    whole = buffer.getvalue()
    start = 144 + int.from_bytes(whole[140:144], "little")  # behind the group whose length the first element tells
    packer, zeros = zlib.compressobj(1, wbits=-zlib.MAX_WBITS), bytes(2**20)
    element = b"\x09\x00\x10\x00OB\0\0" + (UNPACKED + 2**20).to_bytes(4, "little")
    parts = [packer.compress(element), *(packer.compress(zeros) for _ in range(UNPACKED // 2**20 + 1)), packer.flush()]
    return whole[:start] + b"".join(parts)


def test_a_bomb_does_not_fill_the_memory(tmp_path: Path) -> None:
    bomb = deflated_bomb()
    assert len(bomb) < UNPACKED / 100
    (tmp_path / "bomb.dcm").write_bytes(bomb)
    tracemalloc.start()
    try:
        with pytest.raises(DecodeError, match="too_large"):
            decode(bomb, "bomb.dcm", 32, "pad")
        rows = header_task({"uris": f'["{tmp_path}/bomb.dcm"]', "keywords": '["PatientID"]', "start": 0})["rows"]
        assert tracemalloc.get_traced_memory()[1] < 64 * 2**20
    finally:
        tracemalloc.stop()
    assert pa.ipc.open_stream(rows).read_all()["reason"].to_pylist() == ["too_large"]


def test_a_deflated_picture_is_read() -> None:
    dataset = pydicom.dcmread(io.BytesIO(dicom(np.arange(64, dtype=np.uint8).reshape(8, 8))))
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.DeflatedExplicitVRLittleEndian
    buffer = io.BytesIO()
    dataset.save_as(buffer, enforce_file_format=True)
    np.testing.assert_array_equal(decode(buffer.getvalue(), "x", 8, "pad"), np.arange(64).reshape(8, 8))


SPLITS = ("train", "val", "test")
ROWS = [
    (f"{i}.png", f"IMG-{i}", f"ST-{i}", f"PAT-{i}", "PA", SPLITS[i // 8], "F", "60", str(i % 2), "1", "")
    for i in range(24)
]


@pytest.mark.slow
def test_no_secret_leaves_the_environment(
    ray_session: None,
    bucket: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    key, password = "an-id-key-that-nobody-may-see", "a-password-that-nobody-may-see"
    monkeypatch.setenv(identity.VARIABLE, key)
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", password)
    caplog.set_level(logging.DEBUG)
    root = collection(tmp_path / "root", rows=ROWS)
    columns = {"file": "bilder.csv", **NAMES, "label_columns": WIDE, "split": "Gruppe"}
    small = {"model": {"backbone": "test_efficientnet_gn"}, "tracking": {"uri": f"sqlite:///{tmp_path}/mlflow.db"}}
    train = {"epochs": 1, "batch_size": 8, "worker_cpus": 0.5}
    prepare = {"table": columns, "image_size": 32, "row_group": 8}
    search = {"searcher": "random", "scheduler": "none", "max_trials": 1, "metric": "loss_sup", "mode": "min"}
    told = {**small, "train": train, "prepare": prepare, "search": search, "data": {"tasks": 1, "task_cpus": 0.25}}
    (tmp_path / "told.yaml").write_text(yaml.safe_dump(told))
    settings = ["--config", str(tmp_path / "told.yaml")]
    assert run(["prepare", "--source", "table", "--root", str(root), "--out", f"{bucket}/data", *settings]) == 0
    assert run(["train", "--data", f"{bucket}/data", "--out", f"{bucket}/run", *settings]) == 0
    (tmp_path / "space.yaml").write_text("optim.lr: {loguniform: [0.001, 0.01]}")
    tune = ["tune", "--data", f"{bucket}/data", "--out", f"{bucket}/search", "--space", str(tmp_path / "space.yaml")]
    assert run([*tune, *settings]) == 0
    logs = Path(ray._private.worker._global_node.get_logs_dir_path())
    files = [file for folder in (tmp_path, logs) for file in folder.rglob("*") if file.is_file()]
    places = {str(file): file.read_bytes() for file in files}
    places |= {uri: storage.read_bytes(uri) for uri in storage.list_files(bucket)}
    places |= {"screen": "".join(capfd.readouterr()).encode(), "log": caplog.text.encode()}
    assert b"IMG-3" not in b"".join(places[uri] for uri in places if uri.startswith("s3://")), "ids are hashed"
    assert any(uri.endswith("model.safetensors") for uri in places)
    assert b"loss.sup" in places[str(tmp_path / "mlflow.db")]
    secrets = [secret.encode() for secret in (key, password, SECRET_KEY)]
    assert not [place for place, content in places.items() for secret in secrets if secret in content]


STRANGER = """
import sys, ray
ray.init(address=sys.argv[1], logging_level="CRITICAL")
"""


def test_a_cluster_of_this_machine_takes_no_stranger(ray_session: None, tmp_path: Path) -> None:
    address = ray.get_runtime_context().gcs_address
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    done = subprocess.run(
        [sys.executable, "-c", STRANGER, address],
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
        env=environment | {"RAY_AUTH_MODE": "disabled", "HOME": str(tmp_path)},
    )
    assert done.returncode != 0
    assert "authentic" in done.stderr.lower(), done.stderr


@pytest.mark.parametrize("kind", ["kuberay", "aws", "slurm"])
def test_no_cluster_of_several_machines_goes_without_a_token(kind: str) -> None:
    told = {"kind": kind, "image": "r.example.com/x:1", "aws": {"security_group": "sg-0123456789abcdef0"}}
    assert ClusterConfig.model_validate(told).auth == "token"
    with pytest.raises(ValidationError, match="leave it at token"):
        ClusterConfig.model_validate({**told, "auth": "disabled"})


def test_no_address_elsewhere_goes_without_a_token() -> None:
    elsewhere = {"kind": "ray", "auth": "disabled", "ray": {"address": "http://10.0.0.1:8265"}}
    with pytest.raises(UserError, match=r"cluster\.auth=disabled is for this machine alone"):
        RayJobs(ClusterConfig.model_validate(elsewhere))


def test_every_head_that_we_start_shows_its_dashboard_to_itself() -> None:
    files = [*DOCS.glob("*.md"), *(file for file in (ROOT / "infra").rglob("*") if file.suffix in STARTERS)]
    lines = [(file.name, line) for file in files for line in file.read_text().splitlines()]
    starts = [(name, line) for name, line in lines if "--head" in line and "start" in line]
    assert starts
    for name, line in starts:  # of the compose file, the port itself is bound to loopback
        assert "--dashboard-host=127.0.0.1" in line or name == "compose.yaml", (name, line)


def test_on_kubernetes_a_pod_is_reached_by_its_own_kind() -> None:
    rules = ray_policy(ClusterConfig(), "job")["spec"]
    assert rules["podSelector"] == {"matchLabels": {"app.kubernetes.io/instance": "job"}}
    own, operator = rules["ingress"]
    assert own == {"from": [{"podSelector": rules["podSelector"]}]}
    assert list(operator["from"][0]) == ["namespaceSelector"]
    assert [port["port"] for port in operator["ports"]] == [8265, 6379]
    assert rules["policyTypes"] == ["Ingress", "Egress"]


def test_every_promise_has_its_test() -> None:
    named = re.findall(r"`tests/(test_\w+\.py)::(test_\w+)`", (DOCS / "security.md").read_text())
    assert len(named) > 20
    for file, test in named:
        assert f"def {test}(" in (ROOT / "tests" / file).read_text(), f"{file}::{test}"
