"""A checkpoint as an MLflow model folder: model from code, safetensors and JSON, the project's wheel; no pickle."""

import base64
import logging
import warnings
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pandas as pd
import yaml
from mlflow.models import ModelSignature
from mlflow.types import ColSpec, Schema

import pipeline
from mpc.checkpoint import INFO
from mpc.config import CheckpointInfo
from mpc.errors import UserError
from mpc.reference import FILE as REFERENCE
from pipeline.inference import pack
from pipeline.served_model import IMAGE_COLUMN, TEXT_COLUMNS
from tuning.record import without_places
from tuning.wheel import build_wheel

WEIGHTS = "model.safetensors"

logging.getLogger("mlflow.utils.environment").setLevel(logging.ERROR)  # else: uv environments hold no pip


def signature(info: CheckpointInfo) -> ModelSignature:
    """Input: base64 of an image file. Output: a probability for each finding, and what is said about the image."""
    numbers = [ColSpec("double", name, required=False) for name in info.findings]
    texts = [ColSpec("string", name, required=False) for name in TEXT_COLUMNS]
    return ModelSignature(Schema([ColSpec("string", IMAGE_COLUMN)]), Schema([*numbers, *texts]))


def input_example() -> pd.DataFrame:
    """One tiny PNG, a grey ramp: no patient's image travels with a model."""
    encoded, png = cv2.imencode(".png", np.arange(64, dtype=np.uint8).reshape(8, 8) * 4)
    assert encoded
    return pd.DataFrame({IMAGE_COLUMN: [base64.b64encode(png.tobytes()).decode()]})


def write_package(checkpoint: Path, info: CheckpointInfo, folder: Path) -> None:
    """Writes the MLflow model of `checkpoint` as `folder`: averaged weights, metadata, reference if there is one, code.

    Paths of this machine, in the configuration and in MLflow's own file, are cut to their last part.

    Args:
        checkpoint: local folder.
        info: its metadata.
        folder: does not exist yet; its parent does, and takes the parts while they are collected.

    Raises:
        UserError: the project is not installed, or the checkpoint is not whole.
    """
    with warnings.catch_warnings():  # of pandas and type hints, from inside MLflow
        warnings.simplefilter("ignore")
        from mlflow.pyfunc import save_model

        parts = folder.parent / "parts"
        parts.mkdir()
        packed = pack(checkpoint)
        (parts / WEIGHTS).write_bytes(packed.weights)
        artifacts = {"weights": str(parts / WEIGHTS), "checkpoint": str(parts / INFO)}
        if packed.reference:
            (parts / REFERENCE).write_bytes(packed.reference)
            artifacts["reference"] = str(parts / REFERENCE)
        served = info.model_copy(update={"config": without_places(info.config)})
        (parts / INFO).write_text(served.model_dump_json(indent=2) + "\n", encoding="utf-8")
        wheel = build_wheel(parts)
        save_model(
            str(folder),
            python_model=str(Path(str(pipeline.__file__)).with_name("served_model.py")),
            artifacts=artifacts,
            code_paths=[str(wheel)],
            pip_requirements=[f"code/{wheel.name}"],
            signature=signature(info),
            input_example=input_example(),
        )
    _forget_places(folder / "MLmodel")


def _forget_places(path: Path) -> None:
    """Cuts the paths in an MLmodel file; MLflow itself reads their last part only."""
    content: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    flavour = content["flavors"]["python_function"]
    if Path(flavour["model_code_path"]).name != "served_model.py":
        raise UserError(f"{path}: written by an MLflow whose format this version does not know; use mlflow 3.17")
    content["flavors"]["python_function"] = without_places(flavour)
    path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
