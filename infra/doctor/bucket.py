"""A bucket: each right that a run needs, tried on an object of its own, and the clock of the server."""

from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any
from uuid import uuid4

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from infra.doctor.finding import Finding
from mpc.errors import UserError
from pipeline import storage

BODY = b"probe"
SKEW_SECONDS = 60.0
"""Clocks that differ by more make logs of two machines unreadable; at 15 minutes S3 refuses every request."""
RIGHTS = {
    "list": "s3:ListBucket",
    "put": "s3:PutObject",
    "get": "s3:GetObject",
    "multipart": "s3:PutObject, s3:AbortMultipartUpload",
    "delete": "s3:DeleteObject",
}
"""What runs do with a bucket, and the rights behind it."""


def rights(out: str) -> list[Finding]:
    """Tries every right under the s3:// prefix `out`; what it writes it deletes, if it may.

    Args:
        out: where results shall go.
    """
    try:
        with suppress(storage.DeniedError):  # which right is missing is told below
            storage.make_dirs(out)  # explains a missing server, a missing bucket, a malformed URI
        endpoint, region, path = storage.place_of(out)
        client = _client(endpoint, region)
        bucket, _, prefix = path.partition("/")
        probe = Probe(client, bucket, "/".join(part for part in (prefix, f".mpc-cxr-doctor-{uuid4().hex}") if part))
        faults = dict(probe.faults())
    except (UserError, BotoCoreError) as error:
        return [Finding("write", False, out, str(error))]
    refused = "; ".join(f"{name}: {fault} (grant {RIGHTS[name]})" for name, fault in faults.items())
    conditional = "with" if probe.conditional else "without"
    text = f"{out}: {', '.join(name for name in RIGHTS if name not in faults) or 'nothing'}, {conditional} conditions"
    return [Finding("write", not faults, text, refused), *([clock(probe.date)] if probe.date else [])]


def clock(date: str, now: datetime | None = None) -> Finding:
    """The clock here against the header `Date` of the storage.

    Args:
        date: as HTTP writes it.
        now: this machine's time; None reads it.
    """
    skew = ((now or datetime.now(UTC)) - parsedate_to_datetime(date)).total_seconds()
    text = f"{abs(skew):.0f} s {'ahead of' if skew > 0 else 'behind'} the storage"
    return Finding("clock", abs(skew) <= SKEW_SECONDS, text, "set this machine's clock by NTP, for example with chrony")


class Probe:
    """One object on which every right is tried."""

    def __init__(self, client: Any, bucket: str, key: str) -> None:
        self.client, self.where = client, {"Bucket": bucket, "Key": key}
        self.date = ""
        self.conditional = False
        """Whether the storage keeps the first of two writers (If-None-Match)."""

    def faults(self) -> Iterator[tuple[str, str]]:
        """Every right that is refused, with the server's own word for it."""
        tries: dict[str, Callable[[], Any]] = {
            "list": lambda: self.client.list_objects_v2(Bucket=self.where["Bucket"], MaxKeys=1),
            "put": lambda: self.client.put_object(**self.where, Body=BODY),
            "get": self._get,
            "multipart": self._multipart,
            "delete": lambda: self.client.delete_object(**self.where),
        }
        for name, attempt in tries.items():
            if name == "get":
                self.conditional = self._keeps_the_first()
            try:
                reply = attempt()
            except ClientError as error:
                self._note(error.response)
                yield name, error.response["Error"].get("Code", "refused")
            else:
                self._note(reply)

    def _note(self, reply: Any) -> None:
        """Keeps the server's time."""
        headers = reply.get("ResponseMetadata", {}).get("HTTPHeaders", {}) if isinstance(reply, dict) else {}
        self.date = headers.get("date", self.date)

    def _get(self) -> Any:
        reply = self.client.get_object(**self.where)
        if reply["Body"].read() != BODY:
            raise UserError("the storage returns other bytes than were written; do not use it")
        return reply

    def _keeps_the_first(self) -> bool:
        """Whether a second writer is told that he is late."""
        try:
            self.client.put_object(**self.where, Body=BODY, IfNoneMatch="*")
        except ClientError as error:
            return bool(error.response["Error"].get("Code") == "PreconditionFailed")
        return False

    def _multipart(self) -> Any:
        """How large files go up."""
        upload = self.client.create_multipart_upload(**self.where)["UploadId"]
        part = {"UploadId": upload, "PartNumber": 1}
        try:
            tag = self.client.upload_part(**self.where, **part, Body=BODY)["ETag"]
            whole = {"Parts": [{"PartNumber": 1, "ETag": tag}]}
            return self.client.complete_multipart_upload(**self.where, UploadId=upload, MultipartUpload=whole)
        except ClientError:
            self.client.abort_multipart_upload(**self.where, UploadId=upload)
            raise


def _client(endpoint: str, region: str) -> Any:
    """A client that gives up within seconds."""
    patience = Config(connect_timeout=5, read_timeout=20, retries={"total_max_attempts": 2})
    return boto3.Session().client("s3", endpoint_url=endpoint or None, region_name=region or None, config=patience)
