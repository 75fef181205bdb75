"""Peak memory of prepare, check and the stream, of few and of many images: `python benchmarks/memory.py`.

Synthetic images, an object store of 512 MiB. The stream yields an epoch of the larger set, and as many batches of the
smaller one: what Ray's store has touched stays with it, and is no growth with the data. Memory is the peak of the
process tree's proportional set size, Ray's own processes among it. Each verb runs in a process of its own.
"""

import argparse
import os
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("RAY_DEFAULT_OBJECT_STORE_MAX_MEMORY_BYTES", str(512 * 2**20))

from processes import Peak, alone

from mpc.config import ViewsConfig
from pipeline import runtime
from pipeline.card import read_card
from pipeline.check import check
from pipeline.plan import make_plan
from pipeline.prepare_config import PhantomConfig, PrepareConfig
from pipeline.shards import prepare
from pipeline.spans import TrainingData
from pipeline.stream import batches

BATCH = 64


class Measured(NamedTuple):
    """What a verb took."""

    mib: float
    seconds: float


def prepared(out: str, images: int, side: int) -> Measured:
    """Synthetic images to shards."""
    runtime.start(num_cpus=2)
    peak, start = Peak(), time.perf_counter()
    peak.start()
    prepare(PrepareConfig(image_size=side, phantom=PhantomConfig(images=images)), None, out)
    return Measured(peak.end(), time.perf_counter() - start)


def checked(data: str) -> Measured:
    """Every byte and every row."""
    peak, start = Peak(), time.perf_counter()
    peak.start()
    assert check(data) == [], "the data set is sound"
    return Measured(peak.end(), time.perf_counter() - start)


def streamed(data: str, steps: int) -> Measured:
    """So many batches of both views."""
    runtime.start(num_cpus=2)
    peak, start = Peak(), time.perf_counter()
    peak.start()
    card = read_card(data)
    plan = make_plan(card, seed=0, batch_size=BATCH)
    for batch in batches(TrainingData(data, card, ViewsConfig()), plan, 0, 1, 0, steps):
        del batch
    return Measured(peak.end(), time.perf_counter() - start)


def main() -> None:
    """Prints a line a verb: peak memory and seconds for each size, and the ratio of the peaks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, nargs=2, default=(20_000, 80_000), metavar="N")
    parser.add_argument("--side", type=int, default=224, help="pixels")
    a = parser.parse_args()
    rows: dict[str, list[Measured]] = {"prepare": [], "check": [], "stream": []}
    with tempfile.TemporaryDirectory() as name:
        folders = [str(Path(name) / str(images)) for images in a.images]
        for images, data in zip(a.images, folders, strict=True):
            rows["prepare"].append(alone(prepared, data, images, a.side))
            rows["check"].append(alone(checked, data))
        steps = make_plan(read_card(folders[-1]), seed=0, batch_size=BATCH).steps_per_epoch
        rows["stream"] = [alone(streamed, data, steps) for data in folders]
    small, large = a.images
    print(f"synthetic images of {a.side} px, object store of 512 MiB, {steps} batches of {BATCH}")
    print(f"{'':10}{f'{small:,} images':>24}{f'{large:,} images':>24}{'ratio':>8}")
    for verb, (few, many) in rows.items():
        cells = "".join(f"{f'{row.mib:.0f} MiB, {row.seconds:.0f} s':>24}" for row in (few, many))
        print(f"{verb:10}{cells}{many.mib / few.mib:8.2f}")


if __name__ == "__main__":
    main()
