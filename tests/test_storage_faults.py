"""storage on a network that fails: throttled, dropped and cut requests on the way to a real S3 server."""

import os
import pickle
import subprocess
import sys
from collections.abc import Iterator

import pytest
from conftest import ACCESS_KEY, SECRET_KEY
from proxy import Proxy, drop, throttle

from mpc.errors import UserError
from pipeline import storage

PART = 10 * 2**20  # pyarrow's; more than one makes an upload of several parts


@pytest.fixture
def proxy(s3_server: str) -> Iterator[Proxy]:
    made = Proxy(s3_server)
    yield made
    made.close()


@pytest.fixture
def folder(bucket: str, proxy: Proxy) -> str:
    """A folder behind the proxy that holds `small` and `large`, and a client with an open connection."""
    made = f"{bucket}/data?endpoint_override={proxy.endpoint}"
    storage.write_bytes(storage.join(made, "small"), b"content")
    storage.write_bytes(storage.join(made, "large"), LARGE)
    return made


LARGE = bytes(range(256)) * (PART // 256 * 2 + 100)
OPERATIONS = {
    "read": lambda folder: storage.read_bytes(storage.join(folder, "small")) == b"content",
    "read large": lambda folder: storage.read_bytes(storage.join(folder, "large")) == LARGE,
    "write": lambda folder: storage.write_bytes(storage.join(folder, "new"), b"1") is None,
    "write in parts": lambda folder: storage.write_bytes(storage.join(folder, "new"), LARGE) is None,
    "list": lambda folder: len(storage.list_files(folder)) == 2,
    "exists": lambda folder: storage.exists(storage.join(folder, "small")),
    "size": lambda folder: storage.size(storage.join(folder, "large")) == len(LARGE),
    "delete": lambda folder: storage.delete(storage.join(folder, "small")) is None,
}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_throttling_and_dropped_connections_are_retried(operation, folder, proxy):
    proxy.fail(throttle, drop)
    assert OPERATIONS[operation](folder)
    assert len(proxy.met) == 2


def test_parts_of_an_upload_are_sent_again(folder, proxy):
    uri = storage.join(folder, "new")
    with storage.open_output(uri) as stream:
        stream.write(LARGE[: PART + 1])
        proxy.fail(drop, throttle)
        stream.write(LARGE[PART + 1 :])
    assert len(proxy.met) == 2
    assert storage.read_bytes(uri) == LARGE


def test_an_answer_that_is_cut_short_is_asked_for_again(folder, proxy):
    proxy.fail(cut=200_000)
    assert storage.read_bytes(storage.join(folder, "large")) == LARGE
    assert len(proxy.met) == 1


def test_tries_end_where_the_clients_own_setting_says_and_have_pauses(folder, proxy, monkeypatch):
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "3")
    proxy.fail(*[throttle] * 20)
    with pytest.raises(UserError, match="small") as caught:
        storage.read_bytes(storage.join(folder, "small"))
    assert "\n" not in str(caught.value)
    assert len(proxy.met) == 3
    assert proxy.met[-1] - proxy.met[0] > 0.05  # at random below 1 s, then below 2 s


def test_a_client_that_ray_sends_to_a_worker_tries_as_often(folder, proxy, monkeypatch):
    """A client's own pickle forgets its retries: a worker gave up after two seconds where the driver waits a minute."""
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "2")
    filesystem, path = storage.resolve(folder)
    sent = pickle.loads(pickle.dumps(filesystem))
    assert (sent == filesystem, sent is filesystem) == (True, False)
    proxy.fail(*[throttle] * 20)
    with pytest.raises(OSError, match="503"):
        sent.get_file_info(f"{path}/small")
    assert len(proxy.met) == 2


READ = "import sys; from pipeline import storage; sys.stdout.write(storage.read_bytes(sys.argv[1]).decode())"


@pytest.mark.parametrize("chain", ["file", "profile", "nothing"])
def test_credentials_come_from_the_standard_chain(chain, bucket, tmp_path):
    storage.write_bytes(f"{bucket}/key", b"content")
    section = "default" if chain == "file" else "hospital"
    file = tmp_path / "credentials"
    file.write_text(f"[{section}]\naws_access_key_id = {ACCESS_KEY}\naws_secret_access_key = {SECRET_KEY}\n")
    hidden = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    environment["AWS_SHARED_CREDENTIALS_FILE"] = os.devnull if chain == "nothing" else str(file)
    if chain == "profile":
        environment["AWS_PROFILE"] = section
    command = [sys.executable, "-c", READ, f"{bucket}/key"]
    process = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert (process.stdout == "content") == (chain != "nothing"), process.stderr[-500:]
    assert ("DeniedError" in process.stderr) == (chain == "nothing")
