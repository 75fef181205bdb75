"""Every number that decides what a synthetic radiograph shows, frozen in one place, with its digest.

Lengths are fractions of the image side (about 36 cm in life), y grows downwards, densities are fractions of full scale.
A range `(subtle, plain)` of a sign is read at the sign's severity in [0, 1]; a range of the anatomy is drawn uniformly.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, fields
from importlib.resources import files

PHANTOM_VERSION = 1
"""Rises whenever a given (seed, index, profile, size) yields another image or other labels."""

FREQUENCIES = files("pipeline.sources.phantom").joinpath("nih_frequencies.json")
"""Counts of the NIH table's label sets; `labels.count_label_sets` makes it from that table."""

Range = tuple[float, float]


@dataclass(frozen=True)
class AnatomyRanges:
    """What differs from patient to patient; names are those of `anatomy.Anatomy`."""

    width: Range = (0.31, 0.385)  # half width of the thorax at its base
    apex: Range = (0.09, 0.15)  # y of the lung apices
    dome: Range = (0.70, 0.79)  # y of the right hemidiaphragm's top
    left_drop: Range = (0.008, 0.045)  # the left hemidiaphragm lies lower
    angle_depth: Range = (0.075, 0.125)  # costophrenic angle below the dome
    taper: Range = (1.9, 2.7)  # exponent of the thorax's outline
    mediastinum: Range = (0.042, 0.060)  # half width
    heart: Range = (0.385, 0.465)  # cardiothoracic ratio before the AP magnification
    heart_height: Range = (0.80, 1.02)  # relative to its width
    heart_tilt: Range = (0.30, 0.75)  # radians
    knob: Range = (0.024, 0.040)  # radius of the aortic knob
    wall: Range = (0.030, 0.085)  # soft tissue beside the ribs
    clavicle: Range = (0.055, 0.105)  # y below the apex
    rib_pitch: Range = (0.066, 0.080)
    rib_slope: Range = (0.05, 0.12)
    rib_density: Range = (0.05, 0.11)
    lung_depth: Range = (0.40, 0.50)  # how much darker air is than tissue
    tissue: Range = (0.60, 0.70)
    vessels: Range = (0.09, 0.17)
    breast: Range = (0.03, 0.10)
    bubble: Range = (0.0, 0.25)  # gas in the stomach
    spine: Range = (0.03, 0.07)


@dataclass(frozen=True)
class PoseRanges:
    """What differs from image to image of one patient; names are those of `anatomy.Pose`."""

    tilt: Range = (-3.0, 3.0)  # degrees in the image plane
    yaw: Range = (-0.018, 0.018)  # shift of the mediastinum from turning about the long axis
    shift_x: Range = (-0.04, 0.04)
    shift_y: Range = (-0.04, 0.04)
    zoom: Range = (0.9, 1.08)
    inspiration: Range = (-0.03, 0.025)  # shift of both domes
    exposure: Range = (-0.05, 0.05)
    contrast: Range = (0.88, 1.14)
    noise: Range = (0.008, 0.02)  # standard deviation at 128 px


@dataclass(frozen=True)
class SignRanges:
    """Strength of each sign from subtle to plain."""

    severity_power: float = 0.8  # severity = uniform ** power; above 1 means more subtle signs
    atelectasis_opacity: Range = (0.45, 0.95)
    atelectasis_lift: Range = (0.025, 0.11)
    cardiomegaly_ratio: Range = (0.515, 0.6)
    effusion_height: Range = (0.06, 0.3)
    infiltration_opacity: Range = (0.4, 0.9)
    mass_radius: Range = (0.07, 0.135)
    mass_opacity: Range = (0.55, 1.0)
    nodule_radius: Range = (0.03, 0.042)
    nodule_opacity: Range = (0.75, 1.0)
    pneumonia_opacity: Range = (0.55, 1.0)
    pneumothorax_rim: Range = (0.12, 0.52)  # share of the lung's width that is free air
    consolidation_opacity: Range = (0.45, 0.95)
    edema_opacity: Range = (0.08, 0.5)
    emphysema_flatten: Range = (0.25, 0.9)
    emphysema_dark: Range = (0.05, 0.22)
    fibrosis_opacity: Range = (0.25, 0.8)
    thickening_width: Range = (0.028, 0.08)
    thickening_opacity: Range = (0.7, 0.95)
    hernia_radius: Range = (0.048, 0.11)
    hernia_gas: Range = (0.22, 0.45)


@dataclass(frozen=True)
class LabelRates:
    """The label profiles and who is imaged."""

    ap: float = 0.40  # share of AP views, as in the NIH table (44,810 of 112,120)
    male: float = 0.565  # share of images of men in the NIH table
    block: int = 24  # consecutive images among which patients are cut
    per_patient: Range = (1, 6)
    dense_empty: float = 0.18  # share of images without a finding
    dense_counts: tuple[float, ...] = (0.24, 0.30, 0.25, 0.14, 0.07)  # 1..5 findings: mean 2.5
    dense_weights: tuple[float, ...] = (1.0,) * 14  # of the first finding drawn, in the order of FINDINGS


@dataclass(frozen=True)
class Parameters:
    """All of the above."""

    anatomy: AnatomyRanges = AnatomyRanges()
    pose: PoseRanges = PoseRanges()
    signs: SignRanges = SignRanges()
    labels: LabelRates = LabelRates()


PARAMETERS = Parameters()


def digest() -> str:
    """SHA-256 (hex) over version, parameters and label frequencies; stored in a data set's card."""
    content = json.dumps({"version": PHANTOM_VERSION, **asdict(PARAMETERS)}, sort_keys=True)
    return hashlib.sha256(content.encode() + FREQUENCIES.read_bytes()).hexdigest()


def at(span: Range, severity: float) -> float:
    """The value of a range at a severity in [0, 1]."""
    return span[0] + (span[1] - span[0]) * severity


def spread(ranges: AnatomyRanges | PoseRanges, uniform: list[float]) -> dict[str, float]:
    """One value a field, from as many uniform numbers in [0, 1)."""
    return {field.name: at(getattr(ranges, field.name), u) for field, u in zip(fields(ranges), uniform, strict=True)}
