"""What is flagged as unlike the training images: known distances, the promised rate, and real files end to end."""

import base64
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.csv as pcsv
import pytest
from factory import tiny_checkpoint
from pictures import dicom, encoded
from pydicom.data import get_testdata_file
from sklearn.covariance import LedoitWolf

from mpc.errors import UserError
from mpc.reference import FILE, Described, Gaussian, Reference
from pipeline import pixels
from pipeline.card import read_card
from pipeline.config import ReferenceConfig
from pipeline.headers import kind_flags
from pipeline.inference import load_model, pack, version_of
from pipeline.predict import predict
from pipeline.reference import attach, runs_of
from pipeline.served_model import ServedModel
from tuning.registry import download, register


def test_distances_are_mahalanobis_with_the_covariance_of_ledoit_and_wolf() -> None:
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(300, 6)) @ rng.normal(size=(6, 6)) + 3
    new = rng.normal(size=(20, 6)) * 4
    unit = rows.std(0)
    fitted = LedoitWolf().fit(rows / unit)
    expected = np.sqrt(fitted.mahalanobis(new / unit) / 6)
    np.testing.assert_allclose(Gaussian.of(rows).distance(new), expected, rtol=1e-4)
    assert 0.7 < np.square(Gaussian.of(rows).distance(rows)).mean() < 1, "shrinking widens the distribution"


def test_a_column_that_never_varied_may_vary_a_little() -> None:
    rows = np.random.default_rng(0).normal(size=(100, 4))
    rows[:, 2] = 7
    found = Gaussian.of(rows).distance(np.array([[0, 0, 7, 0], [0, 0, 7.05, 0], [0, 0, 9, 0]]))
    assert found[1] < 1.5 < 10 < found[2]


def described(rng: np.random.Generator, number: int) -> tuple[np.ndarray, np.ndarray]:
    """Features and images of one law."""
    images = np.clip(rng.normal(120, 30, (number, 16, 16)) + rng.normal(0, 10, (number, 1, 1)), 0, 255)
    return rng.normal(size=(number, 8)).astype(np.float32), images.astype(np.uint8)


def test_false_alarms_come_at_the_promised_rate() -> None:
    flagged = []
    for seed in range(10):
        rng = np.random.default_rng(seed)
        train, val, (features, images) = (described(rng, n) for n in (150, 99, 150))
        found = Reference.of(Described.of(*train), Described.of(*val), 0.05)
        assert found.false_alarms == pytest.approx(0.05)
        flagged.append(np.mean(found.unlikeness(features, images) > 1))
    assert 0.025 < np.mean(flagged) < 0.075
    few = Reference.of(Described.of(*train), Described.of(*(part[:49] for part in val)), 0.01)
    assert few.false_alarms == pytest.approx(0.02), "49 images cannot promise less"


def test_it_is_written_and_read_and_nothing_else_is(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    found = Reference.of(Described.of(*described(rng, 200)), Described.of(*described(rng, 99)), 0.05)
    features, images = described(rng, 10)
    again = Reference.from_bytes(found.to_bytes(), "x")
    np.testing.assert_array_equal(again.unlikeness(features, images), found.unlikeness(features, images))
    tiny_checkpoint(tmp_path / "best")
    for content in (b"\x80\x04}.", found.to_bytes()[:-8]):
        (tmp_path / "best" / FILE).write_bytes(content)
        with pytest.raises(UserError, match=r"reference\.safetensors: no reference of training images"):
            load_model(tmp_path / "best")


def test_runs_are_spread_over_all_rows() -> None:
    assert runs_of(1000, 128) == [range(64), range(512, 576)]
    assert runs_of(100, 2000) == [range(64), range(64, 100)]
    assert [len(run) for run in runs_of(10, 1)] == [10]


@pytest.mark.parametrize(
    ("tags", "flags"),
    [
        ({}, ()),
        ({"Modality": "DX", "ViewPosition": "PA"}, ()),
        ({"Modality": "CT"}, ("other_modality",)),
        ({"Modality": "CR", "ViewPosition": "LL"}, ("lateral",)),
    ],
)
def test_a_header_speaks_in_fixed_words(tags: dict[str, str], flags: tuple[str, ...]) -> None:
    assert kind_flags(dicom(np.arange(64, dtype=np.uint8).reshape(8, 8), **tags)) == flags


def write_files(folder: Path) -> None:
    """Radiographs of the training's kind, and others."""
    folder.mkdir()
    for index in range(4):
        image = pixels.load(f"phantom://dense/77/{index}", 256, "pad")
        (folder / f"like-{index}.png").write_bytes(encoded(image))
        (folder / f"negative-{index}.png").write_bytes(encoded(255 - image))
    noise = np.random.default_rng(0).integers(120, 123, (200, 200), np.uint8)
    (folder / "faint.png").write_bytes(encoded(noise))
    (folder / "blank.png").write_bytes(encoded(np.full((200, 200), 90, np.uint8)))
    path = get_testdata_file("CT_small.dcm", download=False)
    (folder / "slice.dcm").write_bytes(Path(str(path)).read_bytes())


def test_unlike_files_are_flagged_in_tables_and_by_the_registered_model(
    phantom_data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    best = tmp_path / "best"
    tiny_checkpoint(best, findings=read_card(phantom_data).findings)
    before = version_of(best, load_model(best).info, pack(best))
    assert attach(str(best), phantom_data, ReferenceConfig(images=0)) is None
    assert not (best / FILE).exists()
    attached = attach(str(best), phantom_data, ReferenceConfig(false_alarms=0.02))
    assert attached is not None
    assert attached.false_alarms <= 0.02
    write_files(tmp_path / "in")
    summary = predict(best, str(tmp_path / "in"), str(tmp_path / "out.csv"))
    assert (summary.images, summary.failed) == (11, 1)
    rows = {Path(row["source"]).name: row for row in pcsv.read_csv(tmp_path / "out.csv").to_pylist()}
    flags = {name: (row["flags"] or "").split(";") for name, row in rows.items()}
    assert rows["blank.png"]["error"].startswith("blank")
    assert sum("unlike_training" in flags[f"like-{i}.png"] for i in range(4)) <= 1
    assert all({"unlike_training", "inverted"} <= set(flags[f"negative-{i}.png"]) for i in range(4))
    assert {"unlike_training", "low_contrast"} <= set(flags["faint.png"])
    assert {"unlike_training", "other_modality"} <= set(flags["slice.dcm"])
    assert summary.unlike == sum("unlike_training" in found for found in flags.values())
    assert rows["slice.dcm"]["model_version"] != before, "another reference is another version"

    store = f"sqlite:///{tmp_path / 'mlflow.db'}"
    monkeypatch.chdir(tmp_path)
    fetched = download(register(best, "like", store).uri, store)
    served = ServedModel()
    served.loaded = load_model(fetched)
    names = ("like-0.png", "negative-0.png", "slice.dcm")
    texts = [base64.b64encode((tmp_path / "in" / name).read_bytes()).decode() for name in names]
    found = served.predict(None, pd.DataFrame({"image": texts}))["flags"].str.split(";").tolist()
    assert ["unlike_training" in said for said in found] == ["unlike_training" in flags[name] for name in names]
    assert "other_modality" in found[2]
