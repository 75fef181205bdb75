"""The registered model: MLflow stores this file and runs it on loading (a pyfunc "model from code", no pickle).

Input: one string column `image`, base64 of a PNG, JPEG or DICOM file's bytes; paths would read the server's disk.
Output: one row an image: a probability for each finding, `positive` (names at or above their thresholds, separated by
`;`), `flags` and `error`. An image that cannot be read is a row of nulls with its `error`: it does not fail the others.
"""

import base64
import binascii
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from mlflow.models import set_model
from numpy.typing import NDArray

from mpc.config import CheckpointInfo
from pipeline.decode import DecodeError, decode
from pipeline.inference import DEFAULT_FLAG, LoadedModel, best_device, load_model, thresholds

with warnings.catch_warnings():  # MLflow warns of its own type hints while it is imported
    warnings.simplefilter("ignore")
    from mlflow.pyfunc import PythonModel

IMAGE_COLUMN = "image"
TEXT_COLUMNS = ("positive", "flags", "error")
BATCH = 32  # images scored at a time, whatever the size of a request


class ServedModel(PythonModel):  # type: ignore[misc]
    """Base64 images in, findings out."""

    loaded: LoadedModel

    def load_context(self, context: Any) -> None:
        """Loads the network from the artifacts `weights` and `checkpoint`, which lie in one folder."""
        self.loaded = load_model(Path(context.artifacts["checkpoint"]).parent, best_device())

    def predict(self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> pd.DataFrame:
        """One row an image, in order."""
        images = model_input[IMAGE_COLUMN].tolist()
        parts = [self._part(images[start : start + BATCH]) for start in range(0, len(images), BATCH)]
        columns = [*self.loaded.info.findings, *TEXT_COLUMNS]
        return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=columns)

    def _part(self, images: list[Any]) -> pd.DataFrame:
        """The rows of a few images."""
        info = self.loaded.info
        limits, default = thresholds(info)
        read = [_read(image, info) for image in images]
        good = [pixels for pixels in read if isinstance(pixels, np.ndarray)]
        scores: Iterator[NDArray[np.float64]] = iter(self.loaded.probabilities(np.stack(good)) if good else [])
        rows: list[dict[str, Any]] = []
        for pixels in read:
            if isinstance(pixels, str):
                rows.append({**dict.fromkeys([*info.findings, *TEXT_COLUMNS]), "error": pixels})
                continue
            values = next(scores)
            present = [name for name, value, limit in zip(info.findings, values, limits, strict=True) if value >= limit]
            texts = {"positive": ";".join(present), "flags": DEFAULT_FLAG if any(default) else "", "error": ""}
            rows.append({**dict(zip(info.findings, values.tolist(), strict=True)), **texts})
        # objects: a column of numbers would turn None into NaN, which is no JSON
        return pd.DataFrame(rows, dtype=object if len(good) < len(read) else None)


def _read(image: Any, info: CheckpointInfo) -> NDArray[np.uint8] | str:
    """Pixels, or what is wrong with the image."""
    if not isinstance(image, str):
        return "not text: send base64 of the file's bytes"
    try:
        data = base64.b64decode("".join(image.split()), validate=True)
        return decode(data, "request", info.image_size, info.pixels.fit, info.pixels.reduce_to)
    except (binascii.Error, ValueError) as error:
        return str(error) if isinstance(error, DecodeError) else "not base64 of a file's bytes"


set_model(ServedModel())
