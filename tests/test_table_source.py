"""Any table as a source: the user's own column names, both forms of labels, one-line faults, no id in the output."""

import gzip
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError
from test_chexpert import jpeg

from infra.settings import load
from mpc.errors import MissingError, UserError
from pipeline import identity, storage
from pipeline.card import read_card
from pipeline.check import check
from pipeline.manifest import BLANK, NEGATIVE, POSITIVE, UNCERTAIN, matrix
from pipeline.prepare_config import PolicyConfig, PrepareConfig, SplitConfig, TableConfig
from pipeline.shards import prepare, survey
from pipeline.sources import open_source

KEY = b"0123456789abcdef-a-key-of-a-test"
HEADER = ("Pfad", "Bild-Nr", "Fall", "Patient", "Proj", "Gruppe", "Geschl.", "Alter", "edema_gt", "mass_gt", "Liste")
ROWS = [
    ("a/1.png", "IMG-001", "ST-11", "PAT-7001", "AP", "train", "F", "63", "1", "0", "Edema|Mass"),
    ("a/2.png", "IMG-002", "ST-12", "PAT-7001", "pa", "Train", "female", "64.0", "-1", "", "Mass"),
    ("b/3.png", "IMG-003", "", "PAT-7002", "", "validate", "m", "", "TRUE", "False", ""),
    ("b/4", "IMG-004", "ST-14", "PAT-7003", "PA", "test", "?", "017Y", "0.0", "1.0", " Edema ; Mass | Edema "),
]
WIDE = {"Edema": "edema_gt", "Mass": "mass_gt"}
NAMES = {"image": "Pfad", "image_id": "Bild-Nr", "patient": "Patient", "study": "Fall"}


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv(identity.VARIABLE, KEY.decode())


def write_csv(path: Path, rows=ROWS, header=HEADER) -> None:
    text = "\n".join(",".join(cells) for cells in (header, *rows)) + "\n"
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())


def collection(root: Path, rows=ROWS, header=HEADER, file="bilder.csv") -> Path:
    root.mkdir(parents=True, exist_ok=True)
    write_csv(root / file, rows, header)
    for seed, (path, *_) in enumerate(rows):
        jpeg(root / "x.png", seed)
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / "x.png").rename(root / path)
    return root


def config_of(table=None, **changes) -> PrepareConfig:
    told = {"file": "bilder.csv", **NAMES, "label_columns": WIDE, "split": "Gruppe", **(table or {})}
    small = {"image_size": 16, "row_group": 8}
    return PrepareConfig(source="table", table=TableConfig(**told), **small | changes)


def opened(root: Path, table=None, **changes):
    return open_source(config_of(table, **changes), str(root))


def test_rows_and_label_codes(tmp_path):
    root = collection(tmp_path)
    source = opened(root, {"view": "Proj", "sex": "Geschl.", "age": "Alter"})
    assert (source.findings, source.name, source.synthetic) == (("Edema", "Mass"), "table", False)
    table = source.table
    assert table["image_id"].to_pylist() == ["IMG-001", "IMG-002", "IMG-003", "IMG-004"]
    assert table["patient_id"].to_pylist() == ["PAT-7001", "PAT-7001", "PAT-7002", "PAT-7003"]
    assert table["study_id"].to_pylist() == ["ST-11", "ST-12", "", "ST-14"]
    assert table["split"].to_pylist() == ["train", "train", "val", "test"]
    assert table["view"].to_pylist() == ["AP", "pa", "", "PA"]
    assert table["sex"].to_pylist() == ["F", "F", "M", None]
    assert table["age_band"].to_pylist() == ["60-79", "60-79", None, "0-19"]
    assert table["uri"].to_pylist() == [str(root / path) for path, *_ in ROWS], "b/4 has no suffix and is found"
    expected = [[POSITIVE, NEGATIVE], [UNCERTAIN, BLANK], [POSITIVE, NEGATIVE], [NEGATIVE, POSITIVE]]
    np.testing.assert_array_equal(matrix(table["labels"]), expected)
    assert list(source.digests) == ["bilder.csv"]
    assert len(source.quarantine) == 0


def test_what_is_not_named_is_not_read(tmp_path):
    bare = {"image_id": None, "study": None, "split": None, "label_columns": None}
    rows = [(path, *cells) for path, *cells in ROWS]
    header = tuple({"edema_gt": "Edema", "mass_gt": "Mass"}.get(name, name) for name in HEADER)
    source = opened(collection(tmp_path, rows, header), bare, findings=("Mass", "Edema"))
    assert source.findings == ("Mass", "Edema"), "columns by the names of prepare.findings"
    assert source.table["image_id"].to_pylist() == ["a/1.png", "a/2.png", "b/3.png", "b/4"]
    assert source.table["study_id"].to_pylist() == [""] * 4
    assert source.table["split"].null_count == 4
    assert source.table.column_names == ["image_id", "patient_id", "study_id", "view", "uri", "split", "labels"]


@pytest.mark.parametrize(
    ("delimiter", "findings", "expected"),
    [
        ("|", ("Edema", "Edema ; Mass", "Mass"), [[1, -2, 1], [-2, -2, 1], [-2, -2, -2], [1, 1, -2]]),
        (" ; ", ("Edema", "Edema|Mass", "Mass", "Mass | Edema"), None),
    ],
)
def test_a_column_with_lists(tmp_path, delimiter, findings, expected):
    listed = {"label_columns": None, "labels": "Liste", "delimiter": delimiter}
    source = opened(collection(tmp_path), listed)
    assert source.findings == findings
    if expected:
        np.testing.assert_array_equal(matrix(source.table["labels"]), expected)
    chosen = opened(tmp_path, listed, findings=("Mass",))
    assert chosen.findings == ("Mass",)
    with pytest.raises(UserError, match=r"prepare.findings names \['Nodule'\], which table does not have; choose from"):
        opened(tmp_path, listed, findings=("Mass", "Nodule"))


def test_what_a_list_does_not_name_is_blank_for_the_policy(tmp_path):
    listed = {"label_columns": None, "labels": "Liste"}
    config = config_of(listed, policy=PolicyConfig(blank="ignore"))
    found = survey(config, str(collection(tmp_path, [*ROWS, ("c/5.png", "I5", "", "P5", "", "train", *[""] * 5)])))
    known = matrix(found.manifest["known"])
    np.testing.assert_array_equal(known, matrix(found.manifest["labels"]).astype(bool))
    assert found.manifest["split"].to_pylist()[-1] == "unlabelled"


TYPED = {
    "Pfad": pa.array([row[0] for row in ROWS]).dictionary_encode(),
    "Bild-Nr": pa.array([1, 2, 3, 4], pa.int64()),
    "Patient": pa.array([7001.0, 7001.0, 7002.0, 7003.0]),
    "Fall": pa.array(["a", None, "c", "d"], pa.string_view()),
    "edema_gt": pa.array([True, None, True, False]),
    "mass_gt": pa.array([0.0, float("nan"), -1.0, 1.0]),
}


def test_parquet(tmp_path):
    collection(tmp_path)
    pq.write_table(pa.table(TYPED), tmp_path / "labels.bin")
    source = opened(tmp_path, {"file": "labels.bin", "split": None})
    assert source.table["study_id"].to_pylist() == ["a", "", "c", "d"]
    assert source.table["image_id"].to_pylist() == ["1", "2", "3", "4"]
    assert source.table["patient_id"].to_pylist() == ["7001", "7001", "7002", "7003"]
    expected = [[POSITIVE, NEGATIVE], [BLANK, BLANK], [POSITIVE, UNCERTAIN], [NEGATIVE, POSITIVE]]
    np.testing.assert_array_equal(matrix(source.table["labels"]), expected)


@pytest.mark.parametrize(
    ("name", "column", "words"),
    [
        ("mass_gt", pa.array([1, 0, 2, 1]), r"labels.parquet, row 3: mass_gt is '2'; labels are 1, 0, -1 or empty"),
        ("Patient", pa.array(["a", None, "b", "c"]), r"labels.parquet, row 2: Patient is empty; mend the table"),
        ("Bild-Nr", pa.array([1, 2, 3, 2]), r"labels.parquet, rows 2 and 4: the same Bild-Nr, '2'; mend the table"),
        ("Patient", pa.array([[1], [2], [3], [4]]), r"column Patient is of type list<element: int64>; give text"),
        ("Patient", pa.array([0, 1, 2, 3], pa.timestamp("s")), r"column Patient is of type timestamp"),
        (
            "Patient",
            pa.ExtensionArray.from_storage(pa.uuid(), pa.array([b"0" * 16] * 4, pa.binary(16))),
            r"column Patient is of type extension<arrow.uuid>; give text, numbers or booleans",
        ),
    ],
)
def test_parquet_that_does_not_fit(tmp_path, name, column, words):
    pq.write_table(pa.table({**TYPED, name: column}), collection(tmp_path) / "labels.parquet")
    with pytest.raises(UserError, match=words):
        opened(tmp_path, {"file": "labels.parquet", "study": None, "split": None})


def test_damaged_parquet(tmp_path):
    (collection(tmp_path) / "labels.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(UserError, match=r"labels.parquet is not a readable table: "):
        opened(tmp_path, {"file": "labels.parquet"})


def test_packed_and_elsewhere(tmp_path):
    root = collection(tmp_path / "in")
    write_csv(tmp_path / "labels.csv.gz")
    for place in (str(tmp_path / "labels.csv.gz"), f"file://{tmp_path}/labels.csv.gz"):
        source = opened(root, {"file": place})
        assert len(source.table) == 4
        assert list(source.digests) == ["labels.csv.gz"]


def test_paths_as_people_write_them(tmp_path):
    root = collection(tmp_path / "in", ROWS[1:])
    jpeg(tmp_path / "elsewhere" / "1.png")
    written = [str(tmp_path / "elsewhere" / "1.png"), "./a//2.png", "a/../b/3.png", f"file://{tmp_path}/nowhere/4.png"]
    write_csv(root / "bilder.csv", [(path, *row[1:]) for path, row in zip(written, ROWS, strict=True)])
    source = opened(root)
    tail = [uri.removeprefix(str(tmp_path)) for uri in source.table["uri"].to_pylist()]
    assert tail == ["/elsewhere/1.png", "/in/a/2.png", "/in/b/3.png", "/nowhere/4.png"], "the decoder looks at the last"
    assert source.quarantine.to_pylist() == [], "b/4, which no row names, has no suffix of an image"


def test_rows_without_file_files_without_row_and_views(tmp_path):
    rows = [*ROWS, ("c/5.png", "I5", "", "P5", "ll", "train", *[""] * 5), ("6.png", "I6", "", "P6", "X", *ROWS[0][5:])]
    root = collection(tmp_path, rows)
    (root / "a/2.png").unlink()
    jpeg(root / "c/new.JPG")
    (root / "c" / "._new.JPG").write_bytes(b"")
    (root / "c" / "notes.txt").write_text("no image")
    source = opened(root, {"view": "Proj"})
    assert source.table["image_id"].to_pylist() == ["IMG-001", "IMG-003", "IMG-004"]
    found = [(Path(row["source"]).name, row["reason"]) for row in source.quarantine.to_pylist()]
    assert found == [("5.png", "lateral"), ("6.png", "other_view"), ("2.png", "missing"), ("new.JPG", "unlisted")]
    assert "I5" in opened(root, {"view": "Proj"}, views="all").table["image_id"].to_pylist()
    assert "I5" in opened(root).table["image_id"].to_pylist(), "a column that nobody names leaves nothing out"


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (
            "Patient,Proj",
            "Pat,Proj",
            r"bilder.csv lacks the column\(s\) Patient; its header has Pfad, Bild-Nr, .*Liste; name the columns "
            r"of your table in prepare.table",
        ),
        ("edema_gt,mass_gt", "a,b", r"lacks the column\(s\) edema_gt, mass_gt; its header has"),
        ("Proj", "Patient", r"bilder.csv has two columns 'Patient'; rename one"),
        ("a/2.png", "  ", r"bilder.csv, row 3: Pfad is empty; mend the table"),
        ("PAT-7002", "", r"bilder.csv, row 4: Patient is empty; mend the table"),
        ("IMG-003", "", r"bilder.csv, row 4: Bild-Nr is empty; mend the table"),
        ("IMG-003", "IMG-001", r"bilder.csv, rows 2 and 4: the same Bild-Nr, 'IMG-001'; mend the table"),
        ("a/2.png", "./a/1.png", r"bilder.csv, rows 2 and 3: the same Pfad, 'a/1.png'; mend the table"),
        ("a/2.png", "a/../../2.png", r"row 3: Pfad is 'a/../../2.png', which leaves --root; give a URI"),
        ("a/2.png", "http://pacs/2.png", r"http://pacs/2.png: unknown scheme; give a local path, file:// or s3://"),
        ("validate", "dev", r"row 4: Gruppe is 'dev'; the splits are train, val, valid, validate, test"),
        ("validate", "", r"row 4: Gruppe is ''; the splits are"),
        (",-1,", ",Maybe,", r"bilder.csv, row 3: edema_gt is 'Maybe'; labels are 1, 0, -1 or empty"),
        ("PAT-7003", "PAT-7001", r"patient 'PAT-7001' has images in test and train \(1 such patients\)"),
    ],
)
def test_faults_of_the_table_are_one_line(tmp_path, old, new, words):
    table = collection(tmp_path) / "bilder.csv"
    table.write_text(table.read_text().replace(old, new, 1))
    with pytest.raises(UserError, match=words) as caught:
        survey(config_of(), str(tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ({"file": None}, r"prepare.table.file names no table; set it to a CSV or Parquet file below --root, or a URI"),
        ({"file": "none.csv"}, r"none.csv does not exist; mend the path"),
        ({"label_columns": None}, r"no labels are named; set prepare.table.label_columns .*, prepare.table.labels"),
        ({"label_columns": None, "labels": "Proben"}, r"lacks the column\(s\) Proben; its header has Pfad"),
    ],
)
def test_faults_of_the_settings_are_one_line(tmp_path, table, words):
    with pytest.raises(UserError, match=words) as caught:
        survey(config_of(table), str(collection(tmp_path)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ({"labels": "Liste"}, "labels and label_columns are two forms of the same labels; give one of them"),
        ({"label_columns": {}}, "label_columns names no finding; write FINDING: COLUMN for each"),
        ({"delimiter": ""}, "at least 1 character"),
        ({"label_columns": {"": "edema_gt"}}, "at least 1 character"),
    ],
)
def test_settings_that_contradict_themselves(table, words):
    with pytest.raises(ValidationError, match=words):
        config_of(table)


@pytest.mark.parametrize(("count", "what"), [(600, "600"), (0, "0")])
def test_a_column_that_is_no_list(tmp_path, count, what):
    rows = [
        (f"{n}.png", f"I{n}", "", f"P{n}", "", "train", "", "", "", "", f"report {n}" if n < count else "")
        for n in range(max(count, 3))
    ]
    root = collection(tmp_path, ROWS)
    write_csv(root / "bilder.csv", rows)
    with pytest.raises(UserError, match=rf"column Liste lists {what} different findings, not 1 to 512; check prepare"):
        opened(root, {"label_columns": None, "labels": "Liste"})


def test_nothing_at_the_root(tmp_path):
    write_csv(tmp_path / "bilder.csv")
    with pytest.raises(
        UserError, match=r"no image of bilder.csv lies under .*expected the paths in column Pfad; .* 4\)"
    ):
        opened(tmp_path)
    with pytest.raises(MissingError, match=r"nowhere does not exist; mend the path"):
        opened(tmp_path / "nowhere", {"file": str(tmp_path / "bilder.csv")})


def test_two_roots_with_the_same_findings_alone(tmp_path):
    listed = {"label_columns": None, "labels": "Liste"}
    one = collection(tmp_path / "one")
    two = collection(tmp_path / "two", [(p, f"B{i}", s, f"B{n}", *rest) for p, i, s, n, *rest in ROWS[:2]])
    with pytest.raises(UserError, match="the tables of the roots name different findings; give the same ones in each"):
        open_source(config_of(listed), [str(one), str(two)])
    both = open_source(config_of(listed, findings=("Mass",)), [str(one), str(two)])
    assert len(both.table) == 6
    assert list(both.digests) == ["root-1/bilder.csv", "root-2/bilder.csv"]


def many(patients: int) -> list[tuple[str, ...]]:
    """Two images a patient; the ids look like nothing else in the output."""
    return [
        (f"d{n % 7}/{n}-{side}.png", f"IMAGE{n}x{side}", f"STUDY{n}y", f"PATIENT{n}z", "PA", "train", "F", "63",
         "01"[n % 2], "01"[n % 3 == 0], "")
        for n in range(patients) for side in "AB"
    ]  # fmt: skip


def texts_of(file: Path) -> str:
    """Everything that a file tells: its bytes, and the text columns of a Parquet file, which are packed."""
    text = file.read_bytes().decode("latin-1")
    if file.suffix == ".parquet":
        table = pq.read_table(file)
        plain = [name for name in table.column_names if name != "image"]
        text += str(table.select(plain).to_pylist()) + str(table.schema.metadata) + str(pq.read_metadata(file))
    return text


def test_prepare_and_no_id_in_any_byte_of_the_output(tmp_path, ray_session):
    rows = many(40)
    root, out = collection(tmp_path / "in", rows), tmp_path / "out"
    (root / rows[0][0]).write_bytes(b"no image")
    (root / rows[2][0]).unlink()
    split = SplitConfig(by="hash", val=0.25, test=0.25)
    names = {"view": "Proj", "sex": "Geschl.", "age": "Alter", "split": None}
    card = prepare(config_of(names, split=split, strata=("sex", "age_band"), max_bad=0.1), str(root), str(out))
    assert check(str(out)) == []
    assert read_card(str(out)) == card
    assert card.quarantined == {"missing": 1, "unsupported": 1}
    written = {file: texts_of(file) for file in out.rglob("*") if file.is_file()}
    assert {file.name for file in written} >= {"dataset.json", "quarantine.parquet", "train-00000.parquet"}
    assert rows[0][0] in written[out / "quarantine.parquet"], "packed text is read"
    for file, text in written.items():
        assert not [cell for row in rows for cell in row[1:4] if cell in text], file
        assert KEY.decode() not in text, file
    stored = [row for shard in card.shards for row in pq.read_table(out / shard.path).to_pylist()]
    assert len(stored) == 78
    hashed = {identity.keyed_hash(row[3], b"patient", KEY) for row in rows}
    assert {row["patient_id"] for row in stored} == hashed
    assert {row["sex"] for row in stored} == {"F"}
    assert {row["age_band"] for row in stored} == {"60-79"}


def test_object_storage(bucket, tmp_path):
    root = collection(tmp_path)
    for path in root.rglob("*"):
        if path.is_file():
            storage.write_bytes(storage.join(f"{bucket}/site", str(path.relative_to(root))), path.read_bytes())
    remote, local = (survey(config_of(), place) for place in (f"{bucket}/site", str(root)))
    assert remote.manifest.drop_columns("uri").equals(local.manifest.drop_columns("uri"))
    assert remote.source.table["uri"][0].as_py() == f"{bucket}/site/a/1.png"


def test_the_mapping_on_the_command_line():
    for override in ("prepare.table.label_columns={A.b: c}", "prepare.table={label_columns: {A.b: c}}"):
        assert load(None, [override]).prepare.table.label_columns == {"A.b": "c"}
    with pytest.raises(UserError, match=r"unknown key prepare.table.label_column in --set; did you mean prepare.table"):
        load(None, ["prepare.table.label_column={A: b}"])
