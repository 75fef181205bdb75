"""Keyed hashes of ids: the value by hand, the key's sources and limits, and a key that no message quotes."""

import hashlib

import pytest
from test_table_source import KEY, collection, config_of

from mpc.errors import MissingError, UserError
from pipeline import identity, storage
from pipeline.prepare_config import PrepareConfig
from pipeline.shards import prepare, survey
from pipeline.sources import PRIVATE

TEXT = "4711"


def test_the_hash_is_blake2b_with_key_and_domain():
    key = bytes(range(32))
    expected = hashlib.blake2b(b"4711", digest_size=16, key=key, person=b"patient").hexdigest()
    assert identity.keyed_hash(TEXT, b"patient", key) == expected == "750aa3d03aeafa81621eb5b269552766"
    assert len(expected) == 32


@pytest.mark.parametrize("other", [("4712", b"patient", KEY), (TEXT, b"study", KEY), (TEXT, b"patient", b"other" * 8)])
def test_text_domain_and_key_all_matter(other):
    assert identity.keyed_hash(*other) != identity.keyed_hash(TEXT, b"patient", KEY)


def test_a_manifest_with_hashes(tmp_path, monkeypatch):
    monkeypatch.setenv(identity.VARIABLE, KEY.decode())
    found = survey(config_of(), str(collection(tmp_path)))
    raw = {row["uri"]: row for row in found.source.table.to_pylist()}
    assert found.manifest.num_rows == len(raw)
    for row in found.manifest.to_pylist():
        own = raw[row["uri"]]
        for column, person in (("image_id", b"image"), ("patient_id", b"patient"), ("study_id", b"study")):
            keyed = hashlib.blake2b(own[column].encode(), digest_size=16, key=KEY, person=person).hexdigest()
            assert row[column] == (keyed if own[column] else ""), "an empty study id stays empty"
    assert "" in found.manifest["study_id"].to_pylist()


def test_the_split_does_not_depend_on_the_key(tmp_path):
    root, splits = collection(tmp_path), []
    for name in ("one", "two"):
        (tmp_path / name).write_text(f"{name * 8}\n")
        manifest = survey(config_of(key_file=str(tmp_path / name)), str(root)).manifest
        splits.append({row["uri"]: row["split"] for row in manifest.to_pylist()})
    assert splits[0] == splits[1]


def test_a_file_comes_before_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv(identity.VARIABLE, " from-the-environment \n")
    assert identity.find_key(None) == b"from-the-environment"
    (tmp_path / "key").write_bytes(b"\n  from-the-file-123 \r\n")
    assert identity.find_key(str(tmp_path / "key")) == b"from-the-file-123"


def test_a_key_in_object_storage(bucket):
    storage.write_bytes(f"{bucket}/keys/site", KEY + b"\n")
    assert identity.find_key(f"{bucket}/keys/site") == KEY


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"sesame", r"the key in \S+key has 6 bytes, not 16 to 64; make one with `openssl rand -hex 32 > FILE`"),
        (b"s" * 65, r"has 65 bytes, not 16 to 64"),
        (b" \n", r"has 0 bytes, not 16 to 64"),
    ],
)
def test_keys_of_a_wrong_length(tmp_path, content, words):
    (tmp_path / "key").write_bytes(content)
    with pytest.raises(UserError, match=words) as caught:
        identity.find_key(str(tmp_path / "key"))
    assert "\n" not in str(caught.value)
    assert "sesame" not in str(caught.value)


@pytest.mark.parametrize("source", sorted(PRIVATE))
def test_no_key_is_told_before_anything_is_read(tmp_path, monkeypatch, source):
    monkeypatch.delenv(identity.VARIABLE, raising=False)
    words = r"stored as keyed hashes, and there is no key; make one with `openssl rand -hex 32 > FILE` and name that"
    with pytest.raises(UserError, match=words):
        survey(PrepareConfig(source=source), str(tmp_path / "nowhere"))
    with pytest.raises(MissingError, match=r"prepare.key_file \S+key does not exist; make one with `openssl rand"):
        survey(PrepareConfig(source=source, key_file=str(tmp_path / "key")), str(tmp_path / "nowhere"))


def test_another_key_does_not_continue_a_data_set(tmp_path, monkeypatch, ray_session):
    root, out = str(collection(tmp_path / "in")), str(tmp_path / "out")
    monkeypatch.setenv(identity.VARIABLE, KEY.decode())
    card = prepare(config_of(), root, out)
    (tmp_path / "key").write_bytes(KEY + b"\n")
    assert prepare(config_of(key_file=str(tmp_path / "key")), root, out, resume=True) == card, "the same key, moved"
    monkeypatch.setenv(identity.VARIABLE, "another key of another site")
    with pytest.raises(UserError, match="prepared from another configuration or source table"):
        prepare(config_of(), root, out, resume=True)
