"""DICOM folders as a source: headers joined to a table by every key, reasons for each file left out, nothing leaks."""

import hashlib
import io
import warnings
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pydicom
import pytest
from pydicom.dataelem import DataElement
from test_decode import dicom
from test_table_source import texts_of

from mpc.errors import UserError
from pipeline import headers, identity, storage
from pipeline.check import check
from pipeline.dicom import DicomError
from pipeline.manifest import BLANK, NEGATIVE, POSITIVE, matrix
from pipeline.prepare_config import DicomConfig, PrepareConfig, SplitConfig, TableConfig
from pipeline.shards import prepare, survey
from pipeline.sources import open_source

pytestmark = pytest.mark.usefixtures("ray_session")
KEY = b"0123456789abcdef-a-key-of-a-test"
FILES = [  # path, SOP instance, study, patient, accession number, modality, view
    ("s1/IM0001", "1.2.3.1", "1.2.1", "MRN-7001", "ACC-1", "DX", "PA"),
    ("s1/IM0002", "1.2.3.2", "1.2.1", "MRN-7001", "ACC-1", "CR", "LL"),
    ("s2/3.dcm", "1.2.3.3", "1.2.2", "MRN-7002", "ACC-2", "CR", ""),
    ("s3/4.DCM", "1.2.3.4", "1.2.3", "MRN-7003", "ACC-3", "RG", "ap"),
]
ENTRIES = {"1.2.3.1": ("1", "0"), "1.2.3.2": ("1", "0"), "1.2.3.3": ("", "1"), "1.2.3.4": ("0", "1")}
ANY = SplitConfig(by="hash", val=0.34, test=0.33, salt="5")  # one of three patients each
SECRET = {"PatientName": "Doe^Jane", "PatientBirthDate": "19440229", "InstitutionName": "St. Elsewhere"}
KEYS = {"sop_instance_uid": 1, "study_instance_uid": 2, "patient_id": 3, "accession_number": 4, "file": 0}


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv(identity.VARIABLE, KEY.decode())


def scan(seed: int, uid: str, study: str, patient: str, accession: str, modality: str, view: str, **more) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (16, 16), dtype=np.uint8)
    told = {"SOPInstanceUID": uid, "StudyInstanceUID": study, "PatientID": patient, "AccessionNumber": accession}
    told |= {"Modality": modality, "ViewPosition": view, "PatientSex": "F", "PatientAge": "077Y"}
    return dicom(pixels, **SECRET, **told, **more)


def collection(root: Path, files=FILES, lines=None) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    for seed, (path, *header) in enumerate(files):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(scan(seed, *header))
    write_labels(root, lines or [(uid, *ENTRIES[uid]) for _, uid, *_ in files])
    return root


def write_labels(root: Path, lines, header=("key", "edema", "mass")) -> None:
    (root / "labels.csv").write_text("\n".join(",".join(cells) for cells in (header, *lines)) + "\n")


def config_of(table=None, dicom=None, **changes) -> PrepareConfig:
    labels = {"Edema": "edema", "Mass": "mass"}
    told = TableConfig(**{"file": "labels.csv", "image": "key", "label_columns": labels, **(table or {})})
    small = {"image_size": 16, "row_group": 8}
    return PrepareConfig(source="dicom", table=told, dicom=DicomConfig(**dicom or {}), **small | changes)


def opened(root: Path, table=None, dicom=None, **changes):
    return open_source(config_of(table, dicom, **changes), str(root))


def faults(source) -> list[tuple[str, str]]:
    return [(Path(row["source"]).name, row["reason"]) for row in source.quarantine.to_pylist()]


def test_headers_joined_to_labels(tmp_path):
    (collection(tmp_path) / "DICOMDIR").write_bytes(b"an index")
    (tmp_path / ".hidden").write_bytes(b"nothing")
    source = opened(tmp_path)
    assert (source.findings, source.name, source.synthetic) == (("Edema", "Mass"), "dicom", False)
    table = source.table
    assert table["image_id"].to_pylist() == ["1.2.3.1", "1.2.3.3", "1.2.3.4"]
    assert table["patient_id"].to_pylist() == ["MRN-7001", "MRN-7002", "MRN-7003"]
    assert table["study_id"].to_pylist() == ["1.2.1", "1.2.2", "1.2.3"]
    assert table["view"].to_pylist() == ["PA", "", "AP"]
    assert table["uri"].to_pylist() == [str(tmp_path / path) for path in ("s1/IM0001", "s2/3.dcm", "s3/4.DCM")]
    assert table["split"].null_count == 3
    expected = [[POSITIVE, NEGATIVE], [BLANK, POSITIVE], [NEGATIVE, POSITIVE]]
    np.testing.assert_array_equal(matrix(table["labels"]), expected)
    assert faults(source) == [("IM0002", "lateral")]
    assert list(source.digests) == ["labels.csv"]
    assert table.column_names == ["image_id", "patient_id", "study_id", "view", "uri", "split", "labels"]


@pytest.mark.parametrize("name", KEYS)
def test_every_key(tmp_path, name):
    keys = list(dict.fromkeys(row[KEYS[name]] for row in FILES))
    if name == "file":
        keys[0] = f"./{keys[0]}"
    root = collection(tmp_path, lines=[(key, "1", str(position % 2)) for position, key in enumerate(keys)])
    source = opened(root, dicom={"key": name})
    assert source.table["image_id"].to_pylist() == ["1.2.3.1", "1.2.3.3", "1.2.3.4"]
    order = [keys.index(key) for row in (0, 2, 3) if (key := FILES[row][KEYS[name]]) in keys or (key := f"./{key}")]
    assert matrix(source.table["labels"])[:, 1].tolist() == [position % 2 for position in order]


def test_reasons_by_hand(tmp_path):
    files = [
        *FILES,
        ("x/ct", "1.2.4.1", "1.2.4", "MRN-7004", "", "CT", "PA"),
        ("x/nothing", "1.2.4.2", "1.2.4", "MRN-7004", "", "", "PA"),
        ("x/rld", "1.2.4.3", "1.2.4", "MRN-7004", "", "DX", "RLD"),
        ("x/oblique", "1.2.4.4", "1.2.4", "MRN-7004", "", "DX", "LLO"),
        ("x/unlabelled", "1.2.4.5", "1.2.4", "MRN-7004", "", "DX", "PA"),
        ("x/nobody", "1.2.4.6", "1.2.4", " ", "", "DX", "PA"),
        ("x/twice", "1.2.3.1", "1.2.1", "MRN-7001", "", "DX", "PA"),
        ("x/nameless", "", "1.2.4", "MRN-7004", "", "DX", "PA"),
    ]
    lines = [(uid, "1", "0") for uid in dict.fromkeys(row[1] for row in files) if uid not in ("", "1.2.4.5")]
    root = collection(tmp_path, files, [*lines, ("9.9.9", "1", "0")])
    (root / "readme.txt").write_text("no DICOM")
    whole = (root / "s1/IM0001").read_bytes()
    (root / "x/zcut").write_bytes(whole[:200])
    found = faults(opened(root))
    assert found == [
        ("readme.txt", "unsupported"), ("nameless", "unreadable"), ("zcut", "unreadable"), ("ct", "other_modality"),
        ("nothing", "other_modality"), ("IM0002", "lateral"), ("rld", "lateral"), ("oblique", "other_view"),
        ("unlabelled", "no_labels"), ("nobody", "no_patient"), ("twice", "duplicate"),
        ("labels.csv, row 11", "missing"),
    ]  # fmt: skip
    unusable = survey(config_of(split=ANY), str(root)).unusable
    assert unusable == {"unsupported": 1, "unreadable": 2, "no_patient": 1, "missing": 1}
    everything = opened(root, dicom={"modalities": ("cr", "DX", "RG", "CT")}, views="all")
    assert set(everything.table["view"].to_pylist()) == {"PA", "LL", "", "AP", "RLD", "OTHER"}
    assert "1.2.4.1" in everything.table["image_id"].to_pylist()


def test_no_id_of_the_table_in_the_quarantine(tmp_path):
    root = collection(tmp_path, lines=[("MRN-7001", "1", "0"), ("MRN-7002", "1", "0"), ("MRN-9999", "1", "0")])
    source = opened(root, dicom={"key": "patient_id"})
    missing = [row for row in source.quarantine.to_pylist() if row["reason"] == "missing"]
    where = f"{root}/labels.csv, row 4"
    assert missing == [{"source": where, "reason": "missing", "detail": missing[0]["detail"]}]
    assert "9999" not in str(source.quarantine.to_pylist())


def test_split_and_strata_from_the_table_before_the_header(tmp_path):
    root = collection(tmp_path)
    lines = [(uid, "1", "0", split, "m", "12") for (_, uid, *_), split in zip(FILES, ("train",) * 4, strict=True)]
    write_labels(root, lines, ("key", "edema", "mass", "group", "gender", "years"))
    header = opened(root, {"split": "group"}, strata=("sex", "age_band")).table
    assert (header["sex"].to_pylist(), header["age_band"].to_pylist()) == (["F"] * 3, ["60-79"] * 3)
    assert header["split"].to_pylist() == ["train"] * 3
    told = opened(root, {"sex": "gender", "age": "years"}, strata=("sex", "age_band")).table
    assert (told["sex"].to_pylist(), told["age_band"].to_pylist()) == (["M"] * 3, ["0-19"] * 3)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("key,", "uid,", r"labels.csv lacks the column\(s\) key; its header has uid, edema, mass; name the columns of"),
        ("1.2.3.2,", "1.2.3.1,", r"labels.csv, rows 2 and 3: the same key, '1.2.3.1'; mend the table"),
        ("1.2.3.2,", ",", r"labels.csv, row 3: key is empty; mend the table"),
        ("1.2.3.1,1,0", "1.2.3.1,yes,0", r"labels.csv, row 2: edema is 'yes'; labels are 1, 0, -1 or empty"),
        (
            "1.2.3.",
            "2.25.",
            r"no image of labels.csv lies under .*: expected DICOM files whose sop_instance_uid is in column key; all "
            r"rows are left out \(lateral 1, no_labels 3\)",
        ),
    ],
)
def test_faults_of_the_table_are_one_line(tmp_path, old, new, words):
    table = collection(tmp_path) / "labels.csv"
    table.write_text(table.read_text().replace(old, new))
    with pytest.raises(UserError, match=words) as caught:
        opened(tmp_path)
    assert "\n" not in str(caught.value)


def test_faults_of_the_place_are_one_line(tmp_path):
    with pytest.raises(UserError, match=r"labels.csv does not exist; mend the path"):
        opened(tmp_path)
    write_labels(tmp_path, [("1.2.3.1", "1", "0")])
    with pytest.raises(UserError, match=r"holds no files beside the table; give the folder of the DICOM files as"):
        opened(tmp_path)
    (tmp_path / "readme.txt").write_text("no DICOM")
    with pytest.raises(UserError, match=r"none of its 1 files has a readable .* \(first readme.txt: not DICOM by"):
        opened(tmp_path)
    collection(tmp_path)
    with pytest.raises(UserError, match=r"prepare.task_cpus=4096, but no machine offers more than"):
        opened(tmp_path, task_cpus=4096)


def test_headers_of_many_files_keep_their_order(tmp_path, monkeypatch):
    monkeypatch.setattr(headers, "CHUNK", 3)
    for number in range(8):
        (tmp_path / str(number)).write_bytes(scan(number, f"1.2.{number}", "1", "P", "", "DX", "PA"))
    uris = [str(tmp_path / str(number)) for number in (*range(8), 99)]
    found = headers.read_headers(uris, ["SOPInstanceUID", "AccessionNumber"], 1.0)
    assert found.column_names == ["uri", "SOPInstanceUID", "AccessionNumber", "reason", "detail"]
    assert found["uri"].to_pylist() == uris
    assert found["SOPInstanceUID"].to_pylist() == [f"1.2.{number}" for number in range(8)] + [""]
    assert found["reason"].to_pylist() == [""] * 8 + ["missing"]
    with pytest.raises(UserError, match=r"^ftp://pacs/1: unknown scheme; give a local path, file:// or s3://$"):
        headers.read_headers([*uris, "ftp://pacs/1"], ["Modality"], 1.0)


def test_only_named_values_are_read():
    data = scan(0, "1.2.3", "1.2", "MRN-7001", "ACC-1", "DX", "PA", OtherPatientIDs=["A1", "B2"])
    found = headers.read_header(io.BytesIO(data), ["Modality", "PatientID"])
    assert found == {"Modality": "DX", "PatientID": "MRN-7001"}
    with pytest.raises(AssertionError, match="PatientName"):
        headers.read_headers(["x"], ["PatientName"], 1.0)
    end = data.index(pydicom.tag.Tag("PixelData").group.to_bytes(2, "little") + b"\x10\x00OW")
    assert headers.read_header(io.BytesIO(data[:end]), ["PatientID"]) == {"PatientID": "MRN-7001"}, "no pixel is read"


def test_nothing_is_said_about_doubtful_values(recwarn, caplog, capfd):
    """Pydicom quotes values that break its rules in warnings and logs; here nobody hears of them."""
    dataset = pydicom.dcmread(io.BytesIO(scan(0, "1.2.3", "1.2", "x", "", "DX", "PA")))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        doubtful = (
            ("PatientID", "LO", "DOE-JANE-" * 9),
            ("StudyInstanceUID", "UI", "DOE.JANE"),
            ("PatientAge", "AS", "DOE"),
        )
        for name, kind, value in doubtful:
            dataset[name] = DataElement(name, kind, value, validation_mode=pydicom.config.IGNORE)
        buffer = io.BytesIO()
        dataset.save_as(buffer)
    buffer.seek(0)
    found = headers.read_header(buffer, ["PatientID", "StudyInstanceUID", "PatientAge"])
    assert found == {"PatientID": "DOE-JANE-" * 9, "StudyInstanceUID": "DOE.JANE", "PatientAge": "DOE"}
    said = []
    for cut in range(140, 700, 7):
        try:
            headers.read_header(io.BytesIO(buffer.getvalue()[:cut]), ["PatientID"])
        except DicomError as fault:
            said.append(str(fault))
    assert said
    assert "DOE" not in "".join(said)
    assert not recwarn.list
    assert not caplog.records
    assert "DOE" not in "".join(capfd.readouterr())


def test_prepare_and_no_id_in_any_byte_of_the_output(tmp_path):
    files = [
        (f"d{n % 5}/{n}", f"1.2.826.77{n}01", f"1.2.826.88{n}02", f"MRN{n // 2}q", f"ACC{n}q", "DX", "PA")
        for n in range(60)
    ]
    lines = [(row[4], "01"[n % 2], "01"[n % 3 == 0]) for n, row in enumerate(files)]
    root, out = collection(tmp_path / "in", files, [*lines, ("ACC77q", "1", "0")]), tmp_path / "out"
    split = SplitConfig(by="hash", val=0.25, test=0.25)
    changes = {"split": split, "strata": ("sex", "age_band"), "max_bad": 0.1}
    card = prepare(config_of(None, {"key": "accession_number"}, **changes), str(root), str(out))
    assert check(str(out)) == []
    assert card.quarantined == {"missing": 1}
    stored = [row for shard in card.shards for row in pq.read_table(out / shard.path).to_pylist()]
    person = {"digest_size": 16, "key": KEY, "person": b"patient"}
    assert {row["patient_id"] for row in stored} == {
        hashlib.blake2b(r[3].encode(), **person).hexdigest() for r in files
    }
    assert len(stored) == 60
    assert {(row["sex"], row["age_band"]) for row in stored} == {("F", "60-79")}
    ids = [cell for row in files for cell in row[1:5]] + ["ACC77q", *SECRET.values(), "Doe", KEY.decode()]
    for file in (path for path in out.rglob("*") if path.is_file()):
        text = texts_of(file)
        assert not [cell for cell in ids if cell in text], file


def test_object_storage(bucket, tmp_path):
    root = collection(tmp_path)
    for path in root.rglob("*"):
        if path.is_file():
            storage.write_bytes(storage.join(f"{bucket}/pacs", str(path.relative_to(root))), path.read_bytes())
    for name in ("sop_instance_uid", "file"):
        if name == "file":
            lines = [(path, *ENTRIES[uid]) for path, uid, *_ in FILES]
            write_labels(root, lines)
            storage.write_bytes(f"{bucket}/pacs/labels.csv", (root / "labels.csv").read_bytes())
        remote, local = (opened(place, dicom={"key": name}) for place in (f"{bucket}/pacs", root))
        assert remote.table.drop_columns("uri").equals(local.table.drop_columns("uri"))
        assert remote.table["uri"][0].as_py() == f"{bucket}/pacs/s1/IM0001"
        assert remote.quarantine["reason"].to_pylist() == ["lateral"], "the table itself is no file of the folder"
