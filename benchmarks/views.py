"""Time of the CPU views in ms per image on one core: `python benchmarks/views.py [--side 224]`."""

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

from mpc.config import ViewsConfig
from mpc.red import displacement, simard_rms
from mpc.views import ElasticDeformation, TwoViews, warp


def milliseconds(action: Callable[[int], object], calls: int) -> tuple[float, float]:
    """Median and best of seven rounds, ms a call."""
    rounds = []
    for _ in range(8):
        start = time.perf_counter()
        for seed in range(calls):
            action(seed)
        rounds.append((time.perf_counter() - start) / calls * 1e3)
    rounds = rounds[1:]  # the first warms up
    return float(np.median(rounds)), min(rounds)


def smooth_noise(side: int) -> np.ndarray:
    """A grey uint8 image with structure of a twentieth of the side."""
    blurred = cv2.GaussianBlur(np.random.default_rng(0).random((side, side), dtype=np.float32), (0, 0), side / 20)
    return cv2.normalize(blurred, None, 0, 255, cv2.NORM_MINMAX).astype(np.uint8)


def main() -> None:
    """Prints one line a row."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--side", type=int, default=224)
    side = parser.parse_args().side
    cv2.setNumThreads(1)
    image, config = smooth_noise(side), ViewsConfig()
    rms, sigma = config.red.rms * side, config.red.sigma * side
    alpha = rms / simard_rms(1.0, sigma)
    rng = np.random.default_rng(0)
    weak, both = TwoViews(config, side, strong=False), TwoViews(config, side, strong=True)
    red = ElasticDeformation(config.red.rms, config.red.sigma, p=1.0)
    exact = A.ElasticTransform(alpha=alpha, sigma=sigma, p=1.0)
    approximate = A.ElasticTransform(alpha=alpha, sigma=sigma, approximate=True, p=1.0)
    field = displacement(rng, side, side, rms, sigma)
    rows: dict[str, Callable[[int], object]] = {
        "weak": lambda seed: weak(image, seed),
        "weak + strong": lambda seed: both(image, seed),
        "RED (ours), field": lambda seed: displacement(rng, side, side, rms, sigma),
        "RED (ours), warp": lambda seed: warp(image, *field),
        "RED (ours), whole": lambda seed: red(image=image),
        "albumentations.ElasticTransform": lambda seed: exact(image=image),
        "albumentations.ElasticTransform(approximate)": lambda seed: approximate(image=image),
    }
    print(f"side {side} px, RED rms {rms:.1f} px, sigma {sigma:.1f} px, one core; ms per image")
    print(f"{'':46}median    best")
    for name, action in rows.items():
        median, best = milliseconds(action, calls=200)
        print(f"{name:44}{median:8.3f}{best:8.3f}")


if __name__ == "__main__":
    main()
