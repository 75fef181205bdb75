"""Draws docs/img/views.png, both views of a phantom radiograph at three strengths: `python docs/figures/views.py`."""

import argparse
from pathlib import Path

import cv2
import matplotlib.pyplot as plt
import numpy as np
from numpy.typing import NDArray

from mpc.config import RedConfig, StrongConfig, ViewsConfig
from mpc.views import TwoViews
from pipeline.sources import phantom

SIDE = 320
DRAWS = 5
STRENGTHS = {"half": (0.5, 0.006, 0.045), "default": (1.0, 0.013, 0.045), "double": (2.0, 0.020, 0.065)}


def views(image: NDArray[np.uint8], magnitude: float, rms: float, sigma: float) -> list[NDArray[np.uint8]]:
    """One weak view and several strong ones, RED in each."""
    config = ViewsConfig(strong=StrongConfig(magnitude=magnitude), red=RedConfig(rms=rms, sigma=sigma, p=1.0))
    draw = TwoViews(config, image.shape[0], strong=True)
    pairs = [draw(image, seed) for seed in range(DRAWS)]
    return [pairs[0][0], *(strong for _, strong in pairs)]


def main() -> None:
    """Writes the picture; `--image` shows another radiograph than the phantom's."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--image", type=Path)
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "img" / "views.png")
    arguments = parser.parse_args()
    if arguments.image is None:
        image = phantom.render(seed=0, index=7, profile="dense", size=SIDE)
    else:
        image = cv2.resize(cv2.imread(str(arguments.image), cv2.IMREAD_GRAYSCALE), (SIDE, SIDE))
    figure, axes = plt.subplots(len(STRENGTHS), DRAWS + 2, figsize=(10.5, 4.9), layout="constrained")
    for row, (name, (magnitude, rms, sigma)) in zip(axes, STRENGTHS.items(), strict=True):
        for axis, picture in zip(row, [image, *views(image, magnitude, rms, sigma)], strict=True):
            axis.imshow(picture, cmap="gray", vmin=0, vmax=255)
            axis.set(xticks=[], yticks=[])
        row[0].set_ylabel(f"{name}\nmagnitude {magnitude:g}\nRED {rms:.1%} / {sigma:.1%}", fontsize=7)
    titles = ["synthetic image" if arguments.image is None else "image", "weak view", *["strong view"] * DRAWS]
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set_title(title, fontsize=8)
    figure.savefig(arguments.out, dpi=100)


if __name__ == "__main__":
    main()
