"""Findings of any images: decoded and scored by Ray Data tasks, written as a long table, one bad file one row."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.csv as pcsv
import pyarrow.parquet as pq
import ray
from numpy.typing import NDArray

from mpc.checkpoint import read_info
from mpc.config import CheckpointInfo
from mpc.errors import UserError
from mpc.reference import UNLIKE
from pipeline import pixels, runtime, storage
from pipeline.config import PredictConfig
from pipeline.decode import DecodeError
from pipeline.images import find_images, plain
from pipeline.inference import LoadedModel, Packed, best_device, pack, unpack, version_of
from pipeline.judge import Scale, Way, judge

FINDINGS_FILE = "findings.parquet"
REMOTE_READS = 8  # files fetched at a time from object storage, where latency bounds

SCHEMA = pa.schema(
    [
        ("source", pa.string()),
        ("finding", pa.string()),
        ("probability", pa.float64()),
        ("threshold", pa.float64()),
        ("positive", pa.bool_()),
        ("model_version", pa.string()),
        ("flags", pa.string()),
        ("error", pa.string()),
    ]
)

DECODED = pa.schema(
    [
        ("source", pa.string()),
        ("image", pa.large_binary()),
        ("flags", pa.list_(pa.string())),
        ("error", pa.string()),
        ("fatal", pa.string()),
    ]
)

Progress = Callable[[int, int, str], None]


class PredictSummary(NamedTuple):
    """What a prediction did."""

    images: int
    """Images asked for, unreadable ones included."""
    failed: int
    out: str
    """The file that was written."""
    unlike: int | None
    """Images unlike those of training; None where the checkpoint does not know what those were like."""


def predict(
    checkpoint: Path,
    images: str,
    out: str,
    *,
    model_version: str | None = None,
    config: PredictConfig | None = None,
    progress: Progress | None = None,
) -> PredictSummary:
    """Writes a row for every image and finding, ordered by source; an unreadable image is one row with `error`.

    Args:
        checkpoint: local folder.
        images: what `pipeline.images.find_images` understands.
        out: a .parquet or .csv file, or a folder that receives findings.parquet; local or s3://.
        model_version: written into every row; None takes the registry's, else step and digest of the checkpoint.
        config: calibration, images of one task.
        progress: called with (images done, all, text).

    Raises:
        UserError: no image found, or storage or checkpoint at fault.
    """
    packed, config = pack(checkpoint), config or PredictConfig()
    info = read_info(checkpoint)
    scale = Scale(info, config.calibration)
    sources = find_images(images)
    target = out if out.lower().endswith((".parquet", ".csv")) else storage.join(out, FINDINGS_FILE)
    version = model_version or version_of(checkpoint, info, packed)
    done = failed = flagged = 0
    with storage.open_output(target) as stream, _writer(target, stream) as writer:
        for scored in _scored(packed, info, sources, config):
            writer.write_table(long_table(scored, scale, version))
            done += len(scored)
            failed += len(scored) - scored["error"].null_count
            flagged += sum(UNLIKE in (flags or ()) for flags in scored["flags"].to_pylist())
            if progress:
                progress(done, len(sources), f"{failed} unreadable" if failed else "")
    if done != len(sources):
        raise RuntimeError(f"scored {done} of {len(sources)} images; every image must be scored exactly once")
    return PredictSummary(done, failed, target, flagged if packed.reference else None)


def long_table(scored: pa.Table, scale: Scale, version: str) -> pa.Table:
    """A row for each image and finding from columns `source`, `probabilities` and `flags` (null on error), `error`."""
    rows: list[dict[str, Any]] = []
    for row in scored.to_pylist():
        shared = {"source": row["source"], "model_version": version, "error": row["error"]}
        if row["error"] is not None:
            rows.append(shared)
            continue
        for name, probability, limit, own in zip(
            scale.findings, row["probabilities"], scale.thresholds.tolist(), scale.flags, strict=True
        ):
            rows.append(
                {
                    **shared,
                    "finding": name,
                    "probability": probability,
                    "threshold": limit,
                    "positive": probability >= limit,
                    "flags": ";".join([*row["flags"], *own]) or None,
                }
            )
    return pa.Table.from_pylist(rows, schema=SCHEMA)


def _scored(packed: Packed, info: CheckpointInfo, sources: list[str], config: PredictConfig) -> Iterator[pa.Table]:
    """Tables of `source`, `probabilities`, `flags`, `error`, in the order of `sources`, as they become ready."""
    runtime.start()
    batch_size, way = config.batch_size, config.calibration
    uris = pa.table({"uri": sources})
    blocks = [uris.slice(start, batch_size) for start in range(0, len(uris), batch_size)]
    decoded = ray.data.from_arrow(blocks).map_batches(
        partial(_decode, size=info.image_size, fit=info.pixels.fit, reduce_to=info.pixels.reduce_to),
        batch_size=None,
        batch_format="pyarrow",
        num_cpus=1,
    )
    model = ray.put(packed)
    gpus = int(ray.cluster_resources().get("GPU", 0))
    if gpus:
        strategy = ray.data.ActorPoolStrategy(size=gpus)
        options: dict[str, Any] = {"fn_constructor_args": (model, way), "compute": strategy, "num_gpus": 1}
        scored = decoded.map_batches(_Scorer, batch_size=None, batch_format="pyarrow", **options)
    else:  # fused with decoding: one task an image batch, one thread each, the network kept between tasks
        score = partial(_score, model=model, way=way)
        scored = decoded.map_batches(score, batch_size=None, batch_format="pyarrow", num_cpus=1)
    ordered = runtime.configured(scored, ordered=True)
    for table in ordered.iter_batches(batch_size=None, batch_format="pyarrow"):
        fault = next((text for text in table["fatal"].to_pylist() if text), None)
        if fault:
            raise UserError(fault)
        yield table


def _decode(batch: pa.Table, size: int, fit: Any, reduce_to: int | None) -> pa.Table:
    """Pixels of each URI, or why there are none; a fault of the storage itself ends the prediction."""

    def one(uri: str) -> dict[str, Any]:
        try:
            image, flags = pixels.load_flagged(uri, size, fit, reduce_to)
        except DecodeError as error:
            return {"error": str(error)}
        except UserError as error:  # as a value: an exception would reach the driver wrapped in traces
            return {"error": str(error), "fatal": str(error)}
        return {"image": image.tobytes(), "flags": flags}

    uris = batch["uri"].to_pylist()
    with ThreadPoolExecutor(REMOTE_READS if storage.is_remote(uris[0]) else 1) as pool:
        rows = [{"source": plain(uri), **row} for uri, row in zip(uris, pool.map(one, uris), strict=True)]
    return pa.Table.from_pylist(rows, schema=DECODED)


class _Scorer:
    """Holds the network on a GPU."""

    def __init__(self, model: "ray.ObjectRef[Packed]", way: Way) -> None:
        self.loaded = unpack(ray.get(model), best_device())
        self.scale = Scale(self.loaded.info, way)

    def __call__(self, batch: pa.Table) -> pa.Table:
        return _judged(self.loaded, self.scale, batch)


@lru_cache(maxsize=1)
def _held(model: "ray.ObjectRef[Packed]") -> LoadedModel:
    """The network of this process."""
    return unpack(ray.get(model), "cpu")


def _score(batch: pa.Table, model: "ray.ObjectRef[Packed]", way: Way) -> pa.Table:
    loaded = _held(model)
    return _judged(loaded, Scale(loaded.info, way), batch)


def _judged(loaded: LoadedModel, scale: Scale, batch: pa.Table) -> pa.Table:
    """Replaces the pixels by K probabilities and adds flags; images that could not be read have neither."""
    images, known = batch["image"].to_pylist(), batch["flags"].to_pylist()
    good = [i for i, image in enumerate(images) if image is not None]
    probabilities: list[NDArray[np.float64] | None] = [None] * len(images)
    flags: list[tuple[str, ...] | None] = [None] * len(images)
    if good:
        size = loaded.info.image_size
        stacked = np.stack([np.frombuffer(images[i], np.uint8).reshape(size, size) for i in good])
        for i, found in zip(good, judge(loaded, scale, stacked, [tuple(known[i]) for i in good]), strict=True):
            probabilities[i], flags[i] = found.probabilities, found.flags
    columns = {"probabilities": (probabilities, pa.float64()), "flags": (flags, pa.string())}
    batch = batch.drop_columns(["image", "flags"])
    for name, (values, kind) in columns.items():
        batch = batch.append_column(name, pa.array(values, pa.list_(kind)))
    return batch


def _writer(target: str, stream: Any) -> Any:
    """A streaming writer of tables, by the name of the file."""
    if target.lower().endswith(".csv"):
        return pcsv.CSVWriter(stream, SCHEMA)
    return pq.ParquetWriter(stream, SCHEMA, compression="zstd")
