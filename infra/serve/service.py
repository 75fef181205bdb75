"""What the page asks of a model: findings of a file's bytes, and where the evidence for one of them lies."""

import base64
import os
from pathlib import Path
from threading import BoundedSemaphore, Lock
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from mpc.reference import UNLIKE
from mpc.saliency import Saliency
from pipeline.config import ExplainConfig, PredictConfig
from pipeline.decode import decode
from pipeline.headers import kind_flags
from pipeline.inference import best_device, load_model, pack, version_of
from pipeline.judge import Scale, judge
from pipeline.overlay import blend, scale

NAME = "upload"
"""Of every file: its own name may be a patient's and is never sent."""


class Service:
    """A checkpoint that answers one request after the other; nothing of a request is kept.

    Args:
        checkpoint: local folder.
        predict: calibration.
        explain: method and layer of the maps.
    """

    def __init__(self, checkpoint: Path, predict: PredictConfig, explain: ExplainConfig) -> None:
        self.loaded = load_model(checkpoint, best_device())
        self.scale = Scale(self.loaded.info, predict.calibration)
        self.version = version_of(checkpoint, self.loaded.info, pack(checkpoint))
        size = self.loaded.info.image_size
        self.saliency = Saliency(
            self.loaded.model, size, method=explain.method, layer=explain.layer, cells=explain.cells
        )
        self.how = f"{explain.method} at {self.saliency.layer}"
        self.seats = BoundedSemaphore(os.cpu_count() or 1)  # a decoded image may take a hundred times its file's size
        self.turn = Lock()  # maps hang hooks into the network, which must not see another request's image

    def about(self) -> dict[str, Any]:
        """The model, for the page's head and legend."""
        return {
            "model_version": self.version,
            "findings": list(self.loaded.info.findings),
            "image_size": self.loaded.info.image_size,
            "maps": self.how,
            "colours": scale(),
        }

    def findings(self, data: bytes) -> dict[str, Any]:
        """All findings of a file, its flags, and the image as the network sees it.

        Raises:
            DecodeError: it is no image that can be used.
        """
        image = self._decoded(data)
        with self.turn:
            judged = judge(self.loaded, self.scale, image[None], [kind_flags(data)])[0]
        rows = zip(
            self.scale.findings,
            judged.probabilities.tolist(),
            self.scale.thresholds.tolist(),
            self.scale.flags,
            strict=True,
        )
        return {
            "model_version": self.version,
            "findings": [
                {"finding": name, "probability": p, "threshold": limit, "positive": p >= limit, "flags": list(flags)}
                for name, p, limit, flags in rows
            ],
            "flags": list(judged.flags),
            "unlike_training": None if judged.unlikeness is None else UNLIKE in judged.flags,
            "unlikeness": judged.unlikeness,
            "image": "data:image/png;base64," + base64.b64encode(_png(image)).decode(),
        }

    def overlay(self, data: bytes, finding: str) -> bytes:
        """PNG: the image with the evidence for a finding in colour.

        Raises:
            DecodeError: as `findings`.
            KeyError: the model has no such finding.
        """
        names = self.loaded.info.findings
        if finding not in names:
            raise KeyError(finding)
        image = self._decoded(data)
        with self.turn:
            found = self.saliency.maps(image[None], [names.index(finding)])[0]
        return _png(cv2.cvtColor(blend(image, found), cv2.COLOR_RGB2BGR))

    def _decoded(self, data: bytes) -> NDArray[np.uint8]:
        info = self.loaded.info
        with self.seats:
            return decode(data, NAME, info.image_size, info.pixels.fit, info.pixels.reduce_to)


def _png(image: Any) -> bytes:
    """Grey, or colours in OpenCV's order."""
    encoded, png = cv2.imencode(".png", image)
    assert encoded
    return bytes(png.tobytes())
