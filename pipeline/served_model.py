"""The registered model: MLflow stores this file and runs it on loading (a pyfunc "model from code", no pickle).

Input: one string column `image`, base64 of a PNG, JPEG or DICOM file's bytes; paths would read the server's disk.
Output: one row an image: a calibrated probability for each finding, `positive` (names at or above their thresholds,
separated by `;`), `flags` (such as `unlike_training`) and `error`. An image that cannot be read is a row of nulls with
its `error`: it does not fail the others.
"""

import base64
import binascii
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from mlflow.models import set_model
from numpy.typing import NDArray

from mpc.config import CheckpointInfo
from pipeline.decode import DecodeError, decode
from pipeline.headers import kind_flags
from pipeline.inference import LoadedModel, best_device, load_model
from pipeline.judge import Scale, judge

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
        """Loads the network from the artifacts, which lie in one folder."""
        self.loaded = load_model(Path(context.artifacts["checkpoint"]).parent, best_device())

    def predict(self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> pd.DataFrame:
        """One row an image, in order."""
        images = model_input[IMAGE_COLUMN].tolist()
        parts = [self._part(images[start : start + BATCH]) for start in range(0, len(images), BATCH)]
        columns = [*self.loaded.info.findings, *TEXT_COLUMNS]
        return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=columns)

    def _part(self, images: list[Any]) -> pd.DataFrame:
        """The rows of a few images."""
        info, scale = self.loaded.info, Scale(self.loaded.info)
        read = [_read(image, info) for image in images]
        good = [found for found in read if not isinstance(found, str)]
        found = judge(self.loaded, scale, np.stack([p for p, _ in good]), [f for _, f in good]) if good else []
        judged, rows = iter(found), list[dict[str, Any]]()
        for entry in read:
            if isinstance(entry, str):
                rows.append({**dict.fromkeys([*info.findings, *TEXT_COLUMNS]), "error": entry})
                continue
            values, flags, _ = next(judged)
            present = [n for n, p, t in zip(info.findings, values, scale.thresholds, strict=True) if p >= t]
            texts = {"positive": ";".join(present), "flags": ";".join([*flags, *scale.any_flags]), "error": ""}
            rows.append({**dict(zip(info.findings, values.tolist(), strict=True)), **texts})
        # objects: a column of numbers would turn None into NaN, which is no JSON
        return pd.DataFrame(rows, dtype=object if len(good) < len(read) else None)


def _read(image: Any, info: CheckpointInfo) -> tuple[NDArray[np.uint8], tuple[str, ...]] | str:
    """Pixels with what the header says, or what is wrong with the image."""
    if not isinstance(image, str):
        return "not text: send base64 of the file's bytes"
    try:
        data = base64.b64decode("".join(image.split()), validate=True)
        pixels = decode(data, "request", info.image_size, info.pixels.fit, info.pixels.reduce_to)
    except (binascii.Error, ValueError) as error:
        return str(error) if isinstance(error, DecodeError) else "not base64 of a file's bytes"
    return pixels, kind_flags(data)


set_model(ServedModel())
