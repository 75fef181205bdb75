"""Images of the page: examples in both views, worst errors, recovered positives, and where the evidence lies."""

import base64
from dataclasses import dataclass
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from mpc.errors import UserError
from mpc.views import TwoViews
from pipeline.calls import Calls, hash_of
from pipeline.illustrate import ERRORS, EXAMPLES, recovered_cases
from pipeline.overlay import blend
from pipeline.stored import Stored, read_images
from tuning.report.files import Inputs

Image = NDArray[np.uint8]

CALLS = 5
MAX_SIDE = 224  # pixels of an embedded image: keeps the page below 3 MB
MAP_SIDE = 176  # pixels of an overlay, which is a JPEG


class Picture(NamedTuple):
    """An image of the page."""

    caption: str
    uri: str


@dataclass(frozen=True)
class Call:
    """One finding of one image, as the model sees it and as it is."""

    finding: str
    probability: float
    threshold: float
    outcome: str
    """`found`, `missed`, `false alarm`, `rightly absent`; `called` or `not called` where the truth is unknown."""
    margin: float
    """Log-odds above the threshold."""
    bar: float
    """Margin as a share of the bar's half, in [-1, 1]; the scale is the same for the whole page."""


@dataclass(frozen=True)
class Example:
    """An image with its findings."""

    image_id: str
    view: str
    true: list[str]
    called: list[str]
    calls: list[Call]
    pictures: list[Picture]
    overlay: Picture | None
    """Where the evidence lies, for the finding that its caption names."""
    observed: list[str]
    """What training saw, of a training image."""


def examples(inputs: Inputs) -> list[Example]:
    """Some images of the split, chosen by a hash of their id and not by how well the model does."""
    calls = inputs.calls
    rows = calls.examples(EXAMPLES)
    stored = _read(inputs, rows)
    return [
        _example(inputs, calls, row, stored[row], _views(inputs, row, stored[row].image), calls.highest(row))
        for row in rows
    ]


def errors(inputs: Inputs, *, missed: bool) -> list[tuple[Call, Example]]:
    """The most confident errors: of each finding its worst, of those the worst few, each image once.

    Args:
        inputs: what was read.
        missed: positives that were not called; else negatives that were.
    """
    calls = inputs.calls
    worst = calls.errors(ERRORS, missed=missed)
    stored = _read(inputs, [row for row, _ in worst])
    return [(_call(inputs, calls, row, k), _alone(inputs, calls, row, k, stored[row])) for row, k in worst]


def recovered(inputs: Inputs) -> list[tuple[Call, Example]]:
    """Training images with the surest positives that training did not observe and the model found."""
    calls = inputs.hidden
    if calls is None:
        return []
    cases = recovered_cases(calls, inputs.info, inputs.card)
    stored = read_images(inputs.places["data"], inputs.card, "train", [case.position for case in cases])
    rows = [calls.predictions.image_id.index(case.image_id) for case in cases]
    columns = [calls.findings.index(case.finding) for case in cases]
    return [
        (_call(inputs, calls, row, k), _alone(inputs, calls, row, k, stored[case.position]))
        for case, row, k in zip(cases, rows, columns, strict=True)
    ]


def uses_strong(inputs: Inputs) -> bool:
    """Whether training saw strong views at all."""
    return inputs.run.train.method == "mpc" and inputs.run.loss.needs_strong


def _views(inputs: Inputs, row: int, image: Image) -> list[Picture]:
    """The image as stored and as one training step would have seen it."""
    two_views = TwoViews(inputs.run.views, inputs.card.image_size, strong=uses_strong(inputs))
    weak, *strong = two_views(image, hash_of(inputs.calls.predictions.image_id[row]))
    pictures = [Picture("as stored", _png(image)), Picture("weak view", _png(weak))]
    return [*pictures, *(Picture("strong view", _png(view)) for view in strong)]


def _alone(inputs: Inputs, calls: Calls, row: int, k: int, stored: Stored) -> Example:
    """An image as it is stored, with the evidence for one finding."""
    return _example(inputs, calls, row, stored, [Picture("as stored", _png(stored.image))], k)


def _example(inputs: Inputs, calls: Calls, row: int, stored: Stored, pictures: list[Picture], k: int) -> Example:
    """Lists as calls all true findings and, up to CALLS, those that lie highest above their threshold."""
    found, findings = calls.predictions, calls.findings
    true = np.flatnonzero(calls.present[row]).tolist()
    ranked = sorted(range(len(findings)), key=lambda j: -float(calls.margins[row, j]))
    chosen = {*true, *ranked[: max(0, CALLS - len(true))], k}
    return Example(
        found.image_id[row],
        stored.view,
        [findings[j] for j in true],
        [findings[j] for j in np.flatnonzero(calls.called[row])],
        [_call(inputs, calls, row, j) for j in ranked if j in chosen],
        pictures,
        _overlay(inputs, calls, row, k, stored.image),
        [] if found.observed is None else [findings[j] for j in np.flatnonzero(found.observed[row])],
    )


def _overlay(inputs: Inputs, calls: Calls, row: int, k: int, image: Image) -> Picture | None:
    """The evidence for a finding over the image; None where the evaluation made no map of it."""
    found, finding = calls.predictions, calls.findings[k]
    case = (found.origin.get("split", inputs.metrics["split"]), found.image_id[row], finding)
    made = inputs.maps.by_case.get(case) if inputs.maps else None
    if made is None:
        return None
    large = cv2.resize(image, (2 * MAP_SIDE, 2 * MAP_SIDE), interpolation=cv2.INTER_LINEAR).astype(np.uint8)
    sign = made.sign
    if sign is not None:
        sign = cv2.resize(sign.astype(np.uint8), (2 * MAP_SIDE, 2 * MAP_SIDE), interpolation=cv2.INTER_NEAREST) > 0
    pixels = cv2.resize(blend(large, made.values, sign), (MAP_SIDE, MAP_SIDE), interpolation=cv2.INTER_AREA)
    done, encoded = cv2.imencode(".jpg", pixels[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 80])
    assert done, "an overlay can always be written as JPEG"
    return Picture(finding, "data:image/jpeg;base64," + base64.b64encode(encoded.tobytes()).decode())


def _call(inputs: Inputs, calls: Calls, row: int, k: int) -> Call:
    called, present = bool(calls.called[row, k]), bool(calls.present[row, k])
    margin = float(calls.margins[row, k])
    if not calls.predictions.known[row, k]:
        outcome = "called" if called else "not called"
    elif present:
        outcome = "found" if called else "missed"
    else:
        outcome = "false alarm" if called else "rightly absent"
    return Call(
        calls.findings[k],
        float(calls.predictions.probabilities[row, k]),
        float(calls.thresholds[k]),
        outcome,
        margin,
        max(-1.0, min(1.0, margin / inputs.calls.margin_scale)),
    )


def _read(inputs: Inputs, positions: list[int]) -> dict[int, Stored]:
    """Images of the scored split, checked to be those that were scored."""
    data = inputs.places["data"]
    found = read_images(data, inputs.card, inputs.metrics["split"], positions)
    for position, stored in found.items():
        if inputs.calls.predictions.image_id[position] != stored.image_id:
            raise UserError(f"{inputs.places['evaluation']} holds other rows than {data}; evaluate again")
    return found


def _png(image: Image) -> str:
    """A `data:` URI; large images are made smaller."""
    side = max(image.shape)
    if side > MAX_SIDE:
        image = cv2.resize(image, (MAX_SIDE, MAX_SIDE), interpolation=cv2.INTER_AREA).astype(np.uint8)
    done, encoded = cv2.imencode(".png", image, [cv2.IMWRITE_PNG_COMPRESSION, 9])
    assert done, "a grey image can always be written as PNG"
    return "data:image/png;base64," + base64.b64encode(encoded.tobytes()).decode()
