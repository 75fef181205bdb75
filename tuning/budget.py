"""The hours of a search, over all its sessions."""

import json
import time
from typing import Any

from ray.tune import Stopper

from pipeline import storage
from tuning.keeping import surviving

NOTE_S = 30.0
"""Seconds between two notes; a killed session forgets no more."""
FILE = "hours.json"


class Hours(Stopper):  # type: ignore[misc]
    """Ends a search when its hours are spent; what earlier sessions took counts too.

    Args:
        limit: hours; None only counts.
        out: folder of the search, where they are noted.
    """

    def __init__(self, limit: float | None, out: str) -> None:
        self.limit, self.uri = limit, storage.join(out, FILE)
        self._began: float | None = None
        self._before = 0.0
        self._noted = 0.0

    def __getstate__(self) -> dict[str, Any]:
        """Tune pickles the stopper once; another session reads what this one noted."""
        return {**self.__dict__, "_began": None}

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """No single trial has hours of its own."""
        return False

    def stop_all(self) -> bool:
        """Whether the hours are spent."""
        now = time.monotonic()
        if self._began is None:
            self._began, self._before, self._noted = now, spent(self.uri), now
        hours = self._before + (now - self._began) / 3600
        over = self.limit is not None and hours >= self.limit
        if over or now - self._noted >= NOTE_S:
            self._noted = now
            with surviving("hours of the search"):
                storage.write_bytes(self.uri, json.dumps({"hours": hours}).encode())
        return over


def spent(uri: str) -> float:
    """Hours that earlier sessions noted."""
    return float(json.loads(storage.read_bytes(uri))["hours"]) if storage.exists(uri) else 0.0
