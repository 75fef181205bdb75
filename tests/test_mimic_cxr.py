"""MIMIC-CXR-JPG source: three tables joined by id, views, labelers, splits, and one line for what does not fit."""

import gzip
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from test_chexpert import jpeg

from mpc.errors import UserError
from pipeline import storage
from pipeline.check import check
from pipeline.decode import decode
from pipeline.manifest import BLANK, NEGATIVE, POSITIVE, UNCERTAIN, matrix
from pipeline.prepare_config import PrepareConfig, SplitConfig
from pipeline.shards import prepare
from pipeline.sources import open_source
from pipeline.sources.chexpert import FINDINGS

IMAGES = [  # dicom, subject, study, view, split
    ("aa-1", "10000032", "50414267", "AP", "train"),
    ("bb-2", "10000032", "50414267", "LATERAL", "train"),
    ("cc-3", "10000032", "53189527", "PA", "train"),
    ("dd-4", "11000764", "57375967", "PA", "validate"),
    ("ee-5", "12000935", "51178377", "AP", "test"),
    ("ff-6", "12000935", "50578979", "", "test"),
    ("gg-7", "12000935", "56522600", "PA", "test"),
]
STUDIES = {  # study -> labels that are not blank; the study of gg-7 has no row
    ("10000032", "50414267"): {"Edema": "1.0", "Fracture": "0.0", "Lung Lesion": "-1.0"},
    ("10000032", "53189527"): {"No Finding": "1.0"},
    ("11000764", "57375967"): {"Edema": "1.0", "Support Devices": "1.0"},
    ("12000935", "51178377"): {"Pneumonia": "1.0"},
    ("12000935", "50578979"): {"Pneumonia": "-1.0"},
}


def image(root: Path, dicom: str, subject: str, study: str) -> Path:
    return root / "files" / f"p{subject[:2]}" / f"p{subject}" / f"s{study}" / f"{dicom}.jpg"


def write(root: Path, name: str, lines: list[str], packed: bool = True) -> None:
    content = ("\n".join(lines) + "\n").encode()
    end = ".gz" if packed else ""
    (root / f"mimic-cxr-2.0.0-{name}.csv{end}").write_bytes(gzip.compress(content) if packed else content)


def label_lines(studies) -> list[str]:
    """The labelers' tables have the findings in alphabetical order."""
    findings = sorted(FINDINGS)
    lines = [",".join(("subject_id", "study_id", *findings))]
    return lines + [",".join((*ids, *(labels.get(name, "") for name in findings))) for ids, labels in studies.items()]


def collection(root: Path, images=IMAGES, studies=STUDIES, packed: bool = True) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    header = "dicom_id,subject_id,study_id,PerformedProcedureStepDescription,ViewPosition,Rows,Columns"
    rows = [f'{dicom},{subject},{study},"CHEST (PA, LAT)",{view},9,9' for dicom, subject, study, view, _ in images]
    write(root, "metadata", [header, *rows], packed)
    write(root, "chexpert", label_lines(studies), packed)
    write(root, "negbio", label_lines({ids: {"Atelectasis": "1.0"} for ids in studies}), packed)
    rows = [f"{dicom},{study},{subject},{split}" for dicom, subject, study, _, split in reversed(images)]
    write(root, "split", ["dicom_id,study_id,subject_id,split", *rows], packed)
    for seed, (dicom, subject, study, _, _) in enumerate(images):
        jpeg(image(root, dicom, subject, study), seed)
    return root


def opened(root: Path, **config):
    return open_source(PrepareConfig(source="mimic_cxr", **config), str(root))


def faults(source) -> list[tuple[str, str]]:
    return [(Path(row["source"]).stem, row["reason"]) for row in source.quarantine.to_pylist()]


@pytest.mark.parametrize("packed", [True, False])
def test_rows_and_label_codes(tmp_path, packed):
    source = opened(collection(tmp_path, packed=packed))
    assert (source.findings, source.name, source.synthetic) == (FINDINGS, "mimic_cxr", False)
    table = source.table
    assert table["image_id"].to_pylist() == ["aa-1", "cc-3", "dd-4", "ee-5"]
    assert table["patient_id"].to_pylist() == ["10000032", "10000032", "11000764", "12000935"]
    assert table["study_id"].to_pylist() == ["50414267", "53189527", "57375967", "51178377"]
    assert table["view"].to_pylist() == ["AP", "PA", "PA", "AP"]
    assert table["split"].to_pylist() == ["train", "train", "val", "test"]
    assert table["uri"][0].as_py() == str(tmp_path / "files/p10/p10000032/s50414267/aa-1.jpg")
    expected = np.full((4, 14), BLANK)
    for row, name, code in (
        (0, "Edema", POSITIVE), (0, "Fracture", NEGATIVE), (0, "Lung Lesion", UNCERTAIN), (1, "No Finding", POSITIVE),
        (2, "Edema", POSITIVE), (2, "Support Devices", POSITIVE), (3, "Pneumonia", POSITIVE),
    ):  # fmt: skip
        expected[row, FINDINGS.index(name)] = code
    np.testing.assert_array_equal(matrix(table["labels"]), expected)
    assert faults(source) == [("bb-2", "lateral"), ("ff-6", "other_view"), ("gg-7", "no_labels")]
    assert sorted(source.digests) == [
        f"mimic-cxr-2.0.0-{name}.csv{'.gz' if packed else ''}" for name in ("chexpert", "metadata", "split")
    ]


def test_the_other_labeler_and_all_views(tmp_path):
    source = opened(collection(tmp_path), labeler="negbio", views="all")
    assert source.table["image_id"].to_pylist() == ["aa-1", "bb-2", "cc-3", "dd-4", "ee-5", "ff-6"]
    assert (matrix(source.table["labels"])[:, FINDINGS.index("Atelectasis")] == POSITIVE).all()
    assert faults(source) == [("gg-7", "no_labels")]


def test_a_part_of_the_collection(tmp_path):
    root = collection(tmp_path)
    image(root, *IMAGES[2][:3]).unlink()
    image(root, *IMAGES[1][:3]).unlink()
    jpeg(root / "files/p19/p19000001/s50000001/zz-9.jpg")
    assert faults(opened(root)) == [
        ("bb-2", "lateral"), ("ff-6", "other_view"), ("gg-7", "no_labels"), ("cc-3", "missing"), ("zz-9", "unlisted"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "old", "new", "words"),
    [
        (
            "metadata",
            "ViewPosition",
            "View",
            r"metadata.csv lacks the column\(s\) ViewPosition; its header has dicom_id",
        ),
        ("chexpert", "Lung Opacity", "Opacity", r"chexpert.csv lacks the column\(s\) Lung Opacity"),
        ("chexpert", "-1.0", "maybe", r"chexpert.csv, row 2: Lung Lesion is 'maybe'; labels are 1, 0, -1 or empty"),
        ("chexpert", "53189527", "50414267", r"chexpert.csv has subject_id/study_id 10000032/50414267 twice"),
        ("split", "validate", "valid", r"split.csv, row 5: split is 'valid'; the splits are train, validate, test"),
        ("split", "ee-5", "aa-1", r"1 of 4 images are in no official list, first 'ee-5'"),
        ("metadata", "aa-1,10000032", "aa-1,", r"metadata.csv, row 2: subject_id is empty"),
    ],
)
def test_faults_are_one_line(tmp_path, name, old, new, words):
    root = collection(tmp_path / "in", packed=False)
    table = root / f"mimic-cxr-2.0.0-{name}.csv"
    table.write_text(table.read_text().replace(old, new))
    with pytest.raises(UserError, match=words) as caught:
        prepare(PrepareConfig(source="mimic_cxr"), str(root), str(tmp_path / "out"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["metadata", "chexpert", "split"])
def test_every_table_is_needed(tmp_path, name):
    root = collection(tmp_path)
    (root / f"mimic-cxr-2.0.0-{name}.csv.gz").unlink()
    words = rf"no MIMIC-CXR table of {name}; expected mimic-cxr-2.0.0-{name}.csv.gz or mimic-cxr-2.0.0-{name}.csv"
    with pytest.raises(UserError, match=words):
        opened(root)


def test_prepare(tmp_path, ray_session):
    """A study in three has a lateral view; images of 30 patients, ten a split."""
    splits = ("train", "validate", "test")
    images = [(f"d{n}", f"{10000000 + n}", f"{50000000 + n}", "PA", splits[n % 3]) for n in range(30)]
    images += [(f"l{n}", *images[n][1:3], "LL", images[n][4]) for n in range(0, 30, 3)]
    studies = {row[1:3]: {FINDINGS[n % 14]: "1.0"} for n, row in enumerate(images[:30])}
    root = collection(tmp_path / "in", images, studies)
    config = PrepareConfig(source="mimic_cxr", image_size=16, row_group=8)
    card = prepare(config, str(root), str(tmp_path / "out"))
    assert check(str(tmp_path / "out")) == []
    assert card.quarantined == {"lateral": 10}
    assert {name: counts.images for name, counts in card.counts.items()} == {"train": 10, "val": 10, "test": 10}
    row = pq.read_table(tmp_path / "out" / card.shards[0].path).to_pylist()[0]
    source = image(root, row["image_id"], row["patient_id"], row["study_id"]).read_bytes()
    assert row["image"] == decode(source, "x", 16, "pad").tobytes()
    assert row["labels"][int(row["image_id"][1:]) % 14] == 1


def test_object_storage(bucket, tmp_path):
    root = collection(tmp_path)
    for path in root.rglob("*"):
        if path.is_file():
            storage.write_bytes(storage.join(f"{bucket}/mimic", str(path.relative_to(root))), path.read_bytes())
    config = PrepareConfig(source="mimic_cxr", split=SplitConfig(by="hash"))
    remote = open_source(config, f"{bucket}/mimic/")
    assert remote.table.drop_columns("uri").equals(opened(root).table.drop_columns("uri"))
    assert remote.table["uri"][0].as_py() == f"{bucket}/mimic/files/p10/p10000032/s50414267/aa-1.jpg"
