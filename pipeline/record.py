"""What identifies a run, and metrics.jsonl, its record: one JSON object an epoch."""

import json
from typing import Any

from mpc.errors import MissingError, UserError
from pipeline import storage
from pipeline.dotted import flat

RUN_FILE, METRICS_FILE = "run.json", "metrics.jsonl"


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


def claim(out: str, identity: dict[str, Any], *, resume: bool) -> None:
    """Makes `out` the place of this run or search, or checks that it already is: run.json holds what may not change.

    Raises:
        UserError: something ran there and `resume` is off, or what ran there was something else.
    """
    place = storage.join(out, RUN_FILE)
    if not storage.exists(place):
        storage.write_bytes(place, json.dumps(identity, indent=2).encode())
        return
    if not resume:
        raise UserError(f"--out {out} holds a run; continue it with --resume, or choose another folder")
    begun = json.loads(storage.read_bytes(place))
    if begun.get("data_digest") != identity["data_digest"]:
        raise UserError(f"--out {out} was begun on another data set; give the same --data, or another --out")
    before, now = flat(begun), flat(json.loads(json.dumps(identity)))
    changed = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
    if changed:
        name = changed[0].removeprefix("config.")
        raise UserError(
            f"--out {out} was begun with {name} = {before.get(changed[0])}, not {now.get(changed[0])}; "
            f"give the same settings, or another --out"
        )
