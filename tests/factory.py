"""Small real parts that several test files build on: a data set of phantoms and a checkpoint of a tiny network."""

from pathlib import Path
from typing import Any

import torch

from mpc import checkpoint as checkpoints
from mpc.build import build_model
from mpc.config import CheckpointInfo, ModelConfig, PixelSpec
from pipeline.card import DatasetCard, Shard
from pipeline.config import RunConfig
from pipeline.prepare_config import PhantomConfig, PolicyConfig, PrepareConfig, SplitConfig
from pipeline.shards import prepare

SIZE = 32
FINDINGS = ("Effusion", "Mass", "Nodule")


def bare_card(rows: int = 0) -> DatasetCard:
    """The card of a data set with so many training images that does not exist."""
    shard = Shard(path="s", split="train", rows=rows, row_start=0, row_groups=(rows,), bytes=0, sha256="")
    return DatasetCard(
        name="phantom",
        synthetic=True,
        findings=("Mass",),
        image_size=32,
        fit="pad",
        policy=PolicyConfig(),
        split=SplitConfig(),
        counts={},
        raw_labels={},
        quarantined={},
        sources={},
        versions={},
        plan="",
        shards=(shard,) if rows else (),
        digest="ab" * 32,
    )


def tiny_data(out: Path, images: int = 60, size: int = SIZE) -> DatasetCard:
    """A prepared data set of phantoms with FINDINGS, in row groups of 16."""
    config = PrepareConfig(
        findings=FINDINGS,
        image_size=size,
        row_group=16,
        split=SplitConfig(val=0.2, test=0.4),
        phantom=PhantomConfig(images=images),
    )
    return prepare(config, None, str(out))


def tiny_checkpoint(
    folder: Path,
    *,
    findings: tuple[str, ...] = FINDINGS,
    size: int = SIZE,
    reduce_to: int | None = None,
    digest: str = "0" * 64,
    seed: int = 0,
    metrics: dict[str, float] | None = None,
    thresholds: dict[str, float] | None = None,
    **choices: Any,
) -> CheckpointInfo:
    """A checkpoint of an untrained network whose raw and averaged weights differ; `choices` are those of validation."""
    run = RunConfig(model=ModelConfig(backbone="test_efficientnet_gn"))
    pixels = PixelSpec(reduce_to=reduce_to)
    torch.manual_seed(seed)
    model, ema = (build_model(run, len(findings), pixels) for _ in range(2))
    info = CheckpointInfo(
        config=run.model_dump(mode="json"),
        findings=findings,
        image_size=size,
        pixels=pixels,
        step=7,
        epoch=1.0,
        metrics={"val_macro_auroc": 0.75, **(metrics or {})},
        thresholds=thresholds or {},
        **choices,
        data_digest=digest,
        git_commit=None,
        versions={},
    )
    checkpoints.save(folder, model, ema.state_dict(), {"step": 7}, info)
    return info
