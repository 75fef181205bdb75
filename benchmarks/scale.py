"""What a search over a whole collection needs, on paper, each figure with its derivation: `python benchmarks/scale.py`.

Measured here are bytes and images/s of docs/data.md, what `benchmarks/concurrency.py` prints, and the rows that the
plan of the stream reads; not the rates of GPUs, which others have published, and not prices, which are assumed.
"""

import argparse
from typing import NamedTuple

from pipeline.plan import Plan, RowGroup
from pipeline.prepare_config import PrepareConfig
from pipeline.spans import SPAN_ROWS

COLLECTIONS = {"CheXpert": 224_316, "MIMIC-CXR-JPG": 377_110}
IMAGE_BYTES = 43_398
"""A radiograph of 224 px in a shard (docs/data.md, NIH radiographs, lz4)."""
IMAGES_PER_CPU_S = 378
"""Both views through Ray Data (docs/data.md)."""
PUBLISHED = {  # images/s of training at 224 px in mixed precision, one forward and backward pass an image
    ("DenseNet-121", "RTX 3090"): 914,  # timm, results/benchmark-train-amp-nhwc-pt112-cu113-rtx3090.csv
    ("ResNet-50", "RTX 3090"): 1218,  # the same
    ("ResNet-50", "A100 80GB"): 2470,  # NVIDIA DeepLearningExamples, ResNet50 v1.5 for PyTorch, 21.03
}
PASSES = 2.0
"""MPC sees each image twice, weak and strong: the least that a step can cost against one of AN."""
MIB = 2**20


class Options(NamedTuple):
    """What may be another figure elsewhere."""

    checkpoint: int
    epochs: int
    trials: int
    price: float
    gpus: int
    share: float


def read_share(images: int, ranks: int, batch: int = 256) -> float:
    """Rows that each rank reads for each row that it trains on, over the first tasks of full length in an epoch.

    A task reads every row group that holds one of its rows; a full shuffle spreads those over a window.
    """
    rows = PrepareConfig().row_group
    groups = tuple(RowGroup("shard", number, number * rows, rows) for number in range(images // rows))
    plan, steps = Plan(groups, "", 0, batch), SPAN_ROWS * ranks // batch
    shares = [
        plan.share(span, 0, ranks).reshape(-1) for span in plan.spans(0, 16 * steps, steps) if span.steps == steps
    ]
    read = sum(group.rows for share in shares for group in plan.holding(share))
    return read / sum(share.size for share in shares)


def halving(trials: int, epochs: int, factor: int = 3) -> float:
    """Share of the epochs that successive halving trains where it compares whole rungs: the least that ASHA can."""
    trained, rung, left, before = 0, 1, trials, 0
    while left:
        reached = min(rung, epochs) if left >= factor else epochs
        trained += left * (reached - before)
        if reached == epochs:
            break
        before, rung, left = reached, rung * factor, left // factor
    return trained / (trials * epochs)


def line(name: str, value: str, derivation: str) -> None:
    """One figure."""
    print(f"| {name} | {value} | {derivation} |")


def per_gpu(workers: tuple[int, int] = (1, 8)) -> None:
    """What a GPU needs, whatever the collection."""
    one, many = (read_share(COLLECTIONS["CheXpert"], count) for count in workers)
    columns = ["GPU", "published, images/s", "MPC, images/s", "CPUs for both views", "reads, MiB/s"]
    columns.append(f"reads as one of {workers[1]} workers")
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for (network, gpu), rate in PUBLISHED.items():
        need = rate / PASSES
        read = [f"{need * IMAGE_BYTES * share / MIB:,.0f}" for share in (one, many)]
        print(f"| {network}, {gpu} | {rate:,} | {need:,.0f} | {need / IMAGES_PER_CPU_S:.2f} | {' | '.join(read)} |")
    print(f"rows read for each row used: {one:.2f} with one worker, {many:.2f} with {workers[1]} workers of a run")


def collection(name: str, images: int, told: Options) -> None:
    """Data, time and price of one collection."""
    network = ("DenseNet-121", "RTX 3090")
    rate, gpus, mib = PUBLISHED[network] / PASSES, told.gpus, told.checkpoint / MIB
    epoch = images / rate
    shards = images * PrepareConfig().image_size ** 2 / MIB / PrepareConfig().shard_mib
    hours = told.trials * told.epochs * told.share * epoch / 3600
    print(f"\n**{name}**, {images:,} images, {', '.join(network)}\n\n| figure | value | from |\n|---|---|---|")
    line("shards", f"{images * IMAGE_BYTES / 1e9:.1f} GB in {shards:.0f} files", f"{IMAGE_BYTES:,} bytes x {images:,}")
    line("an epoch of a trial", f"{epoch:.0f} s", f"{images:,} / {rate:.0f} images/s")
    line("checkpoints", f"{gpus * mib / epoch:.1f} MiB/s", f"{gpus} trials x {mib:.0f} MiB / {epoch:.0f} s")
    line("epochs to record", f"{gpus / epoch:.2f} a second", f"{gpus} trials / {epoch:.0f} s")
    search = f"{told.trials} trials x {told.epochs} epochs x {told.share:.0%} x {epoch:.0f} s"
    line("the search", f"{hours:,.0f} GPU hours", search)
    line("on all GPUs", f"{hours / gpus:.1f} hours", f"/ {gpus}")
    line("its price", f"${hours * told.price:,.0f}", f"x ${told.price:.2f} an hour")


def main() -> None:
    """Prints both tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=int, required=True, help="bytes, as benchmarks/concurrency.py prints them")
    parser.add_argument("--epochs", type=int, default=27)
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--price", type=float, default=0.5, help="dollars an hour of a spot GPU with its machine")
    parser.add_argument("--gpus", type=int, default=64, help="trials at a time")
    parser.add_argument("--share", type=float, default=0.5, help="of the epochs that early stopping leaves")
    told = Options(**vars(parser.parse_args()))
    per_gpu()
    for name, images in COLLECTIONS.items():
        collection(name, images, told)
    print(f"\nsuccessive halving of whole rungs would train {halving(told.trials, told.epochs):.0%} of the epochs")


if __name__ == "__main__":
    main()
