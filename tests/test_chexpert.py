"""CheXpert source: label codes by hand, official lists that never mix, both layouts, one line for what does not fit."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mpc.errors import UserError
from pipeline import storage
from pipeline.check import check
from pipeline.decode import decode
from pipeline.manifest import BLANK, NEGATIVE, POSITIVE, UNCERTAIN, matrix
from pipeline.prepare_config import PolicyConfig, PrepareConfig, SplitConfig
from pipeline.shards import prepare, survey
from pipeline.sources import open_source
from pipeline.sources.chexpert import FINDINGS

ABOUT = ("Sex", "Age", "Frontal/Lateral", "AP/PA")
SMALL = "CheXpert-v1.0-small"
CASES = {  # image -> labels that are not blank
    "train/patient00001/study1/view1_frontal": {"Edema": "1.0", "Fracture": "0.0", "Lung Lesion": "-1.0"},
    "train/patient00001/study1/view2_lateral": {"Edema": "1.0"},
    "train/patient00002/study2/view1_frontal": {"No Finding": "1.0"},
    "valid/patient00003/study1/view1_frontal": {"Pneumonia": "1.0"},
    "valid/patient00003/study1/view2_lateral": {"Pneumonia": "1.0"},
    "test/patient00004/study1/view1_frontal": {"Cardiomegaly": "1.0"},
}


def jpeg(path: Path, seed: int = 0, shape: tuple[int, int] = (20, 16)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, shape, dtype=np.uint8)).save(path)


def collection(base: Path, cases=CASES, prefix=f"{SMALL}/", header=("Path", *ABOUT, *FINDINGS)) -> Path:
    """Lists and images as they are given out; the published test.csv has neither sex nor view."""
    for seed, image in enumerate(cases):
        jpeg(base / f"{image}.jpg", seed)
    for name in ("train", "valid", "test"):
        images = [image for image in cases if image.startswith(f"{name}/")]
        columns = [column for column in header if name != "test" or column not in ABOUT]
        lines = [",".join(columns)]
        for image in images:
            side = "Lateral" if image.endswith("lateral") else "Frontal"
            told = {"Path": f"{prefix}{image}.jpg", "Sex": "Female", "Age": "68", "Frontal/Lateral": side}
            told |= {"AP/PA": "AP" if side == "Frontal" else "", **cases[image]}
            lines.append(",".join(told.get(column, "") for column in columns))
        if images:
            (base / f"{name}.csv").write_text("\n".join(lines) + "\n")
    return base


def opened(root: Path, **config):
    return open_source(PrepareConfig(source="chexpert", **config), str(root))


def faults(source) -> list[tuple[str, str]]:
    return [(row["source"].rpartition("patient")[2], row["reason"]) for row in source.quarantine.to_pylist()]


def test_rows_and_label_codes(tmp_path):
    source = opened(collection(tmp_path))
    assert (source.findings, source.name, source.synthetic) == (FINDINGS, "chexpert", False)
    table = source.table
    assert table["image_id"].to_pylist() == [
        "patient00001_study1_view1_frontal",
        "patient00002_study2_view1_frontal",
        "patient00004_study1_view1_frontal",
    ]
    assert table["patient_id"].to_pylist() == ["patient00001", "patient00002", "patient00004"]
    assert table["study_id"].to_pylist() == ["patient00001_study1", "patient00002_study2", "patient00004_study1"]
    assert table["split"].to_pylist() == ["train", "train", "test"]
    assert table["view"].to_pylist() == ["AP", "AP", "frontal"]
    assert table["sex"].to_pylist() == ["F", "F", None]
    assert table["age_band"].to_pylist() == ["60-79", "60-79", None]
    assert table["uri"][0].as_py() == str(tmp_path / "train/patient00001/study1/view1_frontal.jpg")
    expected = np.full((3, 14), BLANK)
    for row, name, code in (
        (0, "Edema", POSITIVE), (0, "Fracture", NEGATIVE), (0, "Lung Lesion", UNCERTAIN),
        (1, "No Finding", POSITIVE), (2, "Cardiomegaly", POSITIVE),
    ):  # fmt: skip
        expected[row, FINDINGS.index(name)] = code
    np.testing.assert_array_equal(matrix(table["labels"]), expected)
    assert list(source.digests) == ["test.csv", "train.csv", "valid.csv"]


@pytest.mark.parametrize(
    ("config", "splits", "reasons"),
    [
        ({}, {"00001": "train", "00002": "train", "00004": "test"}, ["official_valid", "official_valid", "lateral"]),
        (
            {"official_test": "valid"},
            {"00001": "train", "00002": "train", "00003": "test"},
            ["official_test", "lateral", "lateral"],
        ),
        (
            {"split": SplitConfig(by="hash")},
            {"00001": "train", "00002": "train"},
            ["official_valid", "official_valid", "official_test", "lateral"],
        ),
    ],
)
def test_official_lists_are_never_mixed_nor_trained_on(tmp_path, config, splits, reasons):
    source = opened(collection(tmp_path), **config)
    patients = [name.removeprefix("patient") for name in source.table["patient_id"].to_pylist()]
    assert dict(zip(patients, source.table["split"].to_pylist(), strict=True)) == splits
    assert source.quarantine["reason"].to_pylist() == reasons


def test_valid_tests_where_there_is_no_test_list(tmp_path):
    root = collection(tmp_path)
    (root / "test.csv").unlink()
    source = opened(root)
    assert source.table["split"].to_pylist() == ["train", "train", "test"]
    assert source.table["patient_id"][2].as_py() == "patient00003"
    assert faults(source) == [
        ("00001/study1/view2_lateral.jpg", "lateral"),
        ("00003/study1/view2_lateral.jpg", "lateral"),
    ]
    with pytest.raises(UserError, match=r"holds no test.csv, the list of the test split; add it"):
        opened(root, official_test="test")
    (root / "valid.csv").unlink()
    with pytest.raises(UserError, match=r"holds no valid.csv.*prepare.split.by=hash"):
        opened(root)
    assert len(opened(root, split=SplitConfig(by="hash")).table) == 2


def test_all_views(tmp_path):
    source = opened(collection(tmp_path), views="all")
    assert source.table["view"].to_pylist() == ["AP", "lateral", "AP", "frontal"]
    assert set(source.quarantine["reason"].to_pylist()) == {"official_valid"}


@pytest.mark.parametrize(
    ("folder", "prefix"),
    [
        ("", "CheXpert-v1.0/"),
        ("CheXpert-v1.0", "CheXpert-v1.0/"),
        (SMALL, f"{SMALL}/"),
        ("", ""),
    ],
)
def test_layouts(tmp_path, folder, prefix):
    collection(tmp_path / folder, prefix=prefix)
    source = opened(tmp_path)
    assert len(source.table) == 3
    assert source.table["uri"][0].as_py().startswith(str(tmp_path / folder / "train"))


def test_images_without_row_and_rows_without_image(tmp_path):
    root = collection(tmp_path)
    (root / "train/patient00002/study2/view1_frontal.jpg").unlink()
    jpeg(root / "train/patient00009/study1/view1_frontal.jpg")
    source = opened(root)
    assert len(source.table) == 2
    assert faults(source)[-2:] == [
        ("00002/study2/view1_frontal.jpg", "missing"),
        ("00009/study1/view1_frontal.jpg", "unlisted"),
    ]


def changed(root: Path, old: str, new: str) -> Path:
    (root / "train.csv").write_text((root / "train.csv").read_text().replace(old, new))
    return root


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("Lung Opacity", "Opacity", r"train.csv lacks the column\(s\) Lung Opacity; its header has Path, Sex"),
        ("Frontal/Lateral", "Side", r"lacks the column\(s\) Frontal/Lateral"),
        (",-1.0,", ",2.0,", r"train.csv, row 2: Lung Lesion is '2.0'; labels are 1, 0, -1 or empty"),
        ("patient00002/study2", "p2/study2", r"row 4: Path is 'CheXpert-v1.0-small/train/p2.*expected train/patient"),
        (f"{SMALL}/train/patient00002/study2/view1_frontal.jpg", "", r"row 4: Path is empty"),
    ],
)
def test_faults_of_the_table_are_one_line(tmp_path, old, new, words):
    with pytest.raises(UserError, match=words) as caught:
        opened(changed(collection(tmp_path), old, new))
    assert "\n" not in str(caught.value)


def test_faults_of_the_place_are_one_line(tmp_path):
    with pytest.raises(UserError, match=r"holds no CheXpert table; expected train.csv in it, or in CheXpert-v1.0 or"):
        opened(tmp_path)
    collection(tmp_path / SMALL)
    (tmp_path / "CheXpert-v1.0").mkdir()
    (tmp_path / "CheXpert-v1.0" / "train.csv").write_text("Path\n")
    with pytest.raises(UserError, match="several copies of CheXpert"):
        opened(tmp_path)
    for path in (tmp_path / SMALL).rglob("*.jpg"):
        path.unlink()
    with pytest.raises(
        UserError, match=r"no image of train.csv lies under .*all rows are left out \(official_valid 2,"
    ):
        opened(tmp_path / SMALL)


def many(patients: int) -> dict[str, dict[str, str]]:
    """Training patients with a lateral view each, and eight of each official list."""
    cases = {}
    for patient in range(patients):
        name = "valid" if patient < 8 else "test" if patient < 16 else "train"
        for view in ("view1_frontal", "view2_lateral"):
            labels = {FINDINGS[patient % 14]: "1.0", FINDINGS[(patient + 1) % 14]: "-1.0"}
            cases[f"{name}/patient{patient:05d}/study1/{view}"] = labels
    return cases


def test_prepare(tmp_path, ray_session):
    root = collection(tmp_path / "in", many(60))
    config = PrepareConfig(
        source="chexpert",
        image_size=16,
        row_group=8,
        split=SplitConfig(val=0.2),
        policy=PolicyConfig(uncertain="ignore", blank="zeros"),
    )
    card = prepare(config, str(root), str(tmp_path / "out"))
    assert check(str(tmp_path / "out")) == []
    assert card.quarantined == {"lateral": 52, "official_valid": 16}, "left out on purpose: max_bad does not count them"
    assert card.counts["test"].images == 8
    assert card.counts["train"].images + card.counts["val"].images == 44
    assert card.counts["val"].images > 0
    assert sum(codes.uncertain for codes in card.raw_labels.values()) == 52
    assert card.raw_labels["Edema"].blank == 52 - card.raw_labels["Edema"].positive - card.raw_labels["Edema"].uncertain
    known = sum(sum(split.known.values()) for split in card.counts.values())
    assert known == 52 * 13
    row = pq.read_table(tmp_path / "out" / card.shards[0].path).to_pylist()[0]
    source = (root / "train" / f"{row['image_id'].replace('_', '/', 2)}.jpg").read_bytes()
    assert row["image"] == decode(source, "x", 16, "pad").tobytes()


def test_folds_share_out_the_training_list_alone(tmp_path):
    root = collection(tmp_path, many(60))
    tested = []
    for fold in range(3):
        split = SplitConfig(by="hash", folds=3, fold=fold, val=0.3)
        manifest = survey(PrepareConfig(source="chexpert", split=split), str(root)).manifest
        tested += [row["patient_id"] for row in manifest.to_pylist() if row["split"] == "test"]
    assert sorted(tested) == [f"patient{patient:05d}" for patient in range(16, 60)]


def test_object_storage(bucket, tmp_path):
    root = collection(tmp_path)
    for path in root.rglob("*"):
        if path.is_file():
            storage.write_bytes(storage.join(f"{bucket}/cx/{SMALL}", str(path.relative_to(root))), path.read_bytes())
    remote = open_source(PrepareConfig(source="chexpert"), f"{bucket}/cx")
    assert remote.table.drop_columns("uri").equals(opened(root).table.drop_columns("uri"))
    assert remote.table["uri"][0].as_py() == f"{bucket}/cx/{SMALL}/train/patient00001/study1/view1_frontal.jpg"
