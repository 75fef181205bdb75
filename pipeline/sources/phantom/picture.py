"""From a case to pixels: proportions, scene, signs, exposure."""

from dataclasses import dataclass, replace

import cv2
import numpy as np
from numpy.typing import NDArray

from pipeline.sources.phantom.anatomy import Anatomy, Pose, Scene, build, draw_anatomy, draw_pose, outline
from pipeline.sources.phantom.labels import FINDINGS, Profile, generator, labels, patient, view
from pipeline.sources.phantom.parameters import PARAMETERS
from pipeline.sources.phantom.shapes import Array, blur, smooth_noise
from pipeline.sources.phantom.signs import RESHAPES, SIGNS

_AP_HEART = 1.06  # the heart lies far from the detector in an AP view and is magnified
_KNEE = np.float32(0.72)  # the display compresses densities above this instead of clipping them
_NORMAL_RATIO = 0.497  # the largest cardiothoracic ratio without cardiomegaly


@dataclass(frozen=True)
class Case:
    """What one synthetic image shows; the anatomy follows from seed and patient."""

    seed: int
    index: int
    patient: int
    female: bool
    view: str
    severities: dict[str, float]
    """Severity in [0, 1] of every finding that is present."""


def case_of(seed: int, index: int, profile: Profile) -> Case:
    """The case of an image; severities are drawn for each finding by itself."""
    person = patient(seed, index)
    present = np.flatnonzero(labels(seed, index, profile))
    power = PARAMETERS.signs.severity_power
    severities = {FINDINGS[k]: float(generator(seed, "sign", index, k, 0).random() ** power) for k in present.tolist()}
    return Case(seed, index, person.number, person.sex == "F", view(seed, index), severities)


def draw(case: Case, size: int, masks: bool = True) -> tuple[NDArray[np.uint8], dict[str, NDArray[np.bool_]]]:
    """The image of a case as uint8 [size, size], and where each sign is as bool [size, size] (empty if not `masks`)."""
    cv2.setNumThreads(0)
    pose = draw_pose(generator(case.seed, "pose", case.index))
    anatomy = proportions(case, pose)
    scene = build(anatomy, size, generator(case.seed, "vessels", case.patient))
    regions = {
        name: SIGNS[name](scene, severity, generator(case.seed, "sign", case.index, FINDINGS.index(name), 1))
        for name, severity in case.severities.items()
    }
    rng = generator(case.seed, "noise", case.index)
    image = _expose(scene, pose, rng)
    if not masks:
        return image, {}
    turn = _turn(pose, size)
    moved = {name: cv2.warpAffine(region, turn, (size, size)) > 0.25 for name, region in regions.items()}
    return image, moved


def render(seed: int, index: int, profile: Profile, size: int) -> NDArray[np.uint8]:
    """A synthetic radiograph as uint8 [size, size]; the anatomy is the same at every size."""
    return draw(case_of(seed, index, profile), size, masks=False)[0]


def render_with_signs(
    seed: int, index: int, profile: Profile, size: int
) -> tuple[NDArray[np.uint8], dict[str, NDArray[np.bool_]]]:
    """The image of `render`, and for each finding in it the pixels of its sign as bool [size, size]."""
    return draw(case_of(seed, index, profile), size)


def proportions(case: Case, pose: Pose) -> Anatomy:
    """The patient's anatomy as this image and its findings change it."""
    anatomy = draw_anatomy(generator(case.seed, "patient", case.patient, 1), case.female)
    portable = case.view == "AP"
    ratio = min(anatomy.heart * (_AP_HEART if portable else 1.0), _NORMAL_RATIO)
    dome = anatomy.dome + pose.inspiration - (0.02 if portable else 0.0)
    anatomy = replace(anatomy, portable=portable, heart=ratio, dome=dome, middle=0.5 + pose.yaw)
    for name, severity in case.severities.items():
        if name in RESHAPES:
            rng = generator(case.seed, "sign", case.index, FINDINGS.index(name), 1)
            anatomy = RESHAPES[name](anatomy, severity, rng)
    return anatomy


def _turn(pose: Pose, size: int) -> NDArray[np.float64]:
    """The pose's rotation, zoom and shift as a 2 x 3 matrix for OpenCV."""
    turn = np.asarray(cv2.getRotationMatrix2D(((size - 1) / 2, (size - 1) / 2), pose.tilt, pose.zoom), np.float64)
    turn[:, 2] += np.array([pose.shift_x, pose.shift_y]) * size
    return turn


def _expose(scene: Scene, pose: Pose, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Adds up densities along the beam, then applies pose, scatter, exposure, noise and the display curve."""
    anatomy, size = scene.anatomy, scene.size
    air = scene.air
    density = anatomy.tissue + scene.added - np.float32(anatomy.lung_depth) * air - scene.dark
    density += np.float32(anatomy.vessels) * scene.vessels * np.minimum(air, 1)
    density *= 0.97 + 0.06 * smooth_noise(rng, 5, size)
    density += scene.bones
    density *= outline(anatomy, size)
    density = cv2.warpAffine(density, _turn(pose, size), (size, size), borderMode=cv2.BORDER_REPLICATE)
    density = 0.88 * blur(density, 0.004) + 0.12 * _scatter(density)
    contrast = pose.contrast * (0.92 if anatomy.portable else 1.0)
    density = (density - np.float32(0.5)) * np.float32(contrast) + np.float32(0.5 + pose.exposure)
    grain = np.empty((size, size), np.float32)
    rng.standard_normal(out=grain, dtype=np.float32)
    density += grain * np.float32(pose.noise * min(2.0, (size / 128) ** 0.5))
    over = np.maximum(density - _KNEE, 0)
    density += (1 - _KNEE) * (1 - np.exp(-over / (1 - _KNEE))) - over
    return (np.clip(density, 0, 1) * 255).astype(np.uint8)


def _scatter(density: Array) -> Array:
    """Scattered radiation: a wide blur, computed on a small copy."""
    size = density.shape[0]
    small = cv2.resize(density, (32, 32), interpolation=cv2.INTER_AREA)
    return np.asarray(cv2.resize(cv2.GaussianBlur(small, (0, 0), 2.5), (size, size), interpolation=cv2.INTER_LINEAR))
