"""Saliency on top of a radiograph: as pixels, and as a picture with its legend."""

import io
from typing import Any, NamedTuple

import cv2
import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from numpy.typing import NDArray

COLOURS = "inferno"
OPACITY = 0.75
"""Of the strongest place; places without evidence stay as they are."""
INK, SOFT = "#1d2a33", "#5a6a75"


class Caption(NamedTuple):
    """What stands around an overlay."""

    finding: str
    probability: float
    threshold: float
    source: str
    model: str
    how: str
    """Method and layer."""


def evidence(found: NDArray[np.float32], size: int) -> NDArray[np.float32]:
    """A signed map [h, w] as evidence for the finding, [size, size] in [0, 1]: 1 at its strongest place.

    All 0 where nothing speaks for the finding.
    """
    large = cv2.resize(np.maximum(found, 0), (size, size), interpolation=cv2.INTER_CUBIC)
    large = np.maximum(large, 0)  # cubic interpolation swings below 0
    return np.asarray(large / max(float(large.max()), np.finfo(np.float32).tiny), np.float32)


def blend(
    image: NDArray[np.uint8], found: NDArray[np.float32], sign: NDArray[np.bool_] | None = None
) -> NDArray[np.uint8]:
    """The image with a map in colour over it, RGB [size, size, 3].

    Args:
        image: grey, [size, size].
        found: signed map [h, w].
        sign: [size, size], where the finding is known to be: drawn as a white outline.
    """
    strength = evidence(found, image.shape[0])[..., None]
    colour = matplotlib.colormaps[COLOURS](strength[..., 0])[..., :3] * 255
    mixed = image[..., None] * (1 - OPACITY * strength) + colour * OPACITY * strength
    rgb: NDArray[np.uint8] = np.ascontiguousarray(np.clip(np.rint(mixed), 0, 255).astype(np.uint8))
    if sign is not None:
        outlines, _ = cv2.findContours(sign.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
        cv2.drawContours(rgb, outlines, -1, (255, 255, 255), 1)
    return rgb


def scale() -> list[str]:
    """The colours of the legend from none to most, as CSS takes them."""
    return [matplotlib.colors.to_hex(matplotlib.colormaps[COLOURS](step / 8)) for step in range(9)]


def picture(image: NDArray[np.uint8], found: NDArray[np.float32], caption: Caption) -> bytes:
    """PNG: the image beside its overlay, what was found above, the colour scale and how it was made below."""
    figure = Figure(figsize=(8.0, 4.9), dpi=110)
    FigureCanvasAgg(figure)
    for left, pixels, title in ((0.02, image, "as the network sees it"), (0.505, blend(image, found), "evidence")):
        axes = figure.add_axes((left, 0.13, 0.475, 0.7755))
        axes.imshow(pixels, cmap="gray", vmin=0, vmax=255, interpolation="bilinear")
        axes.set_axis_off()
        axes.text(0.02, 0.97, title, transform=axes.transAxes, va="top", fontsize=8, color="#dfe5e9")
    _head(figure, caption, bool((found > 0).any()))
    _legend(figure, caption)
    stream = io.BytesIO()
    figure.savefig(stream, format="png", metadata={"Software": None})
    return stream.getvalue()


def _head(figure: Figure, caption: Caption, any_evidence: bool) -> None:
    """Finding and probability, and whether it is called."""
    called = caption.probability >= caption.threshold
    verdict = f"called: at or above {caption.threshold:.3f}" if called else f"not called: below {caption.threshold:.3f}"
    text = f"probability {caption.probability:.3f}, {verdict}" + ("" if any_evidence else "; no place speaks for it")
    figure.text(0.02, 0.965, caption.finding.replace("_", " "), fontsize=12, weight="bold", color=INK, va="center")
    figure.text(0.98, 0.965, text, fontsize=9, color=INK, va="center", ha="right")
    figure.text(0.02, 0.922, f"{caption.source}"[-110:], fontsize=7.5, color=SOFT, va="center")


def _legend(figure: Figure, caption: Caption) -> None:
    """Colour scale, method, and what the picture is not."""
    axes = figure.add_axes((0.02, 0.085, 0.3, 0.022))
    bar: Any = figure.colorbar(ScalarMappable(Normalize(0, 1), COLOURS), cax=axes, orientation="horizontal")
    bar.set_ticks([0, 1], labels=["none", "strongest place of this image"])
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=7, length=0, pad=2, colors=SOFT)
    for label, side in zip(bar.ax.get_xticklabels(), ("left", "right"), strict=True):
        label.set_horizontalalignment(side)
    figure.text(0.98, 0.095, f"{caption.how}; model {caption.model}", fontsize=7, color=SOFT, ha="right", va="center")
    note = "Evidence for the finding, not its outline. Research use, not for clinical use."
    figure.text(0.98, 0.045, note, fontsize=7, color=SOFT, ha="right", va="center")
