"""The verb explain: what is drawn for whom, what is listed, what is refused."""

from pathlib import Path

import cv2
import numpy as np
import pyarrow.csv as pcsv
import pytest
from factory import FINDINGS, SIZE, tiny_checkpoint, tiny_data

from infra.cli.app import run
from mpc.errors import UserError
from pipeline.card import read_card
from pipeline.config import ExplainConfig
from pipeline.explain import explain
from pipeline.inference import load_model
from pipeline.stored import read_images


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, ray_session: None) -> str:
    out = tmp_path_factory.mktemp("data") / "phantom"
    tiny_data(out)
    return str(out)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "best"
    tiny_checkpoint(folder, thresholds={"Effusion": 0.0001, "Mass": 0.0001, "Nodule": 0.9999})
    return folder


def rows_of(out: Path) -> list[dict]:
    return pcsv.read_csv(out / "explanations.csv").to_pylist()


def test_called_findings_of_a_split_are_drawn(data: str, checkpoint: Path, tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    config = ExplainConfig(limit=3)
    summary = explain(
        checkpoint, str(tmp_path), data=data, config=config, progress=lambda done, total, _: calls.append((done, total))
    )
    total = len(read_card(data).rows("test"))
    assert (summary.images, summary.left_out, summary.failed, summary.pictures) == (3, total - 3, 0, 6)
    assert calls[-1] == (3, 3)
    rows = rows_of(tmp_path)
    assert {row["finding"] for row in rows} == {"Effusion", "Mass"}, "Nodule is never called"
    places = [place * total // 3 for place in range(3)]
    stored = read_images(data, read_card(data), "test", places)
    assert list(dict.fromkeys(row["source"] for row in rows)) == [stored[place].image_id for place in places]
    loaded = load_model(checkpoint)
    for row in rows:
        image = next(image for image_id, image, _ in stored.values() if image_id == row["source"])
        p = loaded.probabilities(image[None])[0, FINDINGS.index(row["finding"])]
        assert row["probability"] == pytest.approx(p, abs=1e-6)
        drawn = cv2.imread(str(tmp_path / row["picture"]))
        assert drawn.shape == (539, 880, 3)
        assert np.ptp(drawn.astype(int), axis=2).max() > 100, "an overlay has colour"
    assert {path.name for path in tmp_path.iterdir()} == {"explanations.csv", *(row["picture"] for row in rows)}


def test_one_finding_is_drawn_where_none_is_called_and_the_chosen_ones_if_asked(data: str, tmp_path: Path) -> None:
    high = tmp_path / "best"
    tiny_checkpoint(high, thresholds=dict.fromkeys(FINDINGS, 0.9999))
    assert explain(high, str(tmp_path / "one"), data=data, config=ExplainConfig(limit=2)).pictures == 2
    asked = ExplainConfig(limit=2, findings=("Nodule", "Mass"))
    explain(high, str(tmp_path / "two"), data=data, config=asked)
    assert [row["finding"] for row in rows_of(tmp_path / "two")] == ["Nodule", "Mass"] * 2


def test_files_and_those_that_cannot_be_read(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (48, 40), np.uint8)
    assert cv2.imwrite(str(tmp_path / "in" / "a b.png"), pixels)
    (tmp_path / "in" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n nothing")
    summary = explain(checkpoint, str(tmp_path / "out"), images=str(tmp_path / "in"))
    assert (summary.images, summary.failed, summary.pictures) == (2, 1, 2)
    *drawn, broken = rows_of(tmp_path / "out")
    assert broken["source"].endswith("broken.png")
    assert broken["error"]
    assert not broken["picture"]
    assert {row["picture"] for row in drawn} == {"0001-a_b-Effusion.png", "0001-a_b-Mass.png"}


def test_mistakes(data: str, checkpoint: Path, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    for places in ({}, {"images": "x", "data": data}):
        with pytest.raises(UserError, match="exactly one"):
            explain(checkpoint, out, **places)
    with pytest.raises(UserError, match=r"explain\.findings: 'Edema' is none of the model's: Effusion, Mass, Nodule"):
        explain(checkpoint, out, data=data, config=ExplainConfig(findings=("Edema",)))
    tiny_checkpoint(tmp_path / "large", size=64)
    with pytest.raises(UserError, match=rf"image size 64.*image size {SIZE}"):
        explain(tmp_path / "large", out, data=data)
    assert not Path(out).exists()


def test_the_verb(data: str, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "explain",
        "--checkpoint",
        str(checkpoint),
        "--data",
        data,
        "--split",
        "val",
        "--out",
        str(tmp_path / "o"),
    ]
    assert run([*arguments, "--set", "explain.limit=2", "--set", "explain.layer=blocks.2"]) == 0
    shown = capsys.readouterr().out
    assert "4 maps (hirescam at blocks.2) of 2 images" in shown
    assert "more images left out by explain.limit" in shown
    assert len(list((tmp_path / "o").glob("*.png"))) == 4
    assert run(arguments) == 2
    assert "not empty" in capsys.readouterr().err
