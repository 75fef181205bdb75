"""NIH source: its layouts, its lists, and one clear line for whatever does not match."""

import csv
import gzip
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_cli import call

from mpc.errors import UserError
from pipeline.manifest import matrix
from pipeline.prepare_config import PrepareConfig
from pipeline.shards import survey
from pipeline.sources import open_source
from pipeline.sources.phantom.labels import FINDINGS

HEADER = (
    "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,"
    "OriginalImage[Width,Height]"  # so the collection has it: two columns of a name with a comma
)
ROWS = [
    ("00000001_000.png", "Cardiomegaly|Emphysema", "1", "57", "M", "PA"),
    ("00000001_001.png", "No Finding", "1", "58", "M", "AP"),
    ("00000002_000.png", "Hernia", "2", "81", "F", "PA"),
]


def collection(root: Path, rows=ROWS, folders=("images",), header=HEADER, table="Data_Entry_2017_v2020.csv") -> Path:
    lines = [f"{name},{labels},0,{patient},{age},{sex},{view},2,3" for name, labels, patient, age, sex, view in rows]
    root.mkdir(parents=True, exist_ok=True)
    (root / table).write_text("\n".join([header, *lines]) + "\n")
    rng = np.random.default_rng(0)
    for position, row in enumerate(rows):
        folder = root / folders[position % len(folders)]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (16, 16), dtype=np.uint8)).save(folder / row[0])
    return root


def opened(root: Path, **config):
    return open_source(PrepareConfig(source="nih", **config), str(root))


def faults(source) -> list[tuple[str, str]]:
    return [(row["source"].rpartition("/")[2], row["reason"]) for row in source.quarantine.to_pylist()]


def test_table_labels_and_paths(tmp_path):
    source = opened(collection(tmp_path))
    assert source.findings == FINDINGS
    assert not source.synthetic
    table = source.table
    assert table["image_id"].to_pylist() == ["00000001_000", "00000001_001", "00000002_000"]
    assert table["patient_id"].to_pylist() == ["1", "1", "2"]
    assert table["view"].to_pylist() == ["PA", "AP", "PA"]
    assert table["uri"][2].as_py() == str(tmp_path / "images" / "00000002_000.png")
    assert table["sex"].to_pylist() == ["M", "M", "F"]
    assert table["age_band"].to_pylist() == ["40-59", "40-59", "80-99"]
    assert table["split"].null_count == 3
    names = [[FINDINGS[k] for k in np.flatnonzero(row)] for row in matrix(table["labels"])]
    assert names == [["Cardiomegaly", "Emphysema"], [], ["Hernia"]]
    assert list(source.digests) == ["Data_Entry_2017_v2020.csv"]
    assert len(source.quarantine) == 0


def test_no_finding_can_be_a_fifteenth_class(tmp_path):
    source = opened(collection(tmp_path), findings=(*FINDINGS, "No Finding"))
    np.testing.assert_array_equal(matrix(source.table["labels"])[:, 14], [0, 1, 0])
    few = opened(tmp_path, findings=("Hernia", "Cardiomegaly"))
    np.testing.assert_array_equal(matrix(few.table["labels"]), [[0, 1], [0, 0], [1, 0]])


def test_the_layout_of_the_real_collection(tmp_path):
    root = collection(tmp_path, folders=("images_001/images", "images_002/images"))
    (root / "thumbnails").mkdir()
    Image.new("L", (4, 4)).save(root / "thumbnails" / "00000009_000.png")
    source = opened(root)
    assert source.table["uri"][1].as_py() == str(root / "images_002" / "images" / "00000001_001.png")
    assert len(source.quarantine) == 0


def test_official_lists(tmp_path):
    root = collection(tmp_path)
    (root / "train_val_list.txt").write_text("00000001_000.png\n00000001_001.png\n")
    (root / "test_list.txt").write_text("00000002_000.png\n")
    source = opened(root)
    assert source.table["split"].to_pylist() == ["train", "train", "test"]
    assert list(source.digests) == ["Data_Entry_2017_v2020.csv", "test_list.txt", "train_val_list.txt"]
    (root / "test_list.txt").write_text("00000002_000.png\n00000001_001.png\n")
    with pytest.raises(UserError, match=r"00000001_001.png is in both"):
        opened(root)
    (root / "test_list.txt").unlink()
    with pytest.raises(UserError, match=r"add test_list.txt"):
        opened(root)


def test_rows_without_image_and_images_without_row_are_kept_in_the_quarantine(tmp_path):
    root = collection(tmp_path)
    (root / "images" / "00000001_001.png").unlink()
    Image.new("L", (4, 4)).save(root / "images" / "00000003_000.png")
    source = opened(root)
    assert len(source.table) == 2
    assert faults(source) == [("00000001_001.png", "missing"), ("00000003_000.png", "unlisted")]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"header": HEADER.replace("Patient ID", "PatientId")},
            r"lacks the column\(s\) Patient ID; its header has Image",
        ),
        ({"rows": [("a.png", "Effusion|Cough", "1", "5", "M", "PA")]}, r"row 2: unknown finding 'Cough'"),
        ({"rows": [("a.png", "No Finding|Mass", "1", "5", "M", "PA")]}, r"row 2: 'No Finding' beside a finding"),
        ({"rows": [*ROWS, ("b.png", "Mass", "", "5", "M", "PA")]}, r"row 5: Patient ID is empty"),
        ({"rows": [*ROWS, ROWS[0]]}, r"image id '00000001_000' occurs twice"),
        ({"table": "labels.csv"}, r"holds no NIH table; expected Data_Entry_2017_v2020.csv"),
        ({"folders": ("pictures",)}, r"no image of Data_Entry_2017_v2020.csv lies under"),
        ({"rows": []}, r"has a header but no rows"),
        ({"header": HEADER + ",extra"}, r"not a readable table"),
    ],
)
def test_faults_are_one_line(tmp_path, change, words):
    root = collection(tmp_path / "x", **change)
    with pytest.raises(UserError, match=words) as caught:
        opened(root)
    assert "\n" not in str(caught.value)


def test_an_image_in_two_folders(tmp_path):
    root = collection(tmp_path)
    (root / "images_001" / "images").mkdir(parents=True)
    Image.new("L", (4, 4)).save(root / "images_001" / "images" / "00000001_000.png")
    with pytest.raises(UserError, match=r"00000001_000.png lies in two folders"):
        opened(root)


def test_root_is_asked_for_and_refused_where_it_makes_no_sense(tmp_path):
    with pytest.raises(UserError, match="needs --root"):
        open_source(PrepareConfig(source="nih"), None)
    with pytest.raises(UserError, match="leave --root out"):
        open_source(PrepareConfig(), str(tmp_path))
    with pytest.raises(UserError, match=r"does not exist|holds no NIH table"):
        opened(tmp_path / "nowhere")


def test_the_real_table(shared_data):
    source = opened(shared_data / "nih-256")
    assert len(source.table) == 746
    assert len(set(source.table["patient_id"].to_pylist())) == 515
    labels = matrix(source.table["labels"])
    assert (labels.any(axis=1).sum(), (labels.sum(axis=1) >= 2).sum()) == (397, 302)
    assert len(source.quarantine) == 0


def test_the_table_of_all_112120_images_with_stubs_for_images(shared_data, tmp_path):
    (tmp_path / "images").mkdir()
    table = tmp_path / "Data_Entry_2017_v2020.csv.gz"
    table.write_bytes((shared_data / "Data_Entry_2017_v2020.csv.gz").read_bytes())
    with gzip.open(table, "rt") as lines:
        names = [row["Image Index"] for row in csv.DictReader(lines)]
    for name in names[1:]:
        (tmp_path / "images" / name).touch()
    found = survey(PrepareConfig(source="nih"), str(tmp_path))
    assert found.source.quarantine["source"].to_pylist() == [f"{tmp_path}/images/{names[0]}"]
    manifest = found.manifest
    assert set(manifest["image_id"].to_pylist()) == {name.removesuffix(".png") for name in names[1:]}
    assert sum(counts.images for counts in found.counts.values()) == 112_119
    labelled = matrix(manifest["labels"]).any(1)
    assert labelled.sum() == 51_759 - 1
    assert (np.array(manifest["split"].to_pylist())[~labelled] != "train").all()


def test_several_roots_are_one_collection(tmp_path):
    first = collection(tmp_path / "a")
    more = [("00000001_001.png", "No Finding", "1", "58", "M", "AP"), ("00000003_000.png", "Mass", "3", "9", "F", "PA")]
    second = collection(tmp_path / "b", rows=more)
    source = open_source(PrepareConfig(source="nih"), [str(first), str(second)])
    assert source.table["image_id"].to_pylist() == [row[0].removesuffix(".png") for row in (*ROWS, more[1])]
    assert source.table["uri"][1].as_py() == str(first / "images" / "00000001_001.png")
    assert source.quarantine.to_pylist() == [
        {
            "source": str(second / "images" / "00000001_001.png"),
            "reason": "duplicate",
            "detail": f"same image id as {first / 'images' / '00000001_001.png'}",
        }
    ]
    assert list(source.digests) == ["root-1/Data_Entry_2017_v2020.csv", "root-2/Data_Entry_2017_v2020.csv"]
    swapped = open_source(PrepareConfig(source="nih"), [str(second), str(first)])
    assert faults(swapped) == [("00000001_001.png", "duplicate")]
    assert swapped.quarantine["source"][0].as_py() == str(first / "images" / "00000001_001.png")
    with pytest.raises(UserError, match=rf"--root {first} is given twice"):
        open_source(PrepareConfig(source="nih"), [str(first), f"{first}/"])


def test_roots_keep_their_own_faults_and_strata(tmp_path):
    first = collection(tmp_path / "a", header=HEADER.replace("Patient Gender", "Sex"))
    second = collection(tmp_path / "b", rows=[("00000003_000.png", "Mass", "3", "9", "F", "PA")])
    (first / "images" / "00000002_000.png").unlink()
    source = open_source(PrepareConfig(source="nih"), [str(first), str(second)])
    assert faults(source) == [("00000002_000.png", "missing")]
    assert source.table["sex"].to_pylist() == [None, None, "F"]
    assert source.table["age_band"].to_pylist() == ["40-59", "40-59", "0-19"]
    (second / "Data_Entry_2017_v2020.csv").unlink()
    with pytest.raises(UserError, match=rf"{second} holds no NIH table"):
        open_source(PrepareConfig(source="nih"), [str(first), str(second)])


def test_the_root_of_an_image_can_be_a_stratum(tmp_path):
    second = [("00000003_000.png", "Mass", "3", "8", "F", "AP")]
    roots = [str(collection(tmp_path / "one")), str(collection(tmp_path / "two", rows=second))]
    source = open_source(PrepareConfig(source="nih", strata=("collection",)), roots)
    assert source.table["collection"].to_pylist() == ["one", "one", "one", "two"]
    alike = [str(collection(tmp_path / part / "images", rows=rows)) for part, rows in (("a", ROWS[:1]), ("b", second))]
    source = open_source(PrepareConfig(source="nih", strata=("collection",)), alike)
    assert source.table["collection"].to_pylist() == ["1: images", "2: images"]


def test_root_may_be_repeated_on_the_command_line(tmp_path):
    first = collection(tmp_path / "a", rows=[(f"{p:08d}_000.png", "Mass", str(p), "9", "F", "PA") for p in range(40)])
    second = collection(tmp_path / "b", rows=[("00000001_000.png", "Mass", "1", "9", "F", "PA"), *ROWS[2:]])
    places = ["--root", str(first), "--root", str(second), "--out", str(tmp_path / "out")]
    done = call("prepare", "--source", "nih", *places, "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "left out: 2 images (duplicate 2)" in done.stdout


def test_two_real_folders_share_six_images(shared_data):
    roots = [str(shared_data / name) for name in ("nih-256", "nih-64")]
    config = PrepareConfig(source="nih", reduce_to=64, findings=(*FINDINGS, "No Finding"))
    found = survey(config, roots)
    assert len(found.manifest) == 746 + 779 - 6
    assert [row["reason"] for row in found.source.quarantine.to_pylist()] == ["duplicate"] * 6
    assert all("nih-64" in row["source"] for row in found.source.quarantine.to_pylist())
    assert len(set(found.manifest["image_id"].to_pylist())) == 1519
