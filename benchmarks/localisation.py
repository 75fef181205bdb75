"""Does saliency find the sign? `python benchmarks/localisation.py --checkpoint RUN/best [--images 400] [--seed 1000]`.

Draws synthetic radiographs that no training has seen and asks for a map of every finding that is there. Where its sign
was drawn is known: `hit` is the share of maps whose strongest place lies in it (pointing game), `inside` the share of
the evidence that does. Chance is the share of the image that the sign covers. Harder rivals than chance: the map of
another image with the same finding, which knows where such signs usually lie, and the network with random weights.
Intervals are 95 %, by patient. `--rivals` adds other methods of Captum, one of which (occlusion) takes minutes.
"""

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch
from captum.attr import IntegratedGradients, LayerActivation, LayerGradientXActivation, Occlusion
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from mpc.metrics import Resamples
from mpc.metrics.intervals import interval
from mpc.saliency import Saliency, agreement, locate, stages
from pipeline.illustrate import randomised
from pipeline.inference import LoadedModel, load_model
from pipeline.overlay import evidence
from pipeline.sources import phantom

Maps = dict[tuple[int, int], NDArray[np.float32]]
"""(image, finding) -> signed map."""


class Drawn(NamedTuple):
    """Synthetic radiographs and their signs."""

    images: NDArray[np.uint8]
    patients: list[int]
    signs: list[dict[str, NDArray[np.bool_]]]


class Scored(NamedTuple):
    """What one kind of map reaches, [N, K] each; NaN where a finding is not there."""

    hit: NDArray[np.float64]
    inside: NDArray[np.float64]


def draw(images: int, seed: int, size: int) -> Drawn:
    """The first `images` radiographs of a seed, profile dense."""
    pairs = [phantom.render_with_signs(seed, index, "dense", size) for index in range(images)]
    people = [phantom.patient(seed, index).number for index in range(images)]
    return Drawn(np.stack([image for image, _ in pairs]), people, [signs for _, signs in pairs])


def maps_of(saliency: Saliency, drawn: Drawn, findings: tuple[str, ...]) -> Maps:
    """(image, finding) -> signed map, for every finding that is there."""
    wanted = [(n, k) for n, signs in enumerate(drawn.signs) for k, name in enumerate(findings) if name in signs]
    found: Maps = {}
    for start in range(0, len(wanted), 64):
        part = wanted[start : start + 64]
        maps = saliency.maps(drawn.images[[n for n, _ in part]], [k for _, k in part])
        found.update(zip(part, maps, strict=True))
    return found


def score(maps: Maps, drawn: Drawn, findings: tuple[str, ...], *, shift: int = 0) -> Scored:
    """How well each map finds its sign; with `shift`, that of the next image with the same finding instead."""
    found = Scored(*(np.full((len(drawn.images), len(findings)), np.nan) for _ in Scored._fields))
    for k, name in enumerate(findings):
        rows = [n for n, j in maps if j == k]
        for place, n in enumerate(rows):
            other = rows[(place + shift) % len(rows)]
            located = locate(evidence(maps[other, k], drawn.images.shape[1]), drawn.signs[n][name])
            found.hit[n, k], found.inside[n, k] = located
    return found


def chance(drawn: Drawn, findings: tuple[str, ...]) -> Scored:
    """The share of the image that each sign covers."""
    area = np.array([[signs[name].mean() if name in signs else np.nan for name in findings] for signs in drawn.signs])
    return Scored(area, area)


def mean(values: NDArray[np.float64], resamples: Resamples) -> str:
    """Mean over findings of their mean over images, with its interval."""
    there = np.isfinite(values)
    sums, counts = np.where(there, values, 0), there.astype(float)
    middle = float((sums.sum(0) / counts.sum(0)).mean())
    with np.errstate(invalid="ignore"):
        spread = interval((resamples.totals(sums) / resamples.totals(counts)).mean(1))
    return f"{middle:.3f} [{spread[0]:.3f}, {spread[1]:.3f}]" if spread else f"{middle:.3f}"


def rivals(loaded: LoadedModel, drawn: Drawn, keys: list[tuple[int, int]], layer: str) -> Iterator[tuple[str, Maps]]:
    """Other methods of Captum, as maps of the same findings; pixels are summed over cells of 1/16 of the side."""
    model, module, side = loaded.model, loaded.model.backbone.get_submodule(layer), drawn.images.shape[1]
    gradient, active = LayerGradientXActivation(model, module, multiply_by_inputs=False), LayerActivation(model, module)
    methods: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        f"LayerCAM at {layer}": lambda x, k: (gradient.attribute(x, target=k).relu() * active.attribute(x)).sum(1),
        "integrated gradients from a blurred image": lambda x, k: cells(
            IntegratedGradients(model).attribute(x, blurred(x), target=k, n_steps=16), side // 16
        ),
        "occlusion by the mean, 3/16 of the side": lambda x, k: cells(
            Occlusion(model).attribute(
                x.detach(), (1, 3 * side // 16, 3 * side // 16), (1, side // 16, side // 16), flat(x), target=k
            ),
            side // 16,
        ),
    }
    for name, method in methods.items():
        found: Maps = {}
        for start in range(0, len(keys), 32):
            part = keys[start : start + 32]
            x = torch.from_numpy(drawn.images[[n for n, _ in part]]).unsqueeze(1).float().requires_grad_()
            made = method(x, torch.tensor([k for _, k in part])).detach().numpy()
            found.update(zip(part, made.astype(np.float32), strict=True))
        yield name, found


def cells(pixels: Tensor, width: int) -> Tensor:
    """Means of [B, 1, S, S] over squares of `width` pixels."""
    return F.avg_pool2d(pixels, width)[:, 0]


def flat(x: Tensor) -> Tensor:
    """Each image as its mean."""
    return x.detach().mean((2, 3), keepdim=True).expand_as(x).clone()


def blurred(x: Tensor) -> Tensor:
    """Each image blurred with a twelfth of its side."""
    images = x.detach()[:, 0].numpy()
    return torch.from_numpy(np.stack([cv2.GaussianBlur(image, (0, 0), x.shape[-1] / 12) for image in images]))[:, None]


def rows_of(checkpoint: Path, drawn: Drawn, others: bool) -> tuple[dict[str, Scored], tuple[str, ...], str]:
    """Every kind of map with its scores; the findings; a line on the sanity check."""
    loaded = load_model(checkpoint)
    findings, size = loaded.info.findings, loaded.info.image_size
    ours, last = Saliency(loaded.model, size), stages(loaded.model.backbone)[-1]
    kinds: dict[str, Callable[[], Saliency]] = {
        f"gradcam at {ours.layer}": lambda: Saliency(loaded.model, size, method="gradcam", layer=ours.layer),
        f"hirescam at {last}": lambda: Saliency(loaded.model, size, layer=last),
        f"gradcam at {last}": lambda: Saliency(loaded.model, size, method="gradcam", layer=last),
    }
    maps = maps_of(ours, drawn, findings)
    name = f"hirescam at {ours.layer} (ours)"
    found = {name: score(maps, drawn, findings)}
    found |= {name: score(maps_of(kind(), drawn, findings), drawn, findings) for name, kind in kinds.items()}
    found["ours, map of another image with the finding"] = score(maps, drawn, findings, shift=1)
    random = maps_of(Saliency(randomised(loaded), size, layer=ours.layer), drawn, findings)
    found["ours, random weights"] = score(random, drawn, findings)
    found["chance: area of the sign"] = chance(drawn, findings)
    if others:
        for name, made in rivals(loaded, drawn, list(maps), ours.layer):
            found[name] = score(made, drawn, findings)
    alike = [agreement(maps[key], random[key]) for key in maps]
    known = [value for value in alike if value is not None]
    shape = "x".join(map(str, next(iter(maps.values())).shape))
    return (
        found,
        findings,
        (
            f"{len(maps):,} maps of {shape} places; rank correlation with those of random weights: mean "
            f"{np.mean(known):+.3f}, largest {max(known):+.3f}"
        ),
    )


def main() -> None:
    """Prints a line a kind of map, then one a finding."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help="of a network trained on phantoms")
    parser.add_argument("--images", type=int, default=400)
    parser.add_argument("--seed", type=int, default=1000, help="of the images; not the seed that was trained on")
    parser.add_argument("--rivals", action="store_true", help="also other methods of Captum")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    size = load_model(arguments.checkpoint).info.image_size
    drawn = draw(arguments.images, arguments.seed, size)
    found, findings, sanity = rows_of(arguments.checkpoint, drawn, arguments.rivals)
    resamples = Resamples.draw(np.array(drawn.patients))
    print(f"{arguments.images} synthetic radiographs of {size} px, seed {arguments.seed}; {sanity}")
    print(f"{'map':50}{'hit':>24}{'inside':>24}")
    for name, row in found.items():
        print(f"{name:50}{mean(row.hit, resamples):>24}{mean(row.inside, resamples):>24}")
    ours, area = next(iter(found.values())), found["chance: area of the sign"].hit
    print(f"\n{'finding':20}{'signs':>8}{'hit':>8}{'inside':>8}{'chance':>8}")
    for k, name in enumerate(findings):
        there = np.isfinite(area[:, k])
        values = (there.sum(), ours.hit[there, k].mean(), ours.inside[there, k].mean(), area[there, k].mean())
        print(f"{name:20}{values[0]:8d}{values[1]:8.2f}{values[2]:8.2f}{values[3]:8.3f}")


if __name__ == "__main__":
    main()
