"""A proxy in front of the real S3 server that fails as networks do: throttled, dropped, cut and held requests."""

import socket
import threading
import time
from collections.abc import Callable

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
        self.mark: bytes | None = None  # requests that carry it wait for `release`
        self.held, self.release = threading.Event(), threading.Event()
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

    def _wait(self, sent: bytes) -> None:
        if self.mark is not None and self.mark in sent:
            self.held.set()
            self.release.wait()

    def _forward(self, client: socket.socket, head: bytes) -> None:
        self._wait(head)
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
                if not answers:
                    self._wait(chunk)
                sink.sendall(chunk)
                passed += len(chunk)
            sink.shutdown(socket.SHUT_WR)
        except OSError:
            return
