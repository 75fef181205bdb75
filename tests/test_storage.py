"""storage: the same operations on a local folder and on a real S3 server; errors a person can act on."""

import os
import time
from pathlib import Path

import pyarrow.fs
import pytest
from conftest import free_port

from mpc.errors import MissingError, UserError
from pipeline import storage


@pytest.fixture(params=["local", "s3"])
def folder(request, tmp_path):
    return str(tmp_path / "data") if request.param == "local" else request.getfixturevalue("bucket") + "/data"


def test_round_trip(folder):
    storage.make_dirs(folder)
    assert storage.is_empty(folder)
    uri = storage.join(folder, "a", "b.bin")
    assert not storage.exists(uri)
    assert storage.size(uri) is None
    content = os.urandom(100_000)
    storage.write_bytes(uri, content)
    storage.write_bytes(storage.join(folder, "a", "C.PNG"), b"x")
    assert storage.read_bytes(uri) == content
    assert storage.exists(uri)
    assert storage.exists(folder)
    assert storage.size(uri) == len(content)
    assert not storage.is_empty(folder)
    assert [storage.name(found) for found in storage.list_files(folder)] == ["C.PNG", "b.bin"]
    assert storage.list_files(folder, (".bin",)) == [uri]
    assert [storage.name(found) for found in storage.list_files(folder, (".png",))] == ["C.PNG"]
    storage.delete(uri)
    storage.delete(uri)
    assert not storage.exists(uri)
    storage.delete(folder)
    assert storage.is_empty(folder)


def test_missing_file_is_named(folder):
    with pytest.raises(MissingError, match=r"nothing\.txt does not exist"):
        storage.read_bytes(storage.join(folder, "nothing.txt"))
    with pytest.raises(MissingError):
        storage.list_files(storage.join(folder, "nowhere"))


def test_interrupted_local_write_leaves_nothing(tmp_path):
    uri = str(tmp_path / "file")
    output = storage.open_output(uri)
    output.__enter__().write(b"half")
    killed = RuntimeError("killed")
    assert not output.__exit__(RuntimeError, killed, None)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("uri", "parts", "joined"),
    [
        ("/data", ("a", "b.png"), "/data/a/b.png"),
        ("file:///data", ("a",), "/data/a"),
        ("s3://bucket/x/", ("a", "b"), "s3://bucket/x/a/b"),
        ("s3://bucket/x?endpoint_override=h:1", ("a",), "s3://bucket/x/a?endpoint_override=h:1"),
    ],
)
def test_join(uri, parts, joined):
    assert storage.join(uri, *parts) == joined
    assert storage.name(joined) == parts[-1]


def test_absolute(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert storage.absolute("x/y") == str(tmp_path / "x" / "y")
    assert storage.absolute("s3://bucket/x") == "s3://bucket/x"


def test_endpoint_in_the_uri_wins(bucket, monkeypatch):
    endpoint = os.environ["AWS_ENDPOINT_URL"]
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
    uri = f"{bucket}/k?endpoint_override={endpoint}"
    storage.write_bytes(uri, b"1")
    assert storage.list_files(storage.join(f"{bucket}?endpoint_override={endpoint}")) == [uri]
    bare = f"{bucket}/k?endpoint_override={endpoint.removeprefix('http://')}&scheme=http"
    assert storage.read_bytes(bare) == b"1"
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", endpoint)
    assert storage.read_bytes(f"{bucket}/k") == b"1"


def test_unreachable_bucket_is_one_line_within_seconds(monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
    start = time.monotonic()
    with pytest.raises(UserError, match="does not answer") as caught:
        storage.read_bytes("s3://bucket/key")
    assert time.monotonic() - start < 5
    assert "\n" not in str(caught.value)


def test_missing_bucket(s3_server):
    with pytest.raises(MissingError, match="bucket 'no-such-bucket'"):
        storage.make_dirs("s3://no-such-bucket/data")
    with pytest.raises(UserError, match="s3://no-such-bucket/data/x"):
        storage.write_bytes("s3://no-such-bucket/data/x", b"1")


def test_wrong_credentials_are_named(bucket, monkeypatch):
    storage._s3.cache_clear()  # a client keeps the credentials it has found
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(storage.DeniedError, match="check your AWS credentials"):
        storage.read_bytes(f"{bucket}/key")
    storage._s3.cache_clear()


@pytest.mark.parametrize(
    ("uri", "words"),
    [
        ("gs://bucket/x", "unknown scheme"),
        ("s3://key:secret@bucket/x", "no credentials"),
        ("s3://bucket/x?access_key=1", "access_key"),
        ("s3://", "names no bucket"),
    ],
)
def test_uris_that_are_refused(uri, words):
    with pytest.raises(UserError, match=words):
        storage.resolve(uri)


def test_secret_is_not_in_the_pickle(s3_server):
    import pickle

    filesystem, _ = storage.resolve("s3://bucket/x")
    assert isinstance(filesystem, pyarrow.fs.S3FileSystem)
    assert os.environ["AWS_SECRET_ACCESS_KEY"].encode() not in pickle.dumps(filesystem)


def test_denied_local_file_is_told_apart(tmp_path):
    if os.geteuid() == 0:
        pytest.skip("root may read everything")
    path = Path(tmp_path / "secret")
    path.write_bytes(b"1")
    path.chmod(0)
    with pytest.raises(storage.DeniedError):
        storage.read_bytes(str(path))
