"""Prediction through Ray Data: every image once, in order, a bad file one row."""

import base64
import io
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.csv as pcsv
import pyarrow.parquet as pq
import pytest
from factory import FINDINGS, SIZE, tiny_checkpoint

from mpc.checkpoint import read_info
from mpc.errors import MissingError, UserError
from pipeline.images import find_images
from pipeline.inference import load_model
from pipeline.pixels import load
from pipeline.predict import SCHEMA, predict
from pipeline.served_model import ServedModel
from pipeline.storage import read_bytes, write_bytes

pytestmark = pytest.mark.usefixtures("ray_session")

COLUMNS = ["source", "finding", "probability", "threshold", "positive", "model_version", "flags", "error"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "best"
    tiny_checkpoint(folder, thresholds={"Mass": 0.25})
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five radiograph-sized PNG in two folders, a broken one, an empty one, and files that are none."""
    folder = tmp_path_factory.mktemp("images")
    (folder / "b").mkdir()
    for index in range(5):
        pixels = np.random.default_rng(index).integers(0, 256, (48, 40), np.uint8)
        place = folder / ("b" if index > 2 else "") / f"{index}.png"
        assert cv2.imwrite(str(place), pixels)
    (folder / "broken.png").write_bytes((folder / "0.png").read_bytes()[:300])
    (folder / "b" / "empty.PNG").write_bytes(b"")
    (folder / "notes.txt").write_text("no image")
    (folder / ".hidden").write_text("no image")
    return folder


def test_every_image_and_finding_is_a_row_in_order(checkpoint: Path, images: Path, tmp_path: Path) -> None:
    calls: list[tuple[int, int, str]] = []
    summary = predict(checkpoint, str(images), str(tmp_path), batch_size=2, progress=lambda *call: calls.append(call))
    assert summary == (7, 2, str(tmp_path / "findings.parquet"))
    assert calls[-1] == (7, 7, "2 unreadable")
    table = pq.read_table(summary.out)
    assert table.column_names == COLUMNS
    assert table.schema.equals(SCHEMA)
    rows = table.to_pylist()
    assert len(rows) == 5 * len(FINDINGS) + 2
    assert [row["source"] for row in rows] == sorted(row["source"] for row in rows)
    bad = {Path(row["source"]).name: row for row in rows if row["error"]}
    assert set(bad) == {"broken.png", "empty.PNG"}
    assert bad["empty.PNG"]["error"].startswith("empty")
    assert bad["broken.png"]["finding"] is None
    assert bad["broken.png"]["probability"] is None


def test_probabilities_are_those_of_the_network(checkpoint: Path, images: Path, tmp_path: Path) -> None:
    predict(checkpoint, str(images / "?.png"), str(tmp_path / "a.parquet"), batch_size=64, model_version="cxr/3")
    rows = pq.read_table(tmp_path / "a.parquet").to_pylist()
    expected = load_model(checkpoint).probabilities(
        np.stack([load(str(images / f"{index}.png"), SIZE, "pad") for index in range(3)])
    )
    found = np.array([row["probability"] for row in rows]).reshape(3, -1)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert [row["finding"] for row in rows[:3]] == list(FINDINGS)
    assert [row["threshold"] for row in rows[:3]] == [0.5, 0.25, 0.5]
    assert [row["flags"] for row in rows[:3]] == ["default_threshold", None, "default_threshold"]
    assert all(row["positive"] == (row["probability"] >= row["threshold"]) for row in rows)
    assert {row["model_version"] for row in rows} == {"cxr/3"}


def test_raw_images_are_reduced_as_the_training_images_were(images: Path, tmp_path: Path) -> None:
    info = tiny_checkpoint(tmp_path / "best", reduce_to=16)
    assert read_info(tmp_path / "best").pixels == info.pixels
    predict(tmp_path / "best", str(images / "?.png"), str(tmp_path / "a.parquet"))
    found = np.array([row["probability"] for row in pq.read_table(tmp_path / "a.parquet").to_pylist()]).reshape(3, -1)
    paths = [images / f"{index}.png" for index in range(3)]
    loaded = load_model(tmp_path / "best")
    expected = loaded.probabilities(np.stack([load(str(path), SIZE, "pad", 16) for path in paths]))
    np.testing.assert_allclose(found, expected, atol=1e-5)
    untreated = loaded.probabilities(np.stack([load(str(path), SIZE, "pad") for path in paths]))
    assert np.abs(untreated - expected).max() > 1e-4
    served = ServedModel()
    served.loaded = loaded
    texts = [base64.b64encode(path.read_bytes()).decode() for path in paths]
    answered = served.predict(None, pd.DataFrame({"image": texts}))
    np.testing.assert_allclose(answered[list(FINDINGS)].to_numpy(float), expected, atol=1e-5)


def test_csv_and_a_table_of_paths(checkpoint: Path, images: Path, tmp_path: Path) -> None:
    listed = pa.table({"path": ["b/4.png", "0.png", "absent.png", "phantom://dense/0/1"], "age": [1, 2, 3, 4]})
    pcsv.write_csv(listed, images / "list.csv")
    summary = predict(checkpoint, str(images / "list.csv"), str(tmp_path / "out.csv"))
    assert summary[:2] == (4, 1)
    table = pcsv.read_csv(tmp_path / "out.csv")
    assert table.column_names == COLUMNS
    assert len(table) == 3 * len(FINDINGS) + 1
    assert any("missing" in (error or "") for error in table["error"].to_pylist())
    versions = set(table["model_version"].to_pylist())
    assert len(versions) == 1
    assert versions.pop().startswith("step-7-")


def test_a_bucket_is_read_and_written(checkpoint: Path, images: Path, bucket: str) -> None:
    for path in sorted(images.rglob("*.png")):
        write_bytes(f"{bucket}/in/{path.relative_to(images)}", path.read_bytes())
    summary = predict(checkpoint, f"{bucket}/in", f"{bucket}/out")
    assert summary == (6, 1, f"{bucket}/out/findings.parquet")
    sources = pq.read_table(io.BytesIO(read_bytes(summary.out)))["source"].to_pylist()
    assert sources[0] == f"{bucket}/in/0.png"
    assert find_images(f"{bucket}/in/b/*.png") == [f"{bucket}/in/b/{index}.png" for index in (3, 4)]


def test_no_image_is_the_users_error(checkpoint: Path, images: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no PNG, JPEG or DICOM"):
        predict(checkpoint, str(tmp_path / "empty"), str(tmp_path / "out"))
    with pytest.raises(MissingError, match="does not exist"):
        predict(checkpoint, str(tmp_path / "nowhere"), str(tmp_path / "out"))
    with pytest.raises(UserError, match="no PNG"):
        predict(checkpoint, str(images / "*.jpg"), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_what_counts_as_an_image(tmp_path: Path) -> None:
    for name in ("a.PNG", "b.jpeg", "1.2.840.113", "IM0001", "DICOMDIR", "readme.md", ".DS_Store"):
        (tmp_path / name).write_bytes(b"x")
    assert [Path(uri).name for uri in find_images(str(tmp_path))] == ["1.2.840.113", "IM0001", "a.PNG", "b.jpeg"]
    assert find_images(str(tmp_path / "readme.md")) == [str(tmp_path / "readme.md")]


@pytest.mark.parametrize(
    ("columns", "message"), [({"file": ["a"]}, "no column uri or path"), ({"uri": ["a", None]}, "row 2")]
)
def test_tables_that_name_no_images(tmp_path: Path, columns: dict[str, list[str | None]], message: str) -> None:
    pq.write_table(pa.table(columns), tmp_path / "t.parquet")
    with pytest.raises(UserError, match=message):
        find_images(str(tmp_path / "t.parquet"))
