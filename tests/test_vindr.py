"""VinDr-CXR source: three readers' votes by hand, two tables that name a finding differently, one-line faults."""

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
from pipeline.shards import prepare, survey
from pipeline.sources import open_source
from pipeline.sources.vindr import FINDINGS, majority

HEADER = (  # as image_labels_train.csv has it; the test table calls the last finding but one "Other disease"
    "Aortic enlargement,Atelectasis,Calcification,Cardiomegaly,Clavicle fracture,Consolidation,Edema,Emphysema,"
    "Enlarged PA,ILD,Infiltration,Lung Opacity,Lung cavity,Lung cyst,Mediastinal shift,Nodule/Mass,Pleural effusion,"
    "Pleural thickening,Pneumothorax,Pulmonary fibrosis,Rib fracture,Other lesion,COPD,Lung tumor,Pneumonia,"
    "Tuberculosis,Other diseases,No finding"
)
A, B, C, D = (letter * 32 for letter in "abcd")
VOTES = [  # image, reader, entries that are not 0
    (A, "R9", {"Edema": "1", "COPD": "1.0"}),
    (B, "R9", {"No finding": "1"}),
    (A, "R8", {"Edema": "1", "ILD": "1", "Pneumonia": "1", "Lung cyst": ""}),
    (A, "R10", {"Pneumonia": "", "Lung cyst": ""}),
    (B, "R8", {"No finding": "1"}),
    (A, "R11", {"Lung cyst": "", "Pneumonia": ""}),
    (B, "R10", {"Other diseases": "1"}),
]
CONSENSUS = [(C, {"Other diseases": "1.0", "Nodule/Mass": "1"}), (D, {"Edema": ""})]


def entries(labels: dict[str, str]) -> list[str]:
    return [labels.get(name, "0") for name in FINDINGS]


def collection(root: Path, votes=VOTES, consensus=CONSENSUS, suffix=".jpg") -> Path:
    (root / "annotations").mkdir(parents=True)
    train = [f"image_id,rad_id,{HEADER}", *(",".join((i, r, *entries(labels))) for i, r, labels in votes)]
    test = [f"image_id,{HEADER}".replace("diseases", "disease")]
    test += [",".join((image, *entries(labels))) for image, labels in consensus]
    for name, lines in (("train", train), ("test", test)):
        (root / "annotations" / f"image_labels_{name}.csv").write_text("\n".join(lines) + "\n")
    images = [*dict.fromkeys(("train", image) for image, *_ in votes), *(("test", image) for image, _ in consensus)]
    for seed, (split, image) in enumerate(images):
        jpeg(root / split / f"{image}.jpg", seed)
        (root / split / f"{image}.jpg").rename(root / split / f"{image}{suffix}")
    return root


def opened(root: Path, **config):
    return open_source(PrepareConfig(source="vindr", **config), str(root))


def code(source, image: str, finding: str) -> int:
    row = source.table["image_id"].to_pylist().index(image)
    return int(matrix(source.table["labels"])[row, FINDINGS.index(finding)])


def test_the_findings_are_those_of_the_header():
    assert ",".join(FINDINGS) == HEADER


@pytest.mark.parametrize("suffix", [".dicom", ".dcm", ".png", ".jpg"])
def test_rows_and_votes(tmp_path, suffix):
    source = opened(collection(tmp_path, suffix=suffix))
    assert (source.findings, source.name, source.synthetic) == (FINDINGS, "vindr", False)
    table = source.table
    assert table["image_id"].to_pylist() == [A, B, C, D]
    assert table["patient_id"].to_pylist() == [A, B, C, D], "no patients are told: each image is its own"
    assert table["split"].to_pylist() == ["train", "train", "test", "test"]
    assert set(table["view"].to_pylist()) == {"PA"}
    assert table["uri"].to_pylist()[0] == str(tmp_path / "train" / f"{A}{suffix}")
    assert table["uri"].to_pylist()[3] == str(tmp_path / "test" / f"{D}{suffix}")
    cases = {
        (A, "Edema"): UNCERTAIN,  # two of four
        (A, "COPD"): NEGATIVE,  # one of four
        (A, "Pneumonia"): UNCERTAIN,  # one of two who voted
        (A, "Lung cyst"): NEGATIVE,  # the one who voted
        (B, "No finding"): POSITIVE,  # two of three
        (B, "Other diseases"): NEGATIVE,  # one of three
        (C, "Other diseases"): POSITIVE,
        (C, "Nodule/Mass"): POSITIVE,
        (C, "No finding"): NEGATIVE,
        (D, "Edema"): BLANK,
    }
    assert {case: code(source, *case) for case in cases} == cases
    assert list(source.digests) == ["image_labels_test.csv", "image_labels_train.csv"]
    assert len(source.quarantine) == 0


def test_majority_by_hand():
    votes = np.array([[1, 0, -2, 1], [1, 1, -2, -2], [0, -2, -2, 0], [0, 1, 0, 1]], np.int8)
    expected = [[POSITIVE, UNCERTAIN, BLANK, UNCERTAIN], [NEGATIVE, POSITIVE, NEGATIVE, POSITIVE]]
    np.testing.assert_array_equal(majority(votes, np.array([0, 0, 0, 1]), 2), expected)


def test_a_part_of_the_collection(tmp_path):
    root = collection(tmp_path)
    (root / "train" / f"{B}.jpg").unlink()
    jpeg(root / "test" / f"{'e' * 32}.jpg")
    source = opened(root, findings=("Edema", "COPD"))
    assert (source.findings, len(source.table)) == (("Edema", "COPD"), 3)
    assert source.quarantine.to_pylist() == [
        {
            "source": str(root / "train" / f"{B}.dicom"),
            "reason": "missing",
            "detail": "row of image_labels_train.csv and image_labels_test.csv without an image file",
        },
        {
            "source": str(root / "test" / f"{'e' * 32}.jpg"),
            "reason": "unlisted",
            "detail": "image file without a row in image_labels_train.csv and image_labels_test.csv",
        },
    ]


@pytest.mark.parametrize(
    ("name", "old", "new", "words"),
    [
        ("train", "Lung Opacity", "Opacity", r"train.csv lacks the column\(s\) Lung Opacity; its header has image_id"),
        ("train", "rad_id", "reader", r"train.csv lacks the column\(s\) rad_id"),
        ("test", "Other disease,", "Others,", r"test.csv has 0 columns for 'Other diseases'; expected one of"),
        ("train", "1.0", "2", r"train.csv, row 2: COPD is '2'; labels are 1, 0 or empty"),
        ("train", "1.0", "-1", r"train.csv, row 2: COPD is '-1'; labels are 1, 0 or empty"),
        ("train", "R8", "R9", rf"train.csv, rows 2 and 4: the same image and reader, '{A} by reader R9' \(2 rows"),
        ("train", "R11", "", r"train.csv, row 7: rad_id is empty"),
        ("test", D, C, rf"test.csv, rows 2 and 3: the same image, '{C}'; mend the table"),
        ("test", D, A, rf"image '{A}' is in image_labels_train.csv and image_labels_test.csv"),
    ],
)
def test_faults_of_the_tables_are_one_line(tmp_path, name, old, new, words):
    table = collection(tmp_path) / "annotations" / f"image_labels_{name}.csv"
    table.write_text(table.read_text().replace(old, new))
    with pytest.raises(UserError, match=words) as caught:
        opened(tmp_path)
    assert "\n" not in str(caught.value)


def test_faults_of_the_place_are_one_line(tmp_path):
    with pytest.raises(UserError, match=r"holds no VinDr-CXR table of train images; expected image_labels_train.csv"):
        opened(tmp_path)
    root = collection(tmp_path)
    jpeg(root / "train" / f"{A}.png")
    with pytest.raises(UserError, match=rf"image {A} of train lies in two files, .*{A}.jpg and .*{A}.png; keep one"):
        opened(root)
    for path in [*root.glob("*/*.jpg"), *root.glob("*/*.png")]:
        path.unlink()
    with pytest.raises(UserError, match=r"no image of .* expected train/\*.dicom and test/\*.dicom; .*\(missing 4\)"):
        opened(root)
    (root / "annotations" / "image_labels_test.csv").unlink()
    with pytest.raises(UserError, match="holds no VinDr-CXR table of test images"):
        opened(root)


def many(images: int) -> tuple[list, list]:
    """Three readers an image who agree on a finding; a third of the images are for testing."""
    ids = [f"{number:032x}" for number in range(images)]
    told = [{FINDINGS[number % 28]: "1"} for number in range(images)]
    cut = images * 2 // 3
    votes = [(ids[n], f"R{reader}", told[n]) for reader in (1, 2, 3) for n in range(cut)]
    return votes, [(ids[n], told[n]) for n in range(cut, images)]


def test_prepare(tmp_path, ray_session):
    root = collection(tmp_path / "in", *many(60))
    config = PrepareConfig(source="vindr", image_size=16, row_group=8, split=SplitConfig(val=0.2))
    card = prepare(config, str(root), str(tmp_path / "out"))
    assert check(str(tmp_path / "out")) == []
    counts = {name: split.images for name, split in card.counts.items()}
    assert counts["test"] == 20
    assert counts["train"] + counts["val"] == 40
    assert counts["val"] > 0, "carved from the training images"
    row = pq.read_table(tmp_path / "out" / card.shards[0].path).to_pylist()[0]
    assert np.flatnonzero(row["labels"]).tolist() == [int(row["image_id"], 16) % 28]
    assert row["image"] == decode((root / "train" / f"{row['image_id']}.jpg").read_bytes(), "x", 16, "pad").tobytes()


def test_object_storage(bucket, tmp_path):
    root = collection(tmp_path, *many(30))
    for path in root.rglob("*.*"):
        storage.write_bytes(storage.join(f"{bucket}/vindr", str(path.relative_to(root))), path.read_bytes())
    config = PrepareConfig(source="vindr", split=SplitConfig(val=0.5))
    remote, local = (survey(config, place) for place in (f"{bucket}/vindr", str(root)))
    assert remote.manifest.drop_columns("uri").equals(local.manifest.drop_columns("uri"))
    assert remote.source.table["uri"][0].as_py().startswith(f"{bucket}/vindr/train/")
