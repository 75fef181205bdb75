"""Synthetic radiographs per second on one core, labels included: `python benchmarks/phantom.py [--images 400]`."""

import argparse
import os
import time

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

from pipeline.sources import phantom

SIZES = {64: 1.0, 128: 1.0, 224: 0.4, 512: 0.1, 1024: 0.03}  # side in px -> share of the images that is drawn


def main() -> None:
    """Prints images per second of wall time and of CPU time for each size."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=400)
    images = parser.parse_args().images
    print(f"phantom version {phantom.PHANTOM_VERSION}, parameters {phantom.digest()[:12]}, profile dense")
    print("side px   images/s   images per CPU second")
    for size, share in SIZES.items():
        count = max(3, round(images * share))
        phantom.render(0, 0, "dense", size)  # warms up
        wall, cpu = time.perf_counter(), time.process_time()
        for index in range(count):
            phantom.labels(0, index, "dense")
            phantom.render(0, index, "dense", size)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        print(f"{size:7d}{count / wall:11.1f}{count / cpu:24.1f}")


if __name__ == "__main__":
    main()
