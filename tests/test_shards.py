"""prepare on real Ray: what it writes, twice the same bytes, nothing lost when killed, and limits that hold."""

import hashlib
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from ray.data import DataContext
from test_nih import collection

from mpc.errors import UserError
from pipeline import storage, tasks
from pipeline.card import DatasetCard, read_card
from pipeline.check import check
from pipeline.decode import decode
from pipeline.manifest import matrix
from pipeline.pixels import load
from pipeline.prepare_config import PhantomConfig, PrepareConfig, SplitConfig
from pipeline.shards import prepare, survey

pytestmark = pytest.mark.usefixtures("ray_session")
HALVES = SplitConfig(val=0.25, test=0.25)


def phantoms(images: int = 90, **changes) -> PrepareConfig:
    small = {"image_size": 32, "row_group": 8, "split": HALVES, "phantom": PhantomConfig(images=images, profile="nih")}
    return PrepareConfig(**small | changes)


def rows_of(folder) -> list[dict]:
    return [
        row for shard in read_card(str(folder)).shards for row in pq.read_table(Path(folder) / shard.path).to_pylist()
    ]


def digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def nih(root: Path, patients: int = 40) -> Path:
    findings = ("Mass", "Effusion|Mass", "Hernia", "No Finding")
    rows = [
        (f"{p:08d}_{i:03d}.png", findings[(p + i) % 4], str(p), "50", "F", "PA")
        for p in range(patients)
        for i in (0, 1)
    ]
    return collection(root, rows=rows)


def test_phantoms_become_a_sound_data_set(tmp_path):
    calls = []
    card = prepare(phantoms(), None, str(tmp_path / "out"), progress=lambda done, total: calls.append((done, total)))
    assert card.synthetic
    assert check(str(tmp_path / "out")) == []
    assert read_card(str(tmp_path / "out")) == card
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "dataset.json",
        "near_duplicates.parquet",
        "quarantine.parquet",
        "shards",
    ]
    assert sorted(calls) == calls
    assert calls[-1] == (90, 90)
    rows = rows_of(tmp_path / "out")
    assert [row["row"] for row in rows] == list(range(90))
    assert len({row["image_id"] for row in rows}) == 90
    order = {"train": 0, "val": 1, "test": 2, "unlabelled": 3}
    assert [order[row["split"]] for row in rows] == sorted(order[row["split"]] for row in rows)
    assert card.rows("train") == range(card.counts["train"].images)
    assert all(
        any(row["labels"]) == (row["split"] != "unlabelled") for row in rows if row["split"] in ("train", "unlabelled")
    )
    assert "sex" not in rows[0]
    assert "uri" not in rows[0]
    expected = survey(phantoms(), None).manifest
    assert [row["image_id"] for row in rows] == expected["image_id"].to_pylist()
    np.testing.assert_array_equal([row["labels"] for row in rows], matrix(expected["labels"]))
    for position in (0, 41, 89):
        pixels = np.frombuffer(rows[position]["image"], np.uint8).reshape(32, 32)
        np.testing.assert_array_equal(pixels, load(expected["uri"][position].as_py(), 32, "pad"))
    assert max(max(shard.row_groups) for shard in card.shards) <= 8


def test_equal_configuration_gives_equal_bytes(tmp_path):
    prepare(phantoms(), None, str(tmp_path / "a"))
    prepare(phantoms(task_cpus=0.5, max_bad=0.5), None, str(tmp_path / "b"))
    assert digests(tmp_path / "a") == digests(tmp_path / "b")
    other = prepare(phantoms(phantom=PhantomConfig(images=90, seed=1)), None, str(tmp_path / "c"))
    assert other.digest != read_card(str(tmp_path / "a")).digest


def test_images_are_reduced_first_and_the_card_says_so(tmp_path):
    card = prepare(phantoms(reduce_to=16), None, str(tmp_path / "out"))
    assert (card.reduce_to, card.pixels.reduce_to) == (16, 16)
    expected = survey(phantoms(), None).manifest
    first = np.frombuffer(rows_of(tmp_path / "out")[0]["image"], np.uint8).reshape(32, 32)
    np.testing.assert_array_equal(first, load(expected["uri"][0].as_py(), 32, "pad", 16))
    assert np.abs(first.astype(int) - load(expected["uri"][0].as_py(), 32, "pad")).mean() > 0.5
    with pytest.raises(UserError, match="another configuration"):
        prepare(phantoms(reduce_to=20), None, str(tmp_path / "out"), resume=True)
    without = {key: value for key, value in card.model_dump(mode="json").items() if key != "reduce_to"}
    assert DatasetCard.model_validate(without).pixels.reduce_to is None, "older cards load"


def test_every_image_is_tested_in_one_fold():
    tested: list[str] = []
    for fold in range(3):
        split = SplitConfig(by="hash", folds=3, fold=fold, val=0.25)
        manifest = survey(phantoms(split=split), None).manifest.to_pylist()
        tested += [row["image_id"] for row in manifest if row["split"] == "test"]
        places = {(row["patient_id"], row["split"].replace("unlabelled", "train")) for row in manifest}
        assert len(places) == len({patient for patient, _ in places})
    assert sorted(tested) == sorted(survey(phantoms(), None).manifest["image_id"].to_pylist())


def test_rows_are_not_sorted_by_patient(tmp_path):
    card = prepare(phantoms(strata=("sex", "age_band")), None, str(tmp_path / "out"))
    rows = rows_of(tmp_path / "out")
    train = [row["patient_id"] for row in rows[: card.counts["train"].images]]
    neighbours = sum(a == b for a, b in itertools.pairwise(train))
    assert neighbours < len(train) / 8
    assert {row["sex"] for row in rows} <= {"F", "M", None}


def test_nih_collection_with_every_kind_of_bad_image(tmp_path):
    root = nih(tmp_path / "nih")
    images = sorted((root / "images").iterdir())
    images[0].unlink()
    images[7].write_bytes(b"")
    images[20].write_bytes(images[21].read_bytes()[:60])
    images[33].write_bytes(b"this is no image" * 30)
    (root / "images" / "99999999_000.png").write_bytes(images[1].read_bytes())
    config = PrepareConfig(source="nih", image_size=16, row_group=4, split=HALVES, max_bad=0.1)
    card = prepare(config, str(root), str(tmp_path / "out"))
    assert card.quarantined == {"empty": 1, "missing": 1, "unlisted": 1, "unreadable": 1, "unsupported": 1}
    assert check(str(tmp_path / "out")) == []
    rows = rows_of(tmp_path / "out")
    assert [row["row"] for row in rows] == list(range(76))
    quarantine = pq.read_table(tmp_path / "out" / "quarantine.parquet").to_pylist()
    named = {Path(row["source"]).stem for row in quarantine}
    assert named == {images[k].stem for k in (0, 7, 20, 33)} | {"99999999_000"}
    assert {row["image_id"] for row in rows} == {path.stem for path in images} - named
    assert sum(counts.images for counts in card.counts.values()) + len(quarantine) == 81
    for row in rows[::9]:
        source = (root / "images" / f"{row['image_id']}.png").read_bytes()
        assert row["image"] == decode(source, "x", 16, "pad").tobytes()


def test_a_quarantined_image_changes_nothing_but_the_numbers_behind_it(tmp_path):
    """The rewritten shards equal those of a collection that never had the bad image, except for shard bounds."""
    root = nih(tmp_path / "nih")
    config = PrepareConfig(source="nih", image_size=16, row_group=4, split=HALVES, max_bad=0.1)
    first = survey(config, str(root)).manifest["uri"][0].as_py()
    before = prepare(config, str(root), str(tmp_path / "whole"))
    Path(first).write_bytes(b"damaged")
    after = prepare(config, str(root), str(tmp_path / "less"))
    assert after.quarantined == {"unsupported": 1}
    assert [shard.row_start for shard in after.shards[1:]] == [shard.row_start - 1 for shard in before.shards[1:]]
    whole, less = rows_of(tmp_path / "whole"), rows_of(tmp_path / "less")
    assert [row | {"row": row["row"] - 1} for row in whole[1:]] == less
    prepare(config, str(root), str(tmp_path / "again"))
    assert digests(tmp_path / "less") == digests(tmp_path / "again")


def test_too_many_bad_images_stop_it_and_a_higher_limit_resumes(tmp_path):
    root = nih(tmp_path / "nih")
    for path in sorted((root / "images").iterdir())[:4]:
        path.write_bytes(b"broken")
    config = PrepareConfig(source="nih", image_size=16, row_group=4, split=HALVES)
    with pytest.raises(UserError, match=r"of 80 images are unusable.*max_bad=0.01.*'unsupported'"):
        prepare(config, str(root), str(tmp_path / "out"))
    assert not (tmp_path / "out" / "dataset.json").exists()
    with pytest.raises(UserError, match=r"holds no dataset.json"):
        read_card(str(tmp_path / "out"))
    card = prepare(config.model_copy(update={"max_bad": 0.2}), str(root), str(tmp_path / "out"), resume=True)
    assert card.quarantined == {"unsupported": 4}
    assert check(str(tmp_path / "out")) == []


def test_rows_without_images_stop_it_before_anything_is_written(tmp_path):
    root = nih(tmp_path / "nih")
    for path in sorted((root / "images").iterdir())[:4]:
        path.unlink()
    with pytest.raises(UserError, match=r"4 of 80 images.*'missing' \(4\)"):
        prepare(PrepareConfig(source="nih", split=HALVES), str(root), str(tmp_path / "out"))
    assert not (tmp_path / "out" / "_prepare").exists()


def test_the_output_folder_is_the_identity_of_a_run(tmp_path):
    out = tmp_path / "out"
    card = prepare(phantoms(40), None, str(out))
    before = digests(out)
    with pytest.raises(UserError, match=r"is not empty; choose another --out, or continue .* --resume"):
        prepare(phantoms(40), None, str(out))
    with pytest.raises(UserError, match="another configuration"):
        prepare(phantoms(41), None, str(out), resume=True)
    assert prepare(phantoms(40), None, str(out), resume=True) == card
    assert digests(out) == before
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="something else"):
        prepare(phantoms(40), None, str(foreign), resume=True)


def test_empty_splits_and_unknown_names_are_user_errors(tmp_path):
    cases = [
        (phantoms(2), "split '(train|val|test)' is empty"),
        (phantoms(split=SplitConfig(val=0, test=0.3)), "split 'val' is empty"),
        (phantoms(findings=("Effusion", "Cough")), "Cough"),
        (phantoms(task_cpus=64), "task_cpus=64, but no machine offers more than"),
    ]
    for number, (config, words) in enumerate(cases):
        with pytest.raises(UserError, match=words):
            prepare(config, None, str(tmp_path / str(number)))


SCRIPT = """
import sys
from test_shards import phantoms
from pipeline import runtime
from pipeline.shards import prepare
runtime.start(num_cpus=1)
prepare(phantoms(20_000), None, sys.argv[1], progress=lambda done, total: print(done, flush=True))
"""


@pytest.mark.long
def test_a_killed_run_continues_without_decoding_finished_shards_again(tmp_path):
    out = tmp_path / "out"
    here = Path(__file__).resolve().parent
    environment = os.environ | {"PYTHONPATH": f"{here}{os.pathsep}{here.parent}"}
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(out)], stdout=subprocess.PIPE, env=environment, start_new_session=True
    )
    assert process.stdout is not None
    first = next(done for line in process.stdout if (done := int(line)) >= 6_000)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert first < 20_000
    assert not (out / "dataset.json").exists()
    time.sleep(1.0)  # the workers notice that their driver is gone
    (out / "shards" / "train-00000.parquet.0123.tmp").write_bytes(b"half a shard")
    finished = {path.stem for path in (out / "_prepare").glob("t*.json")}
    stamps = {stem: (out / "shards" / f"{stem}.parquet").stat().st_mtime_ns for stem in finished}
    calls = []
    prepare(phantoms(20_000), None, str(out), resume=True, progress=lambda done, total: calls.append(done))
    assert calls[0] >= first
    assert calls[-1] == 20_000
    for stem, stamp in stamps.items():
        assert (out / "shards" / f"{stem}.parquet").stat().st_mtime_ns == stamp
    assert check(str(out)) == []
    assert len({row["image_id"] for row in rows_of(out)}) == 20_000
    prepare(phantoms(20_000), None, str(tmp_path / "straight"))
    assert digests(out) == digests(tmp_path / "straight")


def test_a_shard_may_take_longer_than_ray_data_waits_for_progress(monkeypatch):
    def slow(item: dict) -> dict:
        time.sleep(4)
        return item | {"error": ""}

    monkeypatch.setattr(DataContext.get_current(), "execution_no_progress_timeout_s", 1)
    assert [row["number"] for row in tasks.results(slow, [{"number": 7}], 0.5)] == [7]


def test_a_damaged_or_half_recorded_shard_is_written_again(tmp_path):
    out = tmp_path / "out"
    root = nih(tmp_path / "nih")
    bad = sorted((root / "images").iterdir())[:4]
    contents = [path.read_bytes() for path in bad]
    for path in bad:
        path.write_bytes(b"broken")
    config = PrepareConfig(source="nih", image_size=16, row_group=4, split=HALVES, max_bad=0.02)
    with pytest.raises(UserError, match="unusable"):
        prepare(config, str(root), str(out))
    for path, content in zip(bad, contents, strict=True):
        path.write_bytes(content)
    for record in (out / "_prepare").glob("*-*.json"):
        if json.loads(record.read_text())["faults"]:
            record.unlink()
    survivor = next((out / "_prepare").glob("*-*.json"), None)
    if survivor is not None:
        shard = out / "shards" / f"{survivor.stem}.parquet"
        shard.write_bytes(shard.read_bytes()[:-7])
    card = prepare(config, str(root), str(out), resume=True)
    assert card.quarantined == {}
    assert check(str(out)) == []


def test_object_storage_for_input_and_output(bucket, tmp_path):
    root = nih(tmp_path / "nih")
    for path in root.rglob("*"):
        if path.is_file():
            storage.write_bytes(storage.join(f"{bucket}/nih", str(path.relative_to(root))), path.read_bytes())
    config = PrepareConfig(source="nih", image_size=16, row_group=4, split=HALVES)
    remote = prepare(config, f"{bucket}/nih", f"{bucket}/out")
    local = prepare(config, str(root), str(tmp_path / "out"))
    assert remote == local
    assert check(f"{bucket}/out") == []
    names = {storage.name(uri) for uri in storage.list_files(f"{bucket}/out")}
    assert names == {path.name for path in (tmp_path / "out").rglob("*") if path.is_file()}
    with pytest.raises(UserError, match="is not empty"):
        prepare(config, f"{bucket}/nih", f"{bucket}/out")
    assert prepare(config, f"{bucket}/nih", f"{bucket}/out", resume=True) == remote


def test_an_unreachable_bucket_is_one_line(tmp_path):
    with pytest.raises(UserError, match="does not answer"):
        prepare(phantoms(), None, "s3://bucket/out?endpoint_override=http://127.0.0.1:9")


def test_a_split_file_may_move_and_its_folder_is_not_told(tmp_path):
    config = phantoms()
    patients = sorted(set(survey(config, None).manifest["patient_id"].to_pylist()))
    splits = [("val", "test", "train", "train")[index % 4] for index in range(len(patients))]
    lines = "".join(f"{patient},{part}\n" for patient, part in zip(patients, splits, strict=True))
    cards = []
    for folder in ("first", "second"):
        (tmp_path / folder).mkdir()
        table = tmp_path / folder / "splits.csv"
        table.write_text(f"patient_id,split\n{lines}")
        by_file = config.model_copy(update={"split": SplitConfig(by="file", file=str(table))})
        cards.append(prepare(by_file, None, str(tmp_path / "out"), resume=folder == "second"))
    assert cards[0] == cards[1]
    assert cards[0].split.file == "splits.csv"
    assert cards[0].sources["split"] == hashlib.sha256(table.read_bytes()).hexdigest()
    listed = dict(zip(patients, splits, strict=True))
    found = {row["patient_id"]: row["split"].replace("unlabelled", "train") for row in rows_of(tmp_path / "out")}
    assert found == listed
