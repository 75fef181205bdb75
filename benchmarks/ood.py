"""Are unlike images flagged? `python benchmarks/ood.py --checkpoint RUN/best --data DATA [--real FOLDER]`.

For a network trained on synthetic radiographs. New ones of the same kind give the share of false alarms; against them
stand inverted and turned ones, drawn lateral views, parts of a CT and an MR slice (pydicom's test files), parts of two
photographs (scikit-learn's samples), nearly blank images and, with --real, real radiographs. Every image takes the way
of a file: encoded, then through the project's decoder. AUROC tells each kind from the new radiographs: by our distance,
by its two parts, and by two rivals: distance to the 10th nearest training image in normalised features (Sun et al.,
ICML 2022) and joint energy (Wang et al., NeurIPS 2021), which needs no reference.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from pydicom.data import get_testdata_file
from sklearn.datasets import load_sample_images
from sklearn.metrics import roc_auc_score
from sklearn.neighbors import NearestNeighbors

from pipeline import pixels
from pipeline.card import read_card
from pipeline.decode import DecodeError, decode
from pipeline.inference import LoadedModel, load_model
from pipeline.reference import runs_of
from pipeline.stored import read_images

Images = NDArray[np.uint8]
SEED, NEIGHBOURS, SIDE = 1000, 10, 256


def png(image: Images) -> bytes:
    """A grey image as a file."""
    return bytes(cv2.imencode(".png", image)[1].tobytes())


def radiographs(number: int) -> list[Images]:
    """New synthetic ones, large."""
    return [pixels.load(f"phantom://dense/{SEED}/{index}", SIDE, "pad") for index in range(number)]


def crops(image: Images, number: int, rng: np.random.Generator) -> Iterator[Images]:
    """Square parts, at least 0.6 of the shorter side, mirrored at random."""
    for _ in range(number):
        side = int(min(image.shape) * rng.uniform(0.6, 1.0))
        top, left = (int(rng.integers(0, length - side + 1)) for length in image.shape)
        part = image[top : top + side, left : left + side]
        yield np.ascontiguousarray(part[:, :: rng.choice([-1, 1])])


def slice_of(name: str) -> Images:
    """A slice as a viewer shows it."""
    path = get_testdata_file(name, download=False)
    return decode(Path(str(path)).read_bytes(), name, 128, "pad")


def lateral(rng: np.random.Generator) -> Images:
    """A chest from the side, drawn: spine behind, heart before it, both lungs on each other. A sketch."""

    def blob(centre: tuple[float, float], axes: tuple[float, float], turn: float = 0.0) -> NDArray[np.float32]:
        canvas = np.zeros((SIDE, SIDE), np.float32)
        place, size = (tuple(int(SIDE * value) for value in pair) for pair in (centre, axes))
        cv2.ellipse(canvas, place, size, turn, 0, 360, 1.0, -1)
        return np.asarray(cv2.GaussianBlur(canvas, (0, 0), SIDE * 0.012), np.float32)

    def shake(spread: float) -> float:
        return float(rng.normal(0, spread))

    picture = 0.62 * blob((0.5 + shake(0.02), 0.55), (0.40 + shake(0.02), 0.55))
    lungs = blob((0.48 + shake(0.02), 0.45 + shake(0.02)), (0.26 + shake(0.02), 0.34 + shake(0.02)), 8 + shake(4))
    picture -= 0.45 * lungs
    picture += 0.30 * blob((0.36 + shake(0.02), 0.60 + shake(0.02)), (0.13 + shake(0.01), 0.15), 30 + shake(8))
    for step in range(11):  # vertebrae
        picture += 0.28 * blob((0.74 + 0.04 * np.sin(step / 3) + shake(0.003), 0.05 + 0.085 * step), (0.045, 0.03), 10)
    picture += 0.35 * blob((0.5, 0.95 + shake(0.03)), (0.45, 0.20))  # below the diaphragm
    picture += rng.normal(0, 0.015, picture.shape)
    return np.asarray(np.clip(picture * 255, 0, 255), np.uint8)


def kinds(known: list[Images], number: int, real: Path | None) -> Iterator[tuple[str, list[bytes]]]:
    """What is put against the radiographs, as files."""
    rng = np.random.default_rng(0)
    some = known[:number]
    yield "inverted", [png(255 - image) for image in some]
    yield "turned by 90 degrees", [png(np.ascontiguousarray(np.rot90(image))) for image in some]
    yield "upside down", [png(np.ascontiguousarray(image[::-1])) for image in some]
    yield "lateral (drawn)", [png(lateral(rng)) for _ in range(number)]
    for name, file in (("CT slice, parts of 1", "CT_small.dcm"), ("MR slice, parts of 1", "MR_small.dcm")):
        yield name, [png(part) for part in crops(slice_of(file), number, rng)]
    photographs = [cv2.cvtColor(image, cv2.COLOR_RGB2GRAY) for image in load_sample_images().images]
    halves = (crops(image, number // len(photographs), rng) for image in photographs)
    yield f"photograph, parts of {len(photographs)}", [png(part) for half in halves for part in half]
    greys = rng.uniform(10, 245, number)
    noise = (grey + rng.normal(0, rng.uniform(0.5, 4), (SIDE, SIDE)) for grey in greys)
    yield "nearly blank", [png(np.clip(image, 0, 255).astype(np.uint8)) for image in noise]
    if real is not None:
        files = sorted(real.glob("*.png"))[:number]
        yield "real radiograph (NIH)", [path.read_bytes() for path in files]


def decoded(files: list[bytes], loaded: LoadedModel) -> Images:
    """Files as the network sees them."""
    info = loaded.info
    return np.stack([decode(file, "", info.image_size, info.pixels.fit, info.pixels.reduce_to) for file in files])


class Scores:
    """Every score of an image, the larger the less like the training images.

    Args:
        loaded: network with its reference.
        data: URI of the data set that it was trained on.
    """

    def __init__(self, loaded: LoadedModel, data: str) -> None:
        assert loaded.reference is not None, "the checkpoint has no reference.safetensors; `train --resume` writes it"
        self.loaded, self.reference = loaded, loaded.reference
        card = read_card(data)
        stored = [read_images(data, card, "train", run) for run in runs_of(len(card.rows("train")), 2000)]
        features = [loaded.outputs(np.stack([item.image for item in run.values()]))[1] for run in stored]
        self.neighbours = NearestNeighbors(n_neighbors=NEIGHBOURS).fit(normalised(np.concatenate(features)))

    def of(self, images: Images) -> dict[str, NDArray[np.float64]]:
        """Name of a score -> [N]."""
        outputs = [self.loaded.outputs(images[start : start + 64]) for start in range(0, len(images), 64)]
        logits, features = (np.concatenate(part) for part in zip(*outputs, strict=True))
        parts = self.reference.parts(features, images)
        return {
            "ours": self.reference.unlikeness(features, images),
            "network": parts[:, 0],
            "picture": parts[:, 1],
            "neighbour": self.neighbours.kneighbors(normalised(features))[0][:, -1],
            "energy": -np.logaddexp(0, logits.astype(np.float64)).sum(1),
        }

    def flags(self, images: Images) -> list[tuple[str, ...]]:
        """What prediction would say."""
        return self.reference.flags(self.loaded.outputs(images)[1], images)


def normalised(features: NDArray[np.float32]) -> NDArray[np.float32]:
    """Rows of length 1."""
    return np.asarray(features / (np.linalg.norm(features, axis=1, keepdims=True) + 1e-9))


def blank() -> str:
    """What the decoder says to an image of one grey."""
    try:
        decode(png(np.full((64, 64), 90, np.uint8)), "", 64, "pad")
    except DecodeError as error:
        return str(error)
    return "is not refused"


def main() -> None:
    """Prints a line a kind of image."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help="of a network trained on phantoms")
    parser.add_argument("--data", required=True, help="what it was trained on")
    parser.add_argument("--images", type=int, default=400, help="new radiographs; a quarter as many of each other kind")
    parser.add_argument("--real", type=Path, help="folder of real radiographs as PNG")
    arguments = parser.parse_args()
    loaded = load_model(arguments.checkpoint)
    scores = Scores(loaded, arguments.data)
    large = radiographs(arguments.images)
    new = decoded([png(image) for image in large], loaded)
    known = scores.of(new)
    alarms = [flags for flags in scores.flags(new) if flags]
    print(f"limit set for {scores.reference.false_alarms:.1%} false alarms; blank: {blank()}")
    print(f"{'images':26}{'n':>5}{'flagged':>9}  " + "".join(f"{name:>10}" for name in known) + "  why")
    print(f"{'new radiographs':26}{len(new):5d}{len(alarms) / len(new):9.3f}")
    for name, files in kinds(large, arguments.images // 4, arguments.real):
        images = decoded(files, loaded)
        found, flags = scores.of(images), scores.flags(images)
        labels = np.repeat([0, 1], [len(new), len(images)])
        areas = "".join(f"{roc_auc_score(labels, np.append(known[key], found[key])):10.3f}" for key in known)
        hints = {hint: sum(hint in said for said in flags) / len(flags) for said in flags for hint in said[1:]}
        why = ", ".join(f"{hint} {share:.2f}" for hint, share in sorted(hints.items()))
        print(f"{name:26}{len(images):5d}{sum(map(bool, flags)) / len(flags):9.3f}  {areas}  {why}")


if __name__ == "__main__":
    main()
