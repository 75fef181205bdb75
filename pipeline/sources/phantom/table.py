"""The synthetic collection as a source table, and its image addresses `phantom://<profile>/<seed>/<index>`."""

import re
from typing import cast

import numpy as np
from numpy.typing import NDArray

from mpc.errors import UserError
from pipeline.manifest import SourceTable, source_table
from pipeline.prepare_config import PhantomConfig
from pipeline.sources.phantom.labels import FINDINGS, Profile, labels, patient, view
from pipeline.sources.phantom.parameters import PHANTOM_VERSION, digest
from pipeline.sources.phantom.picture import render, render_with_signs

_URI = re.compile(r"phantom://(dense|nih)/(\d+)/(\d+)")
_ID = re.compile(r"phantom-(dense|nih)-(\d+)-(\d+)")


def uri(seed: int, index: int, profile: Profile) -> str:
    """The address of a synthetic image."""
    return f"phantom://{profile}/{seed}/{index}"


def parse_uri(address: str) -> tuple[int, int, Profile]:
    """(seed, index, profile) of an address; another form is a `UserError`."""
    match = _URI.fullmatch(address)
    if match is None:
        raise UserError(f"{address!r} is no synthetic image; write phantom://dense/<seed>/<index> or phantom://nih/...")
    return int(match[2]), int(match[3]), cast(Profile, match[1])


def image_id(seed: int, index: int, profile: Profile) -> str:
    """The id of a synthetic image, unique over seeds and profiles."""
    return f"phantom-{profile}-{seed}-{index:08d}"


def signs_of(image: str, size: int) -> dict[str, NDArray[np.bool_]]:
    """Where each drawn sign of a synthetic image is: finding -> bool [size, size].

    Args:
        image: its id in a data set, or its address `phantom://...`.
        size: side in pixels; the anatomy is the same at every size.

    Raises:
        UserError: neither an id nor an address of a synthetic image.
    """
    named = _ID.fullmatch(image)
    seed, index, profile = parse_uri(f"phantom://{named[1]}/{named[2]}/{named[3]}" if named else image)
    return render_with_signs(seed, index, profile, size)[1]


def render_uri(address: str, size: int) -> NDArray[np.uint8]:
    """The synthetic image at an address: uint8 [size, size]."""
    seed, index, profile = parse_uri(address)
    return render(seed, index, profile, size)


def source(config: PhantomConfig) -> SourceTable:
    """The first `config.images` synthetic images of a seed and profile; every label is known.

    Ids hold the seed, so that tables of several seeds can be joined. Every image is a study of its own. Sex and age
    band are the synthetic patient's.
    """
    seed, profile, indices = config.seed, config.profile, range(config.images)
    people = [patient(seed, index) for index in indices]
    table = source_table(
        {
            "image_id": [image_id(seed, index, profile) for index in indices],
            "patient_id": [f"phantom-{seed}-p{person.number:08d}" for person in people],
            "study_id": [f"phantom-{seed}-p{person.number:08d}-s{person.study}" for person in people],
            "view": [view(seed, index) for index in indices],
            "uri": [uri(seed, index, profile) for index in indices],
            "sex": [person.sex for person in people],
            "age_band": [person.age_band for person in people],
        },
        np.stack([labels(seed, index, profile) for index in indices]),
    )
    digests = {"phantom_version": str(PHANTOM_VERSION), "phantom_parameters": digest()}
    return SourceTable(table, FINDINGS, f"phantom-{profile} (synthetic)", synthetic=True, digests=digests)
