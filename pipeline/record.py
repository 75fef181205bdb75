"""What identifies a run, and its records: metrics.jsonl, one JSON object an epoch, and faults.jsonl, one a fault."""

import json
from collections.abc import Collection
from typing import Any

from mpc.errors import MissingError, UserError
from pipeline import storage
from pipeline.dotted import flat

RUN_FILE, METRICS_FILE, FAULTS_FILE = "run.json", "metrics.jsonl", "faults.jsonl"


def is_epoch(metrics: dict[str, Any]) -> bool:
    """Whether these metrics end an epoch; checkpoints inside one carry their position alone."""
    return "val_findings_averaged" in metrics


class MetricsLog:
    """The epochs of a run under `out`; an epoch that is trained again after a fault replaces its line.

    Args:
        out: folder or s3:// prefix of the run.
    """

    def __init__(self, out: str) -> None:
        self.uri = storage.join(out, METRICS_FILE)

    def read(self) -> list[dict[str, Any]]:
        """Every epoch so far, in order; empty before the first."""
        return read_lines(self.uri)

    def add(self, metrics: dict[str, Any]) -> None:
        """Adds an epoch; the file is replaced as a whole, so that no reader sees half a line."""
        write_lines(self.uri, [line for line in self.read() if line["epoch"] < metrics["epoch"]] + [metrics])

    def add_missing(self, metrics: dict[str, Any]) -> None:
        """Adds the epoch of a checkpoint if a kill between storing it and writing its line has kept that line away."""
        if all(line["epoch"] != metrics["epoch"] for line in self.read()):
            self.add(metrics)


def read_lines(uri: str) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines; none where there is no file."""
    try:
        lines = storage.read_bytes(uri).decode().splitlines()
    except MissingError:
        return []
    return [json.loads(line) for line in lines]


def write_lines(uri: str, lines: list[dict[str, Any]]) -> None:
    """Writes a file of JSON lines as a whole."""
    storage.write_bytes(uri, "".join(json.dumps(line) + "\n" for line in lines).encode())


def claim(out: str, identity: dict[str, Any], *, resume: bool, free: Collection[str] = ()) -> None:
    """Makes `out` the place of this run or search, or checks that it already is: run.json holds what may not change.

    Args:
        out: folder or s3:// prefix.
        identity: `data_digest` and whatever else makes the run what it is, nested.
        resume: continue what lies there.
        free: dotted settings that may differ, because they change how it runs and not what it learns.

    Raises:
        UserError: something ran there and `resume` is off, or what ran there was something else.
    """
    place = storage.join(out, RUN_FILE)
    if not storage.exists(place):
        storage.write_bytes(place, json.dumps(identity, indent=2).encode())
        return
    if not resume:
        raise UserError(f"--out {out} holds a run; continue it with --resume, or choose another folder")
    begun, plain = json.loads(storage.read_bytes(place)), json.loads(json.dumps(identity))
    if begun.get("data_digest") != identity["data_digest"]:
        raise UserError(f"--out {out} was begun on another data set; give the same --data, or another --out")
    before, now = ({k.removeprefix("config."): v for k, v in flat(whole).items()} for whole in (begun, plain))
    changed = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key) and key not in free)
    if changed:
        raise UserError(
            f"--out {out} was begun with {changed[0]} = {before.get(changed[0])}, not {now.get(changed[0])}; "
            f"give the same settings, or another --out"
        )
