"""Where a checkpoint comes from: the run that wrote it and the search that chose it, by their records on disk."""

import json
from pathlib import Path
from typing import NamedTuple

from mlflow.tracking import MlflowClient

from pipeline import storage
from tuning.listeners import read_record
from tuning.record import RunRecord
from tuning.tracking import find_run

SEARCH_FILE, TRIALS = "search.json", "trials"


class Lineage(NamedTuple):
    """The records behind a checkpoint; None where there are none."""

    run: RunRecord | None = None
    search: RunRecord | None = None

    def tags(self, client: MlflowClient) -> dict[str, str]:
        """Names, stable keys and, where the server has the runs, ids; `lineage.run_id` is the run that trained."""
        found: dict[str, str] = {}
        for what, record in (("run", self.run), ("search", self.search)):
            if record is None:
                continue
            found |= {f"lineage.{what}": record.name, f"lineage.{what}_key": record.key}
            experiment = client.get_experiment_by_name(record.experiment)
            run_id = find_run(client, str(experiment.experiment_id), record.key) if experiment else None
            if run_id is not None:
                found[f"lineage.{what}_id"] = run_id
        return found


def lineage_of(checkpoint: str) -> Lineage:
    """Looks beside a checkpoint such as OUT/best: OUT is a run, a search, or a trial of one.

    Args:
        checkpoint: path or URI; what it names need not be a folder of ours.
    """
    out = _parent(checkpoint)
    record, search = read_record(out), storage.join(out, SEARCH_FILE)
    if storage.exists(search):
        best = json.loads(storage.read_bytes(search))["best"]
        return Lineage(read_record(storage.join(out, TRIALS, best)), record)
    if record is None or record.parent is None:
        return Lineage(record)
    return Lineage(record, read_record(_parent(_parent(out))))


def _parent(uri: str) -> str:
    """The folder that holds what `uri` names."""
    if not storage.is_remote(uri):
        return str(Path(storage.absolute(uri)).parent)
    path, mark, options = uri.partition("?")
    return path.rstrip("/").rpartition("/")[0] + mark + options
