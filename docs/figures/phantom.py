"""Draws docs/img/phantom.png, every finding of the synthetic radiographs, subtle and plain."""

import argparse
from dataclasses import replace
from pathlib import Path

import cv2
import matplotlib.pyplot as plt
import numpy as np
from numpy.typing import NDArray

from pipeline.sources import phantom

SIDE = 176
LEVELS = 40  # grey values of the picture: keeps the file small
SUBTLE, PLAIN = 0.15, 0.9
SIGNS = {  # finding -> (image whose patient and draw show it well, what the reader should see)
    "Atelectasis": (50, "bands, raised hemidiaphragm"),
    "Cardiomegaly": (24, "heart wider than half the thorax"),
    "Effusion": (30, "meniscus at the base"),
    "Infiltration": (70, "ill-defined patchy haze"),
    "Mass": (50, "round, more than 3 cm"),
    "Nodule": (24, "round, at most 3 cm"),
    "Pneumonia": (72, "fluffy confluent patches"),
    "Pneumothorax": (50, "pleural line, no markings beyond"),
    "Consolidation": (30, "dense lobe, sharp fissure"),
    "Edema": (30, "batwing haze, septal lines"),
    "Emphysema": (70, "dark lungs, flat domes, bullae"),
    "Fibrosis": (30, "basal net of lines, small lungs"),
    "Pleural_Thickening": (30, "band along the ribs"),
    "Hernia": (50, "gas over fluid behind the heart"),
}


def panels() -> list[tuple[str, NDArray[np.uint8]]]:
    """Caption and image of each panel: two healthy views, then each finding subtle and plain."""
    healthy = replace(phantom.case_of(0, 7, "dense"), severities={})
    result = [(f"no finding, {view}", phantom.draw(replace(healthy, view=view), SIDE)[0]) for view in ("PA", "AP")]
    for finding, (index, sign) in SIGNS.items():
        case = replace(phantom.case_of(0, index, "dense"), view="PA")
        for name, severity in (("subtle", SUBTLE), ("plain", PLAIN)):
            image, _ = phantom.draw(replace(case, severities={finding: severity}), SIDE)
            result.append((f"{finding.replace('_', ' ')}, {name}\n{sign}", image))
    return result


def main() -> None:
    """Writes the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "img" / "phantom.png")
    out = parser.parse_args().out
    figure, axes = plt.subplots(5, 6, figsize=(11.4, 11.0), layout="constrained")
    for axis, (caption, image) in zip(axes.flat, panels(), strict=True):
        axis.imshow(image, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        axis.set_title(caption, fontsize=7.5)
        axis.axis("off")
    figure.suptitle("Synthetic chest radiographs: drawn from formulas, no patient", fontsize=11)
    figure.canvas.draw()
    grey = cv2.cvtColor(np.asarray(figure.canvas.buffer_rgba()), cv2.COLOR_RGBA2GRAY)  # type: ignore[attr-defined]
    step = 255 / (LEVELS - 1)
    coarse = (np.rint(grey / step) * step).astype(np.uint8)
    cv2.imwrite(str(out), coarse, [cv2.IMWRITE_PNG_COMPRESSION, 9])


if __name__ == "__main__":
    main()
