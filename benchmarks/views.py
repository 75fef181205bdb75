"""Images per second of CPU views, device views and RED: `python benchmarks/views.py [--side 224] [--device cpu]`.

One core each, by CPU time; with `--device cuda` the torch rows run on one GPU, and wall time counts. A round goes
through all rows, so that another load on the machine falls on every row alike. All elastic rows have the same
displacement rms and correlation length.
"""

import argparse
import os
import time
from collections.abc import Callable

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")

import albumentations as A
import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torchvision.transforms import v2  # type: ignore[import-untyped]

from mpc.config import RedConfig, StrongConfig, ViewsConfig
from mpc.device_views import DeviceViews, Draws, strong_views
from mpc.red import simard_rms
from mpc.views import ElasticDeformation, TwoViews

BATCH, ROUNDS = 64, 9
REFERENCE = "albumentations.ElasticTransform"
Row = tuple[Callable[[], object], int]
"""What is timed, and how many images it treats."""


def smooth_noise(side: int) -> NDArray[np.uint8]:
    """A grey image with structure of a twentieth of the side."""
    blurred = cv2.GaussianBlur(np.random.default_rng(0).random((side, side), dtype=np.float32), (0, 0), side / 20)
    return np.asarray(cv2.normalize(blurred, None, 0, 255, cv2.NORM_MINMAX), np.uint8)


def one_by_one(action: Callable[[int], object], images: int) -> Row:
    """An action on one image, given its number."""
    return lambda: [action(number) for number in range(images)], images


def cpu_rows(side: int, config: ViewsConfig) -> dict[str, Row]:
    """What albumentations and OpenCV do, image by image."""
    image, red = smooth_noise(side), config.red
    sigma = red.sigma * side
    alpha = red.rms * side / simard_rms(1.0, sigma)
    weak, both = (TwoViews(config, side, strong) for strong in (False, True))
    ours = ElasticDeformation(red.rms, red.sigma, p=1.0)
    exact, approximate = (
        A.ElasticTransform(alpha, sigma, approximate=short, noise_distribution="uniform", p=1.0)
        for short in (False, True)  # the short kernel of 17 px keeps neither rms nor sigma
    )
    return {
        "CPU views, weak": one_by_one(lambda seed: weak(image, seed), BATCH),
        "CPU views, weak + strong": one_by_one(lambda seed: both(image, seed), BATCH),
        "RED on albumentations": one_by_one(lambda _: ours(image=image), BATCH),
        REFERENCE: one_by_one(lambda _: exact(image=image), 16),
        "albumentations.ElasticTransform(approximate)": one_by_one(lambda _: approximate(image=image), 16),
    }


def torch_rows(side: int, config: ViewsConfig, device: torch.device) -> dict[str, Row]:
    """What torch does on the device: a batch at once, but torchvision, which draws one field a call, by images."""
    images = torch.from_numpy(smooth_noise(side)).to(device).repeat(BATCH, 1, 1, 1)
    generator = torch.Generator(device).manual_seed(0)
    weak, both = (DeviceViews(config, side, strong) for strong in (0, 1))
    grey, still = images[:, 0].float(), StrongConfig(ops=0, blur=0.0, cutout=0.0)
    red = RedConfig(rms=config.red.rms, sigma=config.red.sigma, p=1.0)
    sigma = red.sigma * side
    elastic = v2.ElasticTransform(2 * red.rms * side / simard_rms(1.0, sigma), sigma)  # alpha in half of Simard's unit
    rows: dict[str, Row] = {
        "device views, weak": (lambda: weak(images, generator), BATCH),
        "device views, weak + strong": (lambda: both(images, generator), BATCH),
        "RED in torch": (lambda: strong_views(grey, still, red, Draws(generator, images)).byte(), BATCH),
        "torchvision ElasticTransform": one_by_one(lambda number: elastic(images[number]), 2),
    }
    return {name: synchronised(*row) for name, row in rows.items()} if device.type == "cuda" else rows


def synchronised(action: Callable[[], object], images: int) -> Row:
    """Waits until the GPU is done, so that its work is timed and not its queue."""

    def finished() -> None:
        action()
        torch.cuda.synchronize()

    return finished, images


def rates(rows: dict[str, Row], clock: Callable[[], float]) -> dict[str, list[float]]:
    """Images per second of the clock for each row, one value a round."""
    measured: dict[str, list[float]] = {name: [] for name in rows}
    for round_number in range(ROUNDS + 1):
        for name, (action, images) in rows.items():
            start = clock()
            action()
            if round_number > 0:  # the first warms up
                measured[name].append(images / (clock() - start))
    return measured


def main() -> None:
    """Prints a table, one line a row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=224, help="of the square images, pixels")
    parser.add_argument("--device", default="cpu", help="of the torch rows: cpu or cuda")
    arguments = parser.parse_args()
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    side, config = arguments.side, ViewsConfig()
    rows = cpu_rows(side, config) | torch_rows(side, config, torch.device(arguments.device))
    measured = rates(rows, time.process_time if arguments.device == "cpu" else time.perf_counter)
    rms, sigma = config.red.rms * side, config.red.sigma * side
    print(
        f"side {side} px, RED rms {rms:.1f} px, sigma {sigma:.1f} px; torch on {arguments.device}, batches of {BATCH}"
    )
    print(f"{'images/s':44}{'median':>9}{'best':>9}{'median ratio':>14}")
    for name, values in measured.items():
        ratio = np.median(values) / np.median(measured[REFERENCE])
        print(f"{name:44}{np.median(values):9.0f}{max(values):9.0f}{ratio:14.2f}")


if __name__ == "__main__":
    main()
