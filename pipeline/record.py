"""metrics.jsonl: the record of a run, one JSON object an epoch; nothing else is needed to replay it."""

import json
from typing import Any

from mpc.errors import MissingError
from pipeline import storage

METRICS_FILE = "metrics.jsonl"


class MetricsLog:
    """The epochs of a run under `out`; an epoch that is trained again after a fault replaces its line.

    Args:
        out: folder or s3:// prefix of the run.
    """

    def __init__(self, out: str) -> None:
        self.uri = storage.join(out, METRICS_FILE)

    def read(self) -> list[dict[str, Any]]:
        """Every epoch so far, in order; empty before the first."""
        try:
            lines = storage.read_bytes(self.uri).decode().splitlines()
        except MissingError:
            return []
        return [json.loads(line) for line in lines]

    def add(self, metrics: dict[str, Any]) -> None:
        """Adds an epoch; the file is replaced as a whole, so that no reader sees half a line."""
        epochs = [line for line in self.read() if line["epoch"] < metrics["epoch"]] + [metrics]
        storage.write_bytes(self.uri, "".join(json.dumps(line) + "\n" for line in epochs).encode())
