"""storage on a network that fails: throttled, dropped and cut requests on the way to a real S3 server."""

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import pytest
from conftest import ACCESS_KEY, SECRET_KEY

from mpc.errors import UserError
from pipeline import storage

PART = 10 * 2**20  # pyarrow's; more than one makes an upload of several parts
Fault = Callable[[socket.socket], None]


def throttle(client: socket.socket) -> None:
    client.sendall(b"HTTP/1.1 503 Slow Down\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")


def drop(client: socket.socket) -> None:
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # a reset, no orderly end


class Proxy:
    """Forwards TCP connections to the S3 server; new ones meet the next of `faults` while any are left."""

    def __init__(self, target: str) -> None:
        self.faults: list[Fault] = []
        self.met: list[float] = []
        self.cut: int | None = None  # bytes of the next answer after which its connection is dropped
        host, _, port = target.removeprefix("http://").partition(":")
        self._target, self._lock = (host, int(port)), threading.Lock()
        self._open: set[socket.socket] = set()
        self._server = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"http://127.0.0.1:{self._server.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def fail(self, *faults: Fault, cut: int | None = None) -> None:
        """What the next requests meet; connections that the client has kept open are dropped."""
        with self._lock:
            self.faults, self.met, self.cut = list(faults), [], cut
            for client in self._open:
                client.shutdown(socket.SHUT_RDWR)
            self._open.clear()

    def close(self) -> None:
        self._server.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._server.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client:
            try:
                head = client.recv(65536)
            except OSError:
                return
            if not head:  # the probe, which sends nothing
                return
            with self._lock:
                fault = self.faults.pop(0) if self.faults else None
                if fault is None:
                    self._open.add(client)
                else:
                    self.met.append(time.monotonic())
            if fault is not None:
                fault(client)
                return
            self._forward(client, head)

    def _forward(self, client: socket.socket, head: bytes) -> None:
        with socket.create_connection(self._target) as server:
            server.sendall(head)
            threading.Thread(target=self._pipe, args=(client, server), daemon=True).start()
            self._pipe(server, client, answers=True)
        with self._lock:
            self._open.discard(client)

    def _pipe(self, source: socket.socket, sink: socket.socket, answers: bool = False) -> None:
        passed = 0
        try:
            while chunk := source.recv(65536):
                if answers and self.cut is not None and passed + len(chunk) > self.cut:
                    self.cut, self.met = None, [*self.met, time.monotonic()]
                    drop(sink)
                    sink.shutdown(socket.SHUT_RDWR)
                    return
                sink.sendall(chunk)
                passed += len(chunk)
            sink.shutdown(socket.SHUT_WR)
        except OSError:
            return


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
