"""Keyed hashes in place of a hospital's own ids of images, studies and patients: what private sources store."""

import hashlib
import os
from functools import partial

import pyarrow as pa

from mpc.errors import MissingError, UserError
from pipeline import storage
from pipeline.sources.tables import mapped

VARIABLE = "MPC_CXR_ID_KEY"
SHORTEST, LONGEST = 16, hashlib.blake2b.MAX_KEY_SIZE
PERSONS = {"image_id": b"image", "patient_id": b"patient", "study_id": b"study"}
"""Column -> the domain of its hash: an image and a patient of the same name do not look alike."""
REMEDY = "make one with `openssl rand -hex 32 > FILE` and name that file in prepare.key_file"


def find_key(key_file: str | None) -> bytes:
    """The secret key: what the file holds, else the environment variable MPC_CXR_ID_KEY; blanks around it do not count.

    Args:
        key_file: local path or s3:// URI; None asks the environment.

    Raises:
        UserError: no key, or one that is shorter than 16 or longer than 64 bytes; the message does not quote it.
    """
    if key_file is not None:
        try:
            key, where = storage.read_bytes(storage.absolute(key_file)), f"the key in {key_file}"
        except MissingError:
            raise MissingError(f"prepare.key_file {key_file} does not exist; {REMEDY}") from None
    else:
        key, where = os.fsencode(os.environ.get(VARIABLE, "")), f"the key in {VARIABLE}"
    key = key.strip()
    if not key and key_file is None:
        raise UserError(f"ids of this source are stored as keyed hashes, and there is no key; {REMEDY}")
    if not SHORTEST <= len(key) <= LONGEST:
        raise UserError(f"{where} has {len(key)} bytes, not {SHORTEST} to {LONGEST}; {REMEDY}")
    return key


def keyed_hash(text: str, person: bytes, key: bytes) -> str:
    """BLAKE2b of 16 bytes in hexadecimal: equal for equal text, person and key, and without the key not to be told."""
    return hashlib.blake2b(text.encode(), digest_size=16, key=key, person=person).hexdigest()


def _hidden(text: str, person: bytes, key: bytes) -> str:
    """What stands for one cell."""
    return keyed_hash(text, person, key) if text else ""


def hidden(manifest: pa.Table, key: bytes) -> pa.Table:
    """The manifest with hashes for the ids of image, patient and study; an empty study id stays empty."""
    for name, person in PERSONS.items():
        column = mapped(manifest[name], partial(_hidden, person=person, key=key))
        position = manifest.schema.get_field_index(name)
        manifest = manifest.set_column(position, manifest.schema.field(position), column)
    return manifest
