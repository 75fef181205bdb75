"""The driver's wish that a run should end: a key in Ray's own store, because an actor would be one more process."""

from dataclasses import dataclass, field
from uuid import uuid4

from ray.experimental import internal_kv as kv


@dataclass(frozen=True)
class Wish:
    """A flag that one process of the cluster raises and all others can see; it travels by its name."""

    name: str = field(default_factory=lambda: f"mpc-cxr-wish-{uuid4().hex}")

    def make(self) -> None:
        """Raises the flag."""
        kv._internal_kv_put(self.name, "1")

    def made(self) -> bool:
        """Whether the flag is up."""
        return bool(kv._internal_kv_exists(self.name))

    def drop(self) -> None:
        """Leaves nothing in the store."""
        kv._internal_kv_del(self.name)
