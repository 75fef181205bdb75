"""What a report shows besides numbers, as files: hidden positives of training images, and saliency of its cases."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from mpc.build import build_model
from mpc.checkpoint import read_info
from mpc.config import CheckpointInfo
from mpc.errors import UserError
from mpc.model import Classifier
from mpc.saliency import Saliency, agreement
from pipeline import storage
from pipeline.calls import Calls, extremes
from pipeline.card import DatasetCard, read_card
from pipeline.config import EvaluateConfig, ExplainConfig
from pipeline.hidden import HIDDEN_FILE, checkpoint_has_weights, has_hidden, recovered, run_of, score_hidden
from pipeline.inference import LoadedModel, best_device, load_model
from pipeline.predictions import PREDICTIONS_FILE, Predictions, read_table, write_table
from pipeline.sources import phantom
from pipeline.stored import read_images

SALIENCY_FILE = "saliency.parquet"
EXAMPLES, ERRORS, RECOVERED = 6, 6, 6
"""Cases of a report: any images, errors of each kind, recovered positives."""
SCHEMA = pa.schema(
    [
        ("split", pa.string()),
        ("image_id", pa.string()),
        ("finding", pa.string()),
        ("map", pa.list_(pa.float32())),
        ("randomised", pa.float64()),
        ("sign", pa.binary()),
    ]
)
"""`map`: signed evidence, side x side. `randomised`: rank correlation with the map of random weights. `sign`: bits of
[image side, image side], where a synthetic finding was drawn."""


class Case(NamedTuple):
    """One finding of one image of a split."""

    split: str
    position: int
    """Of the image within its split."""
    image_id: str
    finding: str


class Map(NamedTuple):
    """Saliency of a case."""

    values: NDArray[np.float32]
    """Signed evidence [side, side]."""
    randomised: float | None
    """Rank correlation with the map of the same network with random weights."""
    sign: NDArray[np.bool_] | None
    """[size, size]: where a synthetic finding was drawn."""


class Maps(NamedTuple):
    """All of a report's saliency."""

    how: str
    """Method and layer."""
    by_case: dict[tuple[str, str, str], Map]
    """(split, image id, finding) -> map."""


def illustrate(
    checkpoint: Path,
    data: str,
    out: str,
    *,
    config: EvaluateConfig,
    explain: ExplainConfig,
    batch_size: int = 128,
    device: str | None = None,
    resume: bool = False,
) -> None:
    """Writes hidden.parquet and saliency.parquet beside the predictions in `out`.

    Args:
        checkpoint: local folder of the model that was scored.
        data: URI of the data set that was scored.
        out: folder or s3:// prefix of the evaluation.
        config: `hidden_images`.
        explain: method and layer.
        batch_size: images at a time.
        device: None takes a GPU where there is one.
        resume: keep files that `out` holds; a checkpoint without weights needs that.
    """
    card, info = read_card(data), read_info(checkpoint)
    hidden_file, saliency_file = (storage.join(out, name) for name in (HIDDEN_FILE, SALIENCY_FILE))
    if resume and (storage.exists(saliency_file) or not checkpoint_has_weights(checkpoint)):
        return
    loaded = load_model(checkpoint, device or best_device())
    scored = Calls.of(Predictions.read(storage.join(out, PREDICTIONS_FILE)), info)
    cases = cases_of(scored)
    if config.hidden_images and has_hidden(info, card):
        origin = {**scored.predictions.origin, "split": "train"}
        train = score_hidden(loaded, data, card, config.hidden_images, batch_size, origin)
        train.write(hidden_file)
        cases += recovered_cases(Calls.of(train, info), info, card)
    write_table(_table(loaded, data, card, cases, explain), saliency_file)


def cases_of(calls: Calls) -> list[Case]:
    """What the report shows of the split: any images with their highest finding, and the worst errors."""
    shown = [(row, calls.highest(row)) for row in calls.examples(EXAMPLES)]
    shown += [pair for missed in (True, False) for pair in calls.errors(ERRORS, missed=missed)]
    found, names = calls.predictions, calls.findings
    return [Case(found.origin["split"], row, found.image_id[row], names[k]) for row, k in dict.fromkeys(shown)]


def recovered_cases(calls: Calls, info: CheckpointInfo, card: DatasetCard) -> list[Case]:
    """The surest recovered positives among the training images that were looked at."""
    found, first = calls.predictions, card.rows("train").start
    assert found.row is not None, "training images are told by their rows"
    values = np.where(recovered(calls, run_of(info)), found.probabilities, -1.0)
    return [
        Case("train", int(found.row[row]) - first, found.image_id[row], calls.findings[k])
        for row, k in extremes(values, RECOVERED)
    ]


def read_maps(out: str, size: int) -> Maps | None:
    """What `illustrate` left in `out`, for images of `size` pixels; None where it left nothing."""
    place = storage.join(out, SALIENCY_FILE)
    if not storage.exists(place):
        return None
    table = read_table(place)
    if table.schema.names != SCHEMA.names:
        raise UserError(f"{place} holds no saliency of this version; evaluate again")
    found = {}
    for row in table.to_pylist():
        side = round(len(row["map"]) ** 0.5)
        sign = None if row["sign"] is None else _unpacked(row["sign"], size)
        values = np.array(row["map"], np.float32).reshape(side, side)
        found[row["split"], row["image_id"], row["finding"]] = Map(values, row["randomised"], sign)
    return Maps((table.schema.metadata or {}).get(b"how", b"").decode(), found)


def randomised(loaded: LoadedModel, seed: int = 0) -> Classifier:
    """The same network with random weights, as its constructor draws them."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        info = loaded.info
        return build_model(run_of(info), len(info.findings), info.pixels, weights="none").to(loaded.device).eval()


def _table(
    loaded: LoadedModel, data: str, card: DatasetCard, cases: Sequence[Case], explain: ExplainConfig
) -> pa.Table:
    """Saliency of every case, with that of random weights at the same layer."""
    own = Saliency(loaded.model, card.image_size, method=explain.method, layer=explain.layer, cells=explain.cells)
    other = Saliency(randomised(loaded), card.image_size, method=explain.method, layer=own.layer)
    rows = []
    for split in dict.fromkeys(case.split for case in cases):
        there = [case for case in cases if case.split == split]
        stored = read_images(data, card, split, sorted({case.position for case in there}))
        for case in there:
            image, output = stored[case.position].image[None], [loaded.info.findings.index(case.finding)]
            found = own.maps(image, output)[0]
            rows.append(
                {
                    "split": split,
                    "image_id": case.image_id,
                    "finding": case.finding,
                    "map": found.ravel(),
                    "randomised": agreement(found, other.maps(image, output)[0]),
                    "sign": _sign(case, card),
                }
            )
    how = f"{explain.method} at {own.layer}"
    return pa.Table.from_pylist(rows, schema=SCHEMA).replace_schema_metadata({"how": how})


def _sign(case: Case, card: DatasetCard) -> bytes | None:
    """Where the program drew a finding of a synthetic image; None where it did not, or the image is real."""
    if not (card.synthetic and case.image_id.startswith("phantom-")):
        return None
    sign = phantom.signs_of(case.image_id, card.image_size).get(case.finding)
    return None if sign is None else np.packbits(sign).tobytes()


def _unpacked(bits: bytes, size: int) -> NDArray[np.bool_]:
    """[size, size] from the bits of `_sign`."""
    return np.unpackbits(np.frombuffer(bits, np.uint8), count=size * size).astype(bool).reshape(size, size)
