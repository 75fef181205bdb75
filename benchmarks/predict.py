"""What does prediction through Ray Data cost? `python benchmarks/predict.py --checkpoint RUN/best`.

PNG files of 1024 pixels (synthetic radiographs) are decoded, scored, judged and written by `predict`; against it stand
the same work as a plain PyTorch loop in one process, and with a DataLoader whose workers decode while the main process
scores. All use the project's decoder and the same batch. The limit is the bare work, decode and network, on one thread,
times the cores. Rates are of whole calls; Ray starts before, its time is shown apart, and each way runs once unseen.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from pipeline import pixels, runtime
from pipeline.config import PredictConfig
from pipeline.inference import LoadedModel, load_model
from pipeline.predict import predict

BATCH, SIDE, DIFFERENT = 32, 1024, 32


class Files(Dataset[NDArray[np.uint8]]):
    """Image files as the network sees them.

    Args:
        paths: of them.
        loaded: whose size and fit.
    """

    def __init__(self, paths: list[Path], loaded: LoadedModel) -> None:
        self.paths, self.info = paths, loaded.info

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> NDArray[np.uint8]:
        return pixels.load(str(self.paths[index]), self.info.image_size, self.info.pixels.fit)


def write(folder: Path, number: int) -> list[Path]:
    """Files, of which a few differ."""
    images = [pixels.load(f"phantom://dense/9/{index}", SIDE, "pad") for index in range(DIFFERENT)]
    contents = [cv2.imencode(".png", image)[1].tobytes() for image in images]
    paths = [folder / f"{index:05d}.png" for index in range(number)]
    for index, path in enumerate(paths):
        path.write_bytes(contents[index % DIFFERENT])
    return paths


def batches(files: Files, workers: int) -> Iterator[NDArray[np.uint8]]:
    """Stacked images, decoded here or by the workers of a DataLoader."""
    loader = DataLoader(files, BATCH, num_workers=workers, collate_fn=np.stack)
    yield from loader


def loop(files: Files, loaded: LoadedModel, workers: int) -> None:
    """The plain loop: probabilities of everything, in memory."""
    torch.set_num_threads(max(1, (os.cpu_count() or 1) - workers))
    found = np.concatenate([loaded.probabilities(batch) for batch in batches(files, workers)])
    assert found.shape == (len(files), len(loaded.info.findings))


def seconds(work: Callable[[], object]) -> float:
    """Of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def bare(files: Files, loaded: LoadedModel) -> tuple[float, float]:
    """Seconds an image of decoding and of the network, on one thread."""
    torch.set_num_threads(1)
    few = Files(files.paths[: 2 * BATCH], loaded)
    images = np.stack([few[index] for index in range(len(few))])
    decode = seconds(lambda: [few[index] for index in range(len(few))]) / len(few)
    loaded.probabilities(images[:BATCH])
    network = seconds(lambda: [loaded.probabilities(images[s : s + BATCH]) for s in (0, BATCH)]) / len(few)
    return decode, network


def main() -> None:
    """Prints a line a way."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--images", type=int, default=768)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    cores, loaded = os.cpu_count() or 1, load_model(arguments.checkpoint)
    print(f"start of Ray: {seconds(runtime.start):.1f} s")
    with tempfile.TemporaryDirectory() as folder:
        paths = write(Path(folder), arguments.images)
        files, config = Files(paths, loaded), PredictConfig(batch_size=BATCH)
        decode, network = bare(files, loaded)
        out = f"{folder}.parquet"
        ways: dict[str, Callable[[], object]] = {
            "predict, Ray Data": lambda: predict(arguments.checkpoint, folder, out, config=config),
            "plain PyTorch loop": lambda: loop(files, loaded, 0),
            f"DataLoader, {cores} workers": lambda: loop(files, loaded, cores),
        }
        took: dict[str, list[float]] = {name: [] for name in ways}
        for turn in range(arguments.repeats + 1):
            for name, way in ways.items():
                found = seconds(way)
                if turn:
                    took[name].append(found)
        Path(out).unlink()
    rates = {name: arguments.images / statistics.median(values) for name, values in took.items()}
    limit = cores / (decode + network)
    print(f"an image on one thread: decode {1000 * decode:.1f} ms, network {1000 * network:.1f} ms; {cores} cores")
    for name, rate in {**rates, "limit": limit}.items():
        plain = rates["plain PyTorch loop"]
        print(f"{name:24}{rate:8.1f} images/s  {rate / plain:5.2f} x the plain loop  {rate / limit:5.2f} of the limit")


if __name__ == "__main__":
    main()
