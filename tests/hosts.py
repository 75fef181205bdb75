"""Several machines on this one: each with a network, processes, a name and a disk of its own where that is allowed."""

import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil
from clusters import end

NETWORK = "10.231.77"
INSIDE = """
read ready && hostname "$1" && mount -t tmpfs none "$3" && ip link set lo up && ip address add "$2/24" dev eth0 &&
ip link set eth0 up && shift 3 && exec "$@"
"""
"""What a host does first, once its network has arrived and `ready` is said on its standard input.

It has no route to anywhere else, so that a question to a name server fails at once.
"""


class Host:
    """A machine that runs one command.

    Args:
        address: its own.
        process: of the command, or of `unshare` around it.
        separate: whether it has namespaces of its own.
    """

    def __init__(self, address: str, process: "subprocess.Popen[str]", separate: bool) -> None:
        self.address, self.process, self.separate = address, process, separate

    def kill(self) -> None:
        """SIGKILL for every process of it at once, as when its power fails; with namespaces its network goes too."""
        if self.process.poll() is None:
            if self.separate:
                self.process.kill()  # the host's first process ends with it, and with that one all others
            else:
                end(self.process.pid)
        self.process.wait()
        if self.process.stdin is not None:
            self.process.stdin.close()


class Machines:
    """A network of hosts that this process is part of.

    Args:
        bridge: device that joins the hosts; empty where they are plain processes on loopback addresses.
        kind: what they are, for people.
    """

    def __init__(self, bridge: str, kind: str) -> None:
        self.bridge, self.kind = bridge, kind
        self.hosts: list[Host] = []

    @property
    def address(self) -> str:
        """Where the hosts find this process."""
        return f"{NETWORK}.1" if self.bridge else "127.0.0.1"

    def next_address(self) -> str:
        """Of the host that starts next."""
        return f"{NETWORK if self.bridge else '127.0.0'}.{len(self.hosts) + 2}"

    def start(self, command: Sequence[str], environment: Mapping[str, str], log: Path, disk: Path) -> Host:
        """Starts the next host with one command.

        Args:
            command: what it runs.
            environment: of the command.
            log: takes what it prints.
            disk: folder that is empty and private in a host with namespaces.
        """
        address, name = self.next_address(), f"host-{len(self.hosts) + 2}"
        if self.bridge:
            own = ["unshare", "--net", "--uts", "--pid", "--fork", "--kill-child=KILL", "--mount-proc"]
            command = [*own, "sh", "-c", INSIDE, "sh", name, address, str(disk), *command]
        with log.open("w") as out:
            process = subprocess.Popen(
                command, env=dict(environment), stdin=subprocess.PIPE, stdout=out, stderr=out, text=True
            )
        self.hosts.append(Host(address, process, bool(self.bridge)))
        if self.bridge:
            self._connect(process, f"{self.bridge}-{len(self.hosts)}")
        return self.hosts[-1]

    def _connect(self, process: "subprocess.Popen[str]", device: str) -> None:
        """Plugs a cable into the host's namespace and the bridge, and lets the host go on."""
        (first,) = _children(process)
        _ip("link", "add", device, "type", "veth", "peer", "name", "eth0", "netns", str(first.pid))
        _ip("link", "set", device, "master", self.bridge, "up")
        assert process.stdin is not None
        process.stdin.write("ready\n")
        process.stdin.flush()


@contextmanager
def machines() -> Iterator[Machines]:
    """Hosts in namespaces where this process may make some, else plain processes; all end with the block."""
    bridge = f"mpc{os.getpid()}"
    missing = _refusal(bridge)
    kind = f"plain processes, {missing}" if missing else "hosts with their own network, processes, name and disk"
    found = Machines("" if missing else bridge, kind)
    try:
        yield found
    finally:
        for host in found.hosts:
            host.kill()
        if found.bridge:
            _ip("link", "delete", bridge)


def _refusal(bridge: str) -> str:
    """Makes the bridge, or says why that is not possible here."""
    lacking = [tool for tool in ("ip", "unshare") if shutil.which(tool) is None]
    if lacking:
        return f"{lacking[0]} is not installed"
    try:
        subprocess.run(["unshare", "--net", "--uts", "--pid", "--fork", "--mount-proc", "true"], check=True)
        _ip("link", "add", bridge, "type", "bridge")
    except subprocess.CalledProcessError:
        return "namespaces are not allowed"
    try:
        _ip("address", "add", f"{NETWORK}.1/24", "dev", bridge)
        _ip("link", "set", bridge, "up")
    except subprocess.CalledProcessError:
        _ip("link", "delete", bridge)
        return "a bridge is not allowed"
    return ""


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


def _children(process: "subprocess.Popen[str]") -> list[psutil.Process]:
    """What `unshare` has started, once it has."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        with contextlib.suppress(psutil.NoSuchProcess):
            if found := psutil.Process(process.pid).children():
                return found
        time.sleep(0.02)
    raise AssertionError("a host did not start")
