"""Images a second of the training stream, against DataLoaders and the bare loop: `python benchmarks/stream.py`.

Every row reads the same images in the same batches with the same views; all but the bare loop have two processes that
augment. CPU seconds are those of the whole process tree, Ray's own processes among them. Each row runs in a process of
its own, and rows take turns, so that a machine whose pace changes does not favour one of them. What happens before the
first batch is not timed but shown. Without --data, synthetic images are prepared first.
"""

import argparse
import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")  # else NumPy's BLAS spins on all cores in each process of a DataLoader
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import cv2
import numpy as np
import pyarrow.parquet as pq
import ray
import torch
from numpy.typing import NDArray
from processes import Peak, alone, cpu_seconds
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from mpc.config import ViewsConfig
from mpc.views import TwoViews
from pipeline import runtime
from pipeline.card import read_card
from pipeline.plan import make_plan
from pipeline.prepare_config import PhantomConfig, PrepareConfig
from pipeline.shards import prepare
from pipeline.spans import TrainingData, images_of
from pipeline.stream import batches

BATCH, PROCESSES, COLD_BATCHES, WARM_BATCHES = 64, 2, 24, 24
PEER = "DataLoader, same shards"
LIMIT = "bare loop, one process"


class Case(NamedTuple):
    """One row of the table."""

    row: str
    data: str
    jpeg: str
    strong: bool
    images: int
    steps: int = 10**6
    """Batches that our streams are asked for; those of the DataLoaders have no end."""


class Measured(NamedTuple):
    """What a row reached."""

    per_second: float
    per_cpu_second: float
    cold: float
    """Seconds from asking to the first batch; Ray and its worker processes run already, but import what they need."""
    warm: float
    """Seconds from asking once more, in the same process, to the first batch: every later run, epoch or trial."""
    mib: float
    """Peak of the process tree's proportional set size."""


def by_us(case: Case, backend: Any) -> Generator[int]:
    """The stream that trains."""
    card = read_card(case.data)
    data = TrainingData(case.data, card, ViewsConfig(), strong=case.strong, tasks=PROCESSES, backend=backend)
    plan = make_plan(card, seed=0, batch_size=BATCH)
    yield from (len(batch.row) for batch in batches(data, plan, 0, 1, 0, case.steps))


def augmenter(case: Case) -> Callable[[NDArray[np.uint8], int], Any]:
    """The views of every row."""
    cv2.setNumThreads(0)
    return TwoViews(ViewsConfig(), read_card(case.data).image_size, strong=case.strong)


class OfShards(IterableDataset[Any]):
    """What one writes by hand: each worker takes every n-th row group, shuffles it, augments it, stacks batches."""

    def __init__(self, case: Case) -> None:
        self.case = case

    def __iter__(self) -> Iterator[Any]:
        worker, card, views = get_worker_info(), read_card(self.case.data), augmenter(self.case)
        groups = [(s.path, g) for s in card.shards_of("train") for g in range(len(s.row_groups))]
        assert worker is not None, "workers of a DataLoader share the row groups"
        generator, held = np.random.default_rng(worker.id), []
        for number in generator.permutation(len(groups[worker.id :: worker.num_workers])):
            path, group = groups[worker.id :: worker.num_workers][number]
            rows = pq.ParquetFile(f"{self.case.data}/{path}").read_row_group(group, columns=["row", "image", "labels"])
            images, labels = images_of(rows["image"], card.image_size), rows["labels"].to_pylist()
            for row in generator.permutation(len(rows)):
                held.append((views(images[row], int(row)), labels[row]))
                if len(held) == BATCH:
                    yield stacked(held)
                    held = []


class OfFiles(Dataset[Any]):
    """One JPEG file an image, as most projects train."""

    def __init__(self, case: Case) -> None:
        self.files, self.case = sorted(Path(case.jpeg).iterdir()), case
        self.views: Callable[[NDArray[np.uint8], int], Any] | None = None

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, number: int) -> Any:
        self.views = self.views or augmenter(self.case)
        image = cv2.imread(str(self.files[number]), cv2.IMREAD_GRAYSCALE)
        assert image is not None, f"{self.files[number]} is an image"
        return self.views(image, number), [0] * 14


def stacked(held: list[Any]) -> tuple[torch.Tensor, ...]:
    """A batch: one tensor a view, and the labels."""
    views = zip(*(views for views, _ in held), strict=True)
    return *(torch.from_numpy(np.stack(view)) for view in views), torch.tensor([labels for _, labels in held])


def by_loader(case: Case, dataset: Any, **options: Any) -> Generator[int]:
    """Epoch after epoch of a DataLoader."""
    loader = DataLoader(dataset(case), num_workers=PROCESSES, persistent_workers=True, **options)
    while True:
        yield from (len(labels) for *_, labels in loader)


def bare(case: Case) -> Generator[int]:
    """Reading and augmenting and nothing else: no shuffle, no batch, no other process."""
    card, views = read_card(case.data), augmenter(case)
    while True:
        for shard in card.shards_of("train"):
            reader = pq.ParquetFile(f"{case.data}/{shard.path}")
            for group in range(reader.num_row_groups):
                images = images_of(reader.read_row_group(group, columns=["image"])["image"], card.image_size)
                for start in range(0, len(images), BATCH):
                    yield len([views(image, start) for image in images[start : start + BATCH]])


ROWS: dict[str, Callable[[Case], Generator[int]]] = {
    "Ray Data (data.backend=ray)": lambda case: by_us(case, "ray"),
    "our spans in a DataLoader (data.backend=torch)": lambda case: by_us(case, "torch"),
    PEER: lambda case: by_loader(case, OfShards, batch_size=None),
    "DataLoader, JPEG files": lambda case: by_loader(
        case, OfFiles, batch_size=BATCH, shuffle=True, collate_fn=stacked, drop_last=True
    ),
    LIMIT: bare,
}


def measure(case: Case) -> Measured:
    """One row in this process."""
    torch.set_num_threads(1)
    if case.row.startswith("Ray"):
        runtime.start(num_cpus=PROCESSES)
        ray.get([ray.remote(lambda: os.getpid()).remote() for _ in range(PROCESSES)])  # its worker processes are up
    cold, stream = asked(case._replace(steps=COLD_BATCHES))
    for _ in itertools.islice(stream, COLD_BATCHES):  # to its end: Ray kills the processes of a stream that is left
        pass
    stream.close()
    warm, stream = asked(case)
    peak = Peak()
    peak.start()
    for _ in range(WARM_BATCHES):
        next(stream)
    spent, start, images = cpu_seconds(), time.perf_counter(), 0
    while images < case.images:
        images += next(stream)
    seconds, spent = time.perf_counter() - start, cpu_seconds() - spent
    return Measured(images / seconds, images / spent, cold, warm, peak.end())


def asked(case: Case) -> tuple[float, Generator[int]]:
    """Seconds until a row's first batch, and its stream."""
    start = time.perf_counter()
    stream = ROWS[case.row](case)
    next(stream)
    return time.perf_counter() - start, stream


def synthetic(folder: Path, images: int, side: int) -> str:
    """A prepared data set of phantoms."""
    config = PrepareConfig(image_size=side, phantom=PhantomConfig(images=images))
    alone(prepare, config, None, str(folder / "data"))  # Ray ends with the process
    return str(folder / "data")


def as_jpeg(data: str, folder: Path) -> str:
    """The training images of a data set as one JPEG file each, quality 95."""
    card = read_card(data)
    (folder / "jpeg").mkdir()
    for shard in card.shards_of("train"):
        rows = pq.read_table(f"{data}/{shard.path}", columns=["row", "image"])
        for row, image in zip(rows["row"].to_pylist(), images_of(rows["image"], card.image_size), strict=True):
            cv2.imwrite(str(folder / "jpeg" / f"{row}.jpg"), image, [cv2.IMWRITE_JPEG_QUALITY, 95])
    return str(folder / "jpeg")


def show(rounds: list[dict[str, Measured]]) -> None:
    """Medians over the rounds, and ratios of images per CPU second taken within a round, with their range."""
    widths = {"images/s": 9, "per CPU s": 10, "x peer": 18, "% of limit": 14, "cold s": 8, "warm s": 8, "peak MiB": 10}
    print(" " * 48 + "".join(f"{title:>{width}}" for title, width in widths.items()))
    for name in ROWS:
        rows = [measured[name] for measured in rounds]
        wall, cpu, cold, warm = (statistics.median(row[field] for row in rows) for field in range(4))
        peer, limit = (
            [measured[name].per_cpu_second / measured[other].per_cpu_second for measured in rounds]
            for other in (PEER, LIMIT)
        )
        mib = max(row.mib for row in rows)
        ratios = f"{spread(peer, '.2f'):>18}{spread([100 * share for share in limit], '.0f'):>14}"
        print(f"{name:48}{wall:9.0f}{cpu:10.0f}{ratios}{cold:8.2f}{warm:8.2f}{mib:10.0f}")


def spread(values: list[float], form: str) -> str:
    """Median, least and largest."""
    return f"{statistics.median(values):{form}} ({min(values):{form}}-{max(values):{form}})"


def main() -> None:
    """Prepares what is needed, runs all rows in turns, prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="a prepared data set; by default synthetic images")
    parser.add_argument("--prepared", type=int, default=6000, help="synthetic images to prepare")
    parser.add_argument("--side", type=int, default=224, help="of the synthetic images, pixels")
    parser.add_argument("--images", type=int, default=8192, help="images that are timed, in each row and round")
    parser.add_argument("--views", choices=("both", "weak"), default="both")
    parser.add_argument("--rounds", type=int, default=3)
    a = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        data = a.data or synthetic(Path(name), a.prepared, a.side)
        jpeg = as_jpeg(data, Path(name))
        cases = [Case(row, data, jpeg, a.views == "both", a.images) for row in ROWS]
        rounds = [{case.row: alone(measure, case) for case in cases} for _ in range(a.rounds)]
        card = read_card(data)
    print(
        f"{card.name}{', synthetic' if card.synthetic else ''}, {len(card.rows('train'))} training images of "
        f"{card.image_size} px, batch {BATCH}, views: {a.views}, {a.images} images a row, median of {a.rounds} rounds"
    )
    show(rounds)


if __name__ == "__main__":
    main()
