"""Where the page is served, and what a request may cost."""

from ipaddress import ip_address
from typing import Annotated

from pydantic import Field, model_validator

from mpc.config import Config, Positive

LOOPBACK = ("localhost", "127.0.0.1")


class ServeConfig(Config):
    """A server without accounts: on this machine, or behind a proxy that has them."""

    host: str = "127.0.0.1"
    """Address to listen on; one that other machines reach needs `allowed_hosts` too."""
    port: Annotated[int, Field(ge=1, le=65535)] = 8000
    allowed_hosts: tuple[str, ...] = LOOPBACK
    """Names in a request's Host header that are answered: a page elsewhere cannot reach the server under its own."""
    max_mib: Annotated[float, Field(gt=0.0, le=1024.0)] = 64.0
    """Largest file in MiB."""
    timeout_s: Positive = 30.0
    """Seconds for a file to arrive, and again for its answer."""
    max_requests: Annotated[int, Field(ge=2)] = 32
    """Connections at a time; more are answered with 503 at once."""

    @model_validator(mode="after")
    def proxied(self) -> "ServeConfig":
        """An address that others reach must be meant."""
        if not _is_loopback(self.host) and self.allowed_hosts == LOOPBACK:
            raise ValueError(
                f"host {self.host} is reached from other machines and the page asks nobody who they are; put a proxy "
                f"with TLS and a log-in in front and name it in serve.allowed_hosts, or keep 127.0.0.1"
            )
        return self


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
