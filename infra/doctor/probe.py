"""What runs on a cluster for `doctor`: one line that says which software, which clock, which resources are there."""

import json
import time

from pipeline import runtime
from pipeline.versions import versions

MARK = "mpc-cxr-probe "


def report() -> dict[str, object]:
    """Versions, seconds since 1970, and what each node has by Ray's names, as seen from inside a job."""
    import ray

    runtime.start()
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return {"versions": versions(), "time": time.time(), "nodes": nodes}


if __name__ == "__main__":
    print(f"{MARK}{json.dumps(report())}")
