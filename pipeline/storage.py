"""URI -> filesystem: local paths, file:// and s3:// with any endpoint; the only place that reads and writes them."""

import errno
import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qsl, urlsplit
from uuid import uuid4

from pyarrow import fs

from mpc.errors import MissingError, UserError

CONNECT_SECONDS = 3.0
REQUEST_SECONDS = 60.0
ATTEMPTS = 8
"""Tries of one request, with the AWS SDK's own exponential back-off; AWS_MAX_ATTEMPTS overrides it."""
TEMPORARY = ".tmp"
"""Suffix of a local file that is still being written; a killed process may leave one behind."""
OPTIONS = ("endpoint_override", "scheme", "region")


class DeniedError(UserError, PermissionError):
    """The object exists, as far as one can tell, but may not be read or written."""


def is_remote(uri: str) -> bool:
    """Whether the URI names object storage."""
    return uri.startswith("s3://")


def absolute(uri: str) -> str:
    """The URI with a local path made absolute: a Ray worker has another working directory."""
    return uri if is_remote(uri) else str(Path(_local(uri)).expanduser().absolute())


def join(uri: str, *parts: str) -> str:
    """Appends path parts, before the `?options` of an s3:// URI."""
    if not is_remote(uri):
        return str(Path(_local(uri), *parts))
    path, mark, options = uri.partition("?")
    return "/".join([path.rstrip("/"), *(part.strip("/") for part in parts)]) + mark + options


def name(uri: str) -> str:
    """The last part of the path, without options."""
    path = uri.partition("?")[0] if is_remote(uri) else _local(uri)
    return path.rstrip("/").rpartition("/")[2]


class Place(NamedTuple):
    """Where an s3:// URI points."""

    endpoint: str
    """http(s)://HOST[:PORT] of an S3-compatible server; empty for AWS itself."""
    region: str
    """Empty where nothing names one."""
    path: str
    """BUCKET/KEY."""


def resolve(uri: str) -> tuple[fs.FileSystem, str]:
    """The filesystem that holds `uri`, and the path in it.

    Raises:
        UserError: as `place_of`, and where an endpoint does not answer.
    """
    if not is_remote(uri):
        return fs.LocalFileSystem(), str(Path(_local(uri)).expanduser().absolute())
    endpoint, region, path = place_of(uri)
    bucket = "" if endpoint or region else path.partition("/")[0]
    return _s3(endpoint, region, bucket, os.environ.get("AWS_MAX_ATTEMPTS", "")), path


def place_of(uri: str) -> Place:
    """What an s3:// URI and the environment say together.

    S3 endpoints come from `?endpoint_override=`, else AWS_ENDPOINT_URL_S3, else AWS_ENDPOINT_URL; credentials only from
    the standard chain.

    Raises:
        UserError: unknown scheme or option, credentials inside the URI, no bucket.
    """
    path, _, query = uri.removeprefix("s3://").partition("?")
    options = dict(parse_qsl(query))
    unknown = sorted(set(options) - set(OPTIONS))
    if unknown:
        raise UserError(f"s3:// option {unknown[0]!r} is not known; use {', '.join(OPTIONS)}")
    if "@" in path.partition("/")[0]:
        raise UserError("an s3:// URI carries no credentials; put them into the environment or ~/.aws/credentials")
    if not path.strip("/"):
        raise UserError(f"{uri} names no bucket; write s3://BUCKET/FOLDER")
    endpoint = options.get("endpoint_override") or os.environ.get("AWS_ENDPOINT_URL_S3")
    endpoint = endpoint or os.environ.get("AWS_ENDPOINT_URL") or ""
    if endpoint and "://" not in endpoint:
        endpoint = f"{options.get('scheme', 'https')}://{endpoint}"
    region = options.get("region") or os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or ""
    return Place(endpoint, region, path.strip("/"))


def read_bytes(uri: str) -> bytes:
    """The whole content of a file."""
    with open_input(uri) as stream:
        return bytes(stream.read())


def write_bytes(uri: str, content: bytes) -> None:
    """Writes a file that is either whole or absent; missing folders are made."""
    with open_output(uri) as stream:
        stream.write(content)


@contextmanager
def open_input(uri: str) -> Iterator[Any]:
    """A seekable file for reading (`pyarrow.NativeFile`)."""
    filesystem, path = resolve(uri)
    with explained(uri), filesystem.open_input_file(path) as stream:
        yield stream


@contextmanager
def open_output(uri: str) -> Iterator[Any]:
    """A stream for writing; locally it takes its name only when it is complete, on S3 an upload is atomic itself."""
    filesystem, path = resolve(uri)
    with explained(uri):
        if is_remote(uri):
            with filesystem.open_output_stream(path, compression=None) as stream:  # else a name in .gz is packed
                yield stream
            return
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(f"{path}.{uuid4().hex}{TEMPORARY}")
        try:
            with filesystem.open_output_stream(str(temporary)) as stream:
                yield stream
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def exists(uri: str) -> bool:
    """Whether a file or folder is there; a folder on S3 exists while it holds an object."""
    filesystem, path = resolve(uri)
    with explained(uri):
        return bool(filesystem.get_file_info(path).type != fs.FileType.NotFound)


def size(uri: str) -> int | None:
    """Bytes of a file; None where there is none."""
    filesystem, path = resolve(uri)
    with explained(uri):
        info = filesystem.get_file_info(path)
    return int(info.size) if info.type == fs.FileType.File else None


def list_files(uri: str, suffixes: Sequence[str] = ()) -> list[str]:
    """URIs of all files under a folder, at any depth, sorted; `suffixes` (".png") are compared without case.

    Raises:
        MissingError: the folder does not exist.
    """
    filesystem, path = resolve(uri)
    with explained(uri):
        entries = filesystem.get_file_info(fs.FileSelector(path, recursive=True))
    wanted = tuple(suffix.lower() for suffix in suffixes)
    paths = sorted(info.path for info in entries if info.type == fs.FileType.File)
    paths = [found for found in paths if not wanted or found.lower().endswith(wanted)]
    if not is_remote(uri):
        return paths
    _, mark, options = uri.partition("?")
    return [f"s3://{found}{mark}{options}" for found in paths]


def is_empty(uri: str) -> bool:
    """Whether no file lies under `uri` at any depth; empty folders, which S3 servers may leave behind, do not count."""
    filesystem, path = resolve(uri)
    with explained(uri):
        entries = filesystem.get_file_info(fs.FileSelector(path, allow_not_found=True, recursive=True))
    return all(info.type == fs.FileType.Directory for info in entries)


def delete(uri: str) -> None:
    """Deletes a file, or a folder with all it holds; nothing there is no fault."""
    filesystem, path = resolve(uri)
    with explained(uri):
        kind = filesystem.get_file_info(path).type
        if kind == fs.FileType.File:
            filesystem.delete_file(path)
        elif kind == fs.FileType.Directory:
            filesystem.delete_dir(path)


def make_dirs(uri: str) -> None:
    """Makes a folder and its parents; on S3, where folders are only prefixes, it checks the bucket instead.

    Raises:
        UserError: no such bucket, or no right to it.
    """
    filesystem, path = resolve(uri)
    with explained(uri):
        if not is_remote(uri):
            filesystem.create_dir(path, recursive=True)
        elif filesystem.get_file_info(path.partition("/")[0]).type == fs.FileType.NotFound:
            raise MissingError(f"bucket {path.partition('/')[0]!r} of {uri} does not exist; create it or mend the name")


def _local(uri: str) -> str:
    """The path of a local URI."""
    if uri.startswith("file://"):
        return urlsplit(uri).path
    if "://" in uri:
        raise UserError(f"{uri}: unknown scheme; give a local path, file:// or s3://")
    return uri


@lru_cache(maxsize=16)
def _s3(endpoint: str, region: str, bucket: str, attempts: str) -> fs.S3FileSystem:
    """One client for each endpoint and region; a `bucket` without either is asked where it lives."""
    if endpoint:
        _probe(endpoint)
    if bucket:
        with explained(f"s3://{bucket}"):
            region = fs.resolve_s3_region(bucket)
    return _Client(endpoint, region or "us-east-1", int(attempts or ATTEMPTS))


class _Client(fs.S3FileSystem):  # type: ignore[misc]
    """An S3 client that stays patient where Ray sends it: pyarrow's own pickle forgets how often to try again."""

    def __init__(self, endpoint: str, region: str, attempts: int) -> None:
        self.made_of = (endpoint, region, attempts)
        address = urlsplit(endpoint)
        super().__init__(
            endpoint_override=(address.netloc + address.path.rstrip("/")) or None,
            scheme=address.scheme or "https",
            region=region,
            connect_timeout=CONNECT_SECONDS,
            request_timeout=REQUEST_SECONDS,
            retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=attempts),
        )

    def __reduce__(self) -> tuple[Any, tuple[str, str, int]]:
        return _sent, self.made_of


@lru_cache(maxsize=16)
def _sent(endpoint: str, region: str, attempts: int) -> _Client:
    """The client in a process that it was sent to."""
    return _Client(endpoint, region, attempts)


def _probe(endpoint: str) -> None:
    """Fails within seconds where nobody listens; the client's own retries would take a minute to say so."""
    address = urlsplit(endpoint)
    if not address.hostname:
        raise UserError(f"S3 endpoint {endpoint!r} is not an address; write http://HOST:PORT")
    port = address.port or (80 if address.scheme == "http" else 443)
    try:
        socket.create_connection((address.hostname, port), timeout=CONNECT_SECONDS).close()
    except OSError as error:
        raise UserError(
            f"S3 endpoint {endpoint} does not answer ({error}); start it, or mend AWS_ENDPOINT_URL or endpoint_override"
        ) from None


@contextmanager
def explained(uri: str) -> Iterator[None]:
    """Turns errors of the filesystem about `uri` into one line for the user; others pass unchanged."""
    try:
        yield
    except UserError:
        raise
    except FileNotFoundError as error:
        raise MissingError(f"{uri} does not exist; mend the path") from error
    except PermissionError as error:
        raise DeniedError(f"{uri} may not be accessed; check its rights or your credentials") from error
    except OSError as error:
        raise translated(uri, error) from error


def translated(uri: str, error: OSError) -> UserError:
    """The user's view of an operating system or S3 error about `uri`, by the codes that the AWS SDK prints."""
    text = " ".join(str(error).split())
    if error.errno == errno.ENOSPC or "No space left on device" in text:
        return UserError(f"no space is left for {uri}; free some, then continue with --resume")
    if "NO_SUCH_BUCKET" in text:
        return MissingError(f"the bucket of {uri} does not exist; create it or mend the name")
    if "NO_SUCH_KEY" in text or "RESOURCE_NOT_FOUND" in text or "HTTP response code 404" in text:
        return MissingError(f"{uri} does not exist; mend the path")
    if any(code in text for code in ("ACCESS_DENIED", "INVALID_ACCESS_KEY", "SIGNATURE", "HTTP response code 403")):
        return DeniedError(f"{uri} may not be accessed; check your AWS credentials and the bucket's policy")
    if "NETWORK_CONNECTION" in text or "curlCode" in text:
        return UserError(f"{uri} cannot be reached ({text[-160:]}); check network and endpoint, then use --resume")
    return UserError(f"{uri}: {text[:300]}")
