"""What runs on a cluster for `doctor`: one line that says which software, which clock, which resources are there."""

import json
import time

from pipeline import runtime
from pipeline.versions import versions

MARK = "mpc-cxr-probe "


def report() -> dict[str, object]:
    """Versions, seconds since 1970, and what Ray has, as seen from inside a job."""
    import ray

    runtime.start()
    nodes = sum(bool(node["Alive"]) for node in ray.nodes())
    return {"versions": versions(), "time": time.time(), "nodes": nodes, "resources": ray.cluster_resources()}


if __name__ == "__main__":
    print(f"{MARK}{json.dumps(report())}")
