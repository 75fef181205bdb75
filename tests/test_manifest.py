"""manifest, policy and split: label codes by hand, patients never torn apart, one clear line for every fault."""

import hashlib

import numpy as np
import pyarrow as pa
import pytest

from mpc.errors import UserError
from pipeline import manifest, policy, split
from pipeline.manifest import SourceTable, keep_findings, list_column, matrix, source_table
from pipeline.prepare_config import PolicyConfig, SplitConfig

FINDINGS = ("Effusion", "Mass", "Nodule")
CODES = np.array([[1, 0, -1], [0, -2, 1], [-1, -1, -2], [0, 0, 0]], np.int8)


def a_source(codes=CODES, **columns) -> SourceTable:
    rows = range(len(codes))
    defaults = {
        "image_id": [f"i{row}" for row in rows],
        "patient_id": [f"p{row}" for row in rows],
        "uri": [f"/data/{row}.png" for row in rows],
    }
    return SourceTable(source_table(defaults | columns, codes), FINDINGS, "test", synthetic=True)


def many(patients: int = 2000, each: int = 3) -> pa.Table:
    ids = [f"{p}-{i}" for p in range(patients) for i in range(each)]
    owners = [f"patient{p}" for p in range(patients) for _ in range(each)]
    codes = np.ones((len(ids), 3), np.int8)
    return policy.apply(a_source(codes, image_id=ids, patient_id=owners, uri=ids), PolicyConfig())[0]


@pytest.mark.parametrize(
    ("uncertain", "blank", "labels", "known"),
    [
        ("zeros", "zeros", [[1, 0, 0], [0, 0, 1], [0, 0, 0], [0, 0, 0]], [[1, 1, 1], [1, 1, 1], [1, 1, 1], [1, 1, 1]]),
        ("ones", "ignore", [[1, 0, 1], [0, 0, 1], [1, 1, 0], [0, 0, 0]], [[1, 1, 1], [1, 0, 1], [1, 1, 0], [1, 1, 1]]),
        ("ignore", "ones", [[1, 0, 0], [0, 1, 1], [0, 0, 1], [0, 0, 0]], [[1, 1, 0], [1, 1, 1], [0, 0, 1], [1, 1, 1]]),
    ],
)
def test_policy_by_hand(uncertain, blank, labels, known):
    table, counts = policy.apply(a_source(), PolicyConfig(uncertain=uncertain, blank=blank))
    np.testing.assert_array_equal(matrix(table["labels"]), labels)
    np.testing.assert_array_equal(matrix(table["known"]), np.array(known, bool))
    assert counts["Nodule"].as_dict() == {"positive": 1, "negative": 1, "uncertain": 1, "blank": 1}
    assert counts["Effusion"].as_dict() == {"positive": 1, "negative": 2, "uncertain": 1, "blank": 0}


def test_one_finding_departs_from_the_policy():
    own = {"Nodule": {"uncertain": "ones"}, "Mass": {"uncertain": "zeros", "blank": "ones"}}
    config = PolicyConfig.model_validate({"uncertain": "ignore", "blank": "ignore", "findings": own})
    table, _ = policy.apply(a_source(), config)
    np.testing.assert_array_equal(matrix(table["labels"]), [[1, 0, 1], [0, 1, 1], [0, 0, 0], [0, 0, 0]])
    known = [[1, 1, 1], [1, 1, 1], [0, 1, 0], [1, 1, 1]]
    np.testing.assert_array_equal(matrix(table["known"]), np.array(known, bool))
    with pytest.raises(UserError, match=r"policy\.findings names 'Cough'.*choose from Effusion, Mass, Nodule"):
        policy.apply(a_source(), PolicyConfig.model_validate({"findings": {"Cough": {"blank": "ones"}}}))


def test_findings_are_chosen_and_reordered():
    kept = keep_findings(a_source(), ("Nodule", "Effusion"))
    assert kept.findings == ("Nodule", "Effusion")
    np.testing.assert_array_equal(matrix(kept.table["labels"]), CODES[:, [2, 0]])
    np.testing.assert_array_equal(matrix(kept.table["labels"].slice(1, 2)), CODES[1:3, [2, 0]])
    with pytest.raises(UserError, match=r"Cough.*choose from Effusion, Mass, Nodule"):
        keep_findings(a_source(), ("Cough",))
    with pytest.raises(UserError, match="twice"):
        keep_findings(a_source(), ("Mass", "Mass"))


def test_hash_split_is_by_patient_stable_and_of_the_asked_size():
    table = many()
    assigned = split.assign(table, SplitConfig(by="hash", val=0.1, test=0.2))
    by_patient: dict[str, set[str]] = {}
    for patient, name in zip(assigned["patient_id"].to_pylist(), assigned["split"].to_pylist(), strict=True):
        by_patient.setdefault(patient, set()).add(name)
    assert all(len(names) == 1 for names in by_patient.values())
    shares = {name: sum(names == {name} for names in by_patient.values()) / 2000 for name in manifest.SPLITS}
    assert shares["val"] == pytest.approx(0.1, abs=0.02)
    assert shares["test"] == pytest.approx(0.2, abs=0.03)
    order = np.random.default_rng(0).permutation(len(table))
    shuffled = split.assign(table.take(order), SplitConfig(by="hash", val=0.1, test=0.2))
    assert shuffled["split"].to_pylist() == assigned["split"].take(order).to_pylist()
    salted = split.assign(table, SplitConfig(by="hash", val=0.1, test=0.2, salt="other"))
    assert salted["split"].to_pylist() != assigned["split"].to_pylist()


def test_folds_test_every_patient_exactly_once():
    table, folds = many(1000, 2), 4
    tested: list[str] = []
    val_patients: list[set[str]] = []
    for fold in range(folds):
        assigned = split.assign(table, SplitConfig(by="hash", folds=folds, fold=fold, val=0.2))
        pairs = set(zip(assigned["patient_id"].to_pylist(), assigned["split"].to_pylist(), strict=True))
        assert len(pairs) == 1000, "no patient is in two splits"
        held_out = [patient for patient, name in pairs if name == "test"]
        assert len(held_out) / 1000 == pytest.approx(1 / folds, abs=0.05)
        val_patients.append({patient for patient, name in pairs if name == "val"})
        assert len(val_patients[-1]) / (1000 - len(held_out)) == pytest.approx(0.2, abs=0.05)
        tested += held_out
    assert sorted(tested) == sorted({f"patient{p}" for p in range(1000)})
    assert not set.intersection(*val_patients), "each fold draws its own val"


def test_the_fold_of_one_patient_by_hand():
    draw = int.from_bytes(hashlib.blake2b(b"mpc-cxr:patient7", digest_size=8).digest(), "big") / 2**64
    names = [
        split.assign(many(), SplitConfig(by="hash", folds=5, fold=fold, test=0.9))["split"][21].as_py()
        for fold in range(5)
    ]
    assert [name == "test" for name in names] == [int(draw * 5) == fold for fold in range(5)]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"folds": 5, "fold": 5, "by": "hash"}, "fold 5 is not one of folds 5; choose 0 to 4"),
        ({"fold": 1}, "fold 1 is not one of folds 1"),
        ({"folds": 5}, "cannot follow by=official; set prepare.split.by=hash"),
        ({"folds": 0}, "greater than or equal to 1"),
        ({"folds": 2, "by": "hash", "val": 1.0}, "val 1.0 leaves nothing"),
    ],
)
def test_folds_that_cannot_be(change, words):
    with pytest.raises(ValueError, match=words):
        SplitConfig(**change)


def test_the_hash_of_one_patient_by_hand():
    draw = int.from_bytes(hashlib.blake2b(b"mpc-cxr:patient7", digest_size=8).digest(), "big") / 2**64
    expected = "test" if draw < 0.2 else "val" if draw < 0.5 else "train"
    assigned = split.assign(many(), SplitConfig(by="hash", val=0.3, test=0.2))
    row = assigned["patient_id"].to_pylist().index("patient7")
    assert assigned["split"][row].as_py() == expected


def test_official_test_is_kept_and_val_is_carved_from_training_patients():
    table = many(500, 2)
    official = ["test" if row < 200 else "train" for row in range(1000)]
    table = table.set_column(table.schema.get_field_index("split"), "split", pa.array(official))
    assigned = split.assign(table, SplitConfig(val=0.25))["split"].to_pylist()
    assert assigned[:200] == ["test"] * 200
    assert assigned[200:].count("val") / 800 == pytest.approx(0.25, abs=0.06)
    ignored = split.assign(table, SplitConfig(by="hash", val=0.25))["split"].to_pylist()
    assert ignored[:200] != ["test"] * 200
    own = ["test", "val"] + ["train"] * 8
    complete = many(10, 1)
    complete = complete.set_column(complete.schema.get_field_index("split"), "split", pa.array(own))
    assert split.assign(complete, SplitConfig(val=0.5))["split"].to_pylist() == own


def with_split(table: pa.Table, values: list[str | None]) -> pa.Table:
    return table.set_column(table.schema.get_field_index("split"), "split", pa.array(values, pa.string()))


def in_file(folder, text: str, **columns) -> list[str]:
    path = folder / "splits.csv"
    path.write_text(text)
    table, _ = policy.apply(a_source(patient_id=["a", "a", "b", "c"], **columns), PolicyConfig())
    return split.assign(table, SplitConfig(by="file", file=str(path)))["split"].to_pylist()


def test_split_from_a_file_by_patient_or_by_image(tmp_path):
    by_patient = "patient_id,note,split\nc,x,test\na,,train\nb,,val\nz,,test\n"
    assert in_file(tmp_path, by_patient) == ["train", "train", "val", "test"]
    official = ["test", "test", "train", "train"]
    assert in_file(tmp_path, by_patient, split=official) == ["train", "train", "val", "test"]
    by_image = "split,image_id\ntest,i0\ntest,i1\nval,i3\ntrain,i2\n"
    assert in_file(tmp_path, by_image) == ["test", "test", "train", "val"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("patient_id,split\na,train\nb,val\n", r"splits\.csv lacks 1 of 4 images, first patient_id 'c'; add them"),
        ("patient_id,split\na,train\nb,dev\nc,test\n", r"splits\.csv, row 3: split is 'dev'; write train, val, test"),
        ("patient_id,split\na,train\nb,val\nc,test\na,test\n", r"puts patient_id 'a' into test and train"),
        ("image_id,split\ni0,train\ni1,test\ni2,val\ni3,test\n", r"patient 'a' has images in test and train"),
        ("patient,split\na,train\n", r"has none of the columns patient_id and image_id; give it exactly one"),
        ("patient_id,image_id,split\na,i0,train\n", r"has patient_id and image_id of the columns"),
        ("patient_id,part\na,train\n", r"lacks the column\(s\) split; its header has patient_id, part"),
        ("patient_id,split\na,train\nb,train\nc,test\n", r"split 'val' is empty \(4 images; .*splits\.csv\); list"),
    ],
)
def test_faults_of_a_split_file(tmp_path, text, words):
    with pytest.raises(UserError, match=words):
        in_file(tmp_path, text)


def test_a_split_file_is_given_where_it_is_read():
    for config in ({"by": "file"}, {"file": "splits.csv"}):
        with pytest.raises(ValueError, match="set both"):
            SplitConfig.model_validate(config)


def test_split_faults():
    table = many(4, 2)
    with pytest.raises(UserError, match=r"2 of 8 images are in no official list, first '3-0'"):
        split.assign(with_split(table, ["train"] * 6 + [None] * 2), SplitConfig())
    with pytest.raises(UserError, match=r"patient 'patient0' has images in test and train"):
        split.assign(with_split(table, ["test"] + ["train"] * 6 + ["val"]), SplitConfig())
    with pytest.raises(UserError, match=r"split 'val' is empty \(8 images"):
        split.assign(table, SplitConfig(by="hash", val=0.0, test=0.5))


def test_training_rows_without_known_positive_are_set_apart():
    table, _ = policy.apply(a_source(split=["train", "train", "train", "test"]), PolicyConfig(uncertain="ignore"))
    apart = split.set_apart(table)["split"].to_pylist()
    assert apart == ["train", "train", "unlabelled", "test"]


def good() -> pa.Table:
    table, _ = policy.apply(a_source(split=["train", "val", "test", "train"]), PolicyConfig())
    return table.cast(manifest.schema(3))


def test_check_accepts_and_names_each_fault():
    manifest.check(good(), FINDINGS)

    def changed(name: str, values) -> pa.Table:
        table = good()
        position = table.schema.get_field_index(name)
        column = list_column(values) if name in ("labels", "known") else pa.array(values, pa.string())
        return table.set_column(position, table.schema.field(position), column)

    labels = np.zeros((4, 3), np.int8)
    labels[0, 0] = 2
    unknown = np.ones((4, 3), bool)
    unknown[0, 0] = False
    cases = [
        (good().drop_columns("view"), "columns are"),
        (changed("image_id", ["i0", "i1", "i1", "i3"]), "image id 'i1' occurs twice"),
        (changed("patient_id", ["p", "p", "q", "r"]), r"patient 'p' has images in train and val"),
        (changed("patient_id", ["", "p", "q", "r"]), "rows without patient_id"),
        (changed("split", ["train", "val", "test", "dev"]), "split 'dev'"),
        (changed("labels", labels), r"labels hold \[2\]"),
        (changed("known", unknown), "positive labels that are not known"),
    ]
    for table, words in cases:
        with pytest.raises(UserError, match=words):
            manifest.check(table, FINDINGS)
    with pytest.raises(UserError, match="columns are"):
        manifest.check(good(), FINDINGS[:2])


def test_unlabelled_belongs_to_training_in_the_search_for_leaks():
    patients = pa.chunked_array([["p", "p", "q", "q"]])
    assert manifest.leaked_patients(patients, pa.chunked_array([["train", "unlabelled", "val", "val"]])) == {}
    assert manifest.leaked_patients(patients, pa.chunked_array([["train", "train", "val", "unlabelled"]])) == {
        "q": ["train", "val"]
    }
