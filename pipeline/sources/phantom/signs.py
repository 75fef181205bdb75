"""The radiographic sign of each finding: first what it does to proportions, then what it adds to the scene."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from pipeline.sources.phantom.anatomy import SIDES, Anatomy, Scene
from pipeline.sources.phantom.parameters import PARAMETERS, at
from pipeline.sources.phantom.shapes import Array, bell, blur, edge, grid, radius, smooth_noise, strokes

Generator = np.random.Generator
Reshape = Callable[[Anatomy, float, Generator], Anatomy]
Sign = Callable[[Scene, float, Generator], Array]
_S = PARAMETERS.signs


def _side(rng: Generator, left: float = 0.5) -> int:
    """A side by its probability of being the patient's left; always the first draw, so both stages agree."""
    return 1 if rng.random() < left else -1


def _raise(anatomy: Anatomy, side: int, amount: float) -> Anatomy:
    right, left = anatomy.lift
    return replace(anatomy, lift=(right + amount * (side < 0), left + amount * (side > 0)))


def reshape_atelectasis(anatomy: Anatomy, severity: float, rng: Generator) -> Anatomy:
    """Loss of volume: the hemidiaphragm rises and the mediastinum follows."""
    side, lift = _side(rng), at(_S.atelectasis_lift, severity)
    return replace(_raise(anatomy, side, lift), middle=anatomy.middle + side * 0.25 * lift)


def reshape_cardiomegaly(anatomy: Anatomy, severity: float, rng: Generator) -> Anatomy:
    """A cardiothoracic ratio above one half."""
    return replace(anatomy, heart=at(_S.cardiomegaly_ratio, severity))


def reshape_emphysema(anatomy: Anatomy, severity: float, rng: Generator) -> Anatomy:
    """Hyperinflation: low flat domes, a narrow upright heart, sparse vessels."""
    return replace(
        anatomy,
        flatten=at(_S.emphysema_flatten, severity),
        dome=anatomy.dome + 0.05 * severity,
        heart=anatomy.heart * (1 - 0.12 * severity) if anatomy.heart < 0.5 else anatomy.heart,
        vessels=anatomy.vessels * (1 - 0.45 * severity),
    )


def reshape_fibrosis(anatomy: Anatomy, severity: float, rng: Generator) -> Anatomy:
    """Stiff small lungs."""
    return replace(anatomy, dome=anatomy.dome - 0.035 * severity)


def reshape_pneumothorax(anatomy: Anatomy, severity: float, rng: Generator) -> Anatomy:
    """Tension pushes the mediastinum away."""
    side = _side(rng)
    return replace(anatomy, middle=anatomy.middle - side * 0.035 * max(severity - 0.5, 0))


def atelectasis(scene: Scene, severity: float, rng: Generator) -> Array:
    """Plate-like bands above a raised hemidiaphragm, and a hazy collapsed base."""
    side = _side(rng)
    region = scene.empty()
    for number in range(1 + round(2 * severity)):
        u = rng.random(4)
        centre = scene.anatomy.place(side, 0.30 + 0.35 * float(u[0]), 0.93 - 0.13 * number - 0.05 * float(u[1]))
        half = (0.085 + 0.05 * float(u[2]), 0.011 + 0.006 * severity)
        plate = radius(scene.size, centre, half, side * (float(u[3]) - 0.6) * 0.7)
        region = np.maximum(region, edge(1 - plate, 0.5))
    base = np.clip((scene.depth - 0.80) / 0.2, 0, 1) * np.float32(0.5)
    region = np.maximum(region, base) * scene.lungs[side]
    scene.fill(np.float32(at(_S.atelectasis_opacity, severity)) * region)
    return region


def cardiomegaly(scene: Scene, severity: float, rng: Generator) -> Array:
    """The enlarged silhouette itself."""
    return scene.heart.copy()


def effusion(scene: Scene, severity: float, rng: Generator) -> Array:
    """Fluid at the base with a meniscus that climbs the chest wall; at the least a blunted angle."""
    first = _side(rng)
    sides = SIDES if rng.random() < 0.3 else (first,)
    _, y = grid(scene.size)
    region = scene.empty()
    anatomy = scene.anatomy
    for side in sides:
        height = at(_S.effusion_height, severity) * (1.0 if side == first else 0.6)
        lowest = anatomy.dome_of(side) + 0.8 * anatomy.angle_depth
        lateral = np.clip(scene.lateral[side], 0, 1)
        climb = 0.75 + 0.55 * lateral * lateral * lateral + 0.08 * bell(lateral)
        level = lowest - height * climb
        region = np.maximum(region, edge(y - level, 0.016) * scene.lungs[side])
    scene.fill(0.97 * region)
    return region


def infiltration(scene: Scene, severity: float, rng: Generator) -> Array:
    """Ill-defined streaky haze in patches of both lungs."""
    patches = np.clip(3.2 * (smooth_noise(rng, 7, scene.size) - 0.38), 0, 1)
    grain = np.clip(1.9 * (smooth_noise(rng, 34, scene.size) - 0.22), 0, 1)
    zone = np.clip((scene.depth - 0.12) / 0.3, 0, 1)
    share = 0.55 + 0.45 * rng.random(2)
    cavity = scene.lungs[-1] * float(share[0]) + scene.lungs[1] * float(share[1])
    region: Array = patches * (0.35 + 0.65 * grain) * zone * cavity
    scene.fill(np.float32(at(_S.infiltration_opacity, severity)) * region)
    return region


def _ball(scene: Scene, rng: Generator, size: float, sharp: float) -> Array:
    """A round opacity somewhere in the lungs: denser at its centre, slightly lobed."""
    side = _side(rng)
    u = rng.random(5)
    centre = scene.anatomy.place(side, 0.22 + 0.62 * float(u[0]), 0.15 + 0.68 * float(u[1]))
    shape = radius(scene.size, centre, (size, size * (0.82 + 0.3 * float(u[2]))), 3.0 * float(u[3]))
    return edge(1 - shape, sharp) * (0.6 + 0.4 * bell(shape)) * scene.lungs[side]


def mass(scene: Scene, severity: float, rng: Generator) -> Array:
    """A round opacity of more than 3 cm with a plain border."""
    region = _ball(scene, rng, at(_S.mass_radius, severity), 0.30)
    scene.fill(np.float32(at(_S.mass_opacity, severity)) * region)
    scene.added += (0.04 + 0.10 * severity) * region
    return region


def nodule(scene: Scene, severity: float, rng: Generator) -> Array:
    """One to six round opacities of at most 3 cm."""
    region = scene.empty()
    for _ in range(1 + int(rng.random() * (2 + 4 * severity))):
        region = np.maximum(region, _ball(scene, rng, at(_S.nodule_radius, severity), 0.5))
    scene.fill(np.float32(at(_S.nodule_opacity, severity)) * region)
    scene.added += (0.06 + 0.22 * severity) * region
    return region


def pneumonia(scene: Scene, severity: float, rng: Generator) -> Array:
    """Fluffy confluent airspace patches in one or two segments, mostly at the base, with air bronchograms."""
    side = _side(rng)
    u = rng.random(4)
    middle = scene.anatomy.place(side, 0.25 + 0.35 * float(u[0]), 0.62 + 0.25 * float(u[1]))
    region = scene.empty()
    for _ in range(7):
        v = rng.random(3)
        centre = (middle[0] + 0.16 * (float(v[0]) - 0.5), middle[1] + 0.22 * (float(v[1]) - 0.5))
        spot = 0.055 + 0.035 * float(v[2])
        region = 1 - (1 - region) * (1 - 0.75 * bell(radius(scene.size, centre, (spot, spot)) / 1.25))
    region = region * np.minimum(0.75 + 0.5 * smooth_noise(rng, 26, scene.size), 1) * scene.lungs[side]
    bronchi = 0.5 * scene.vessels * (region > 0.4)
    scene.fill(np.float32(at(_S.pneumonia_opacity, severity)) * region * (1 - bronchi))
    return np.asarray(region)


def pneumothorax(scene: Scene, severity: float, rng: Generator) -> Array:
    """A dark rim without markings between ribs and a fine pleural line, widest at the apex."""
    side = _side(rng)
    rim = at(_S.pneumothorax_rim, severity)
    lung = scene.lungs[side]
    depth = np.clip(scene.depth, 0, 1)
    border = 1 - rim * (1.25 - 0.75 * depth) - 0.25 * rim * np.exp(-depth / 0.08)
    outside = scene.lateral[side] - border
    free = edge(outside, 0.03) * lung
    width = max(0.011, 1.3 / scene.size) / max(scene.anatomy.width, 0.1)
    line = bell(np.clip(np.abs(outside) / np.float32(width * 1.1), 0, 1)) * lung
    scene.vessels *= 1 - free
    scene.air *= 1 + np.float32(0.28 + 0.14 * severity) * free
    scene.fill(np.float32(0.16 * severity) * (lung - free).clip(0, 1))
    scene.added += np.float32(0.13) * line
    return np.asarray(np.maximum(free, line))


def consolidation(scene: Scene, severity: float, rng: Generator) -> Array:
    """A homogeneous lobe with a sharp fissural border and air bronchograms."""
    side = _side(rng)
    lung, depth = scene.lungs[side], scene.depth
    slope = np.float32(0.12 * (rng.random() - 0.5)) * scene.lateral[side]
    fissure = 0.40 + 0.10 * rng.random()
    upper = rng.random() < 0.5
    near = np.float32(0.34 + 0.14 * severity)
    away = (fissure - depth) if upper else (depth - fissure - 0.08)
    away = away + slope
    region = edge(away, 0.05) * edge(near - away, 0.22) * lung * np.clip(1.35 - 0.5 * scene.lateral[side], 0.4, 1)
    bronchi = 0.55 * scene.vessels
    scene.fill(np.float32(at(_S.consolidation_opacity, severity)) * region * (1 - bronchi))
    return np.asarray(region)


def edema(scene: Scene, severity: float, rng: Generator) -> Array:
    """Batwing haze around both hila, large blurred vessels, septal (Kerley B) lines at the bases."""
    region = scene.empty()
    lines = []
    for side in SIDES:
        wing = radius(scene.size, scene.anatomy.place(side, 0.30, 0.55), (0.15, 0.24), -side * 0.25)
        region += bell(wing / 1.25) * scene.lungs[side]
        for number in range(5):
            start = scene.anatomy.place(side, 0.99, 0.80 + 0.05 * number)
            lines.append([start, (start[0] - side * 0.045, start[1] + 0.004)])
    amount = np.float32(at(_S.edema_opacity, severity))
    scene.fill(amount * region * (0.8 + 0.4 * smooth_noise(rng, 20, scene.size)).clip(0, 1))
    np.maximum(scene.vessels, (1.3 + severity) * blur(scene.vessels, 0.008), out=scene.vessels)
    septa = strokes(scene.size, np.array(lines), 0.005) * (scene.lungs[-1] + scene.lungs[1])
    scene.added += (0.05 + 0.06 * severity) * septa
    return region


def emphysema(scene: Scene, severity: float, rng: Generator) -> Array:
    """Over-lucent lungs, sparse vessels and thin-walled bullae."""
    cavity = scene.lungs[-1] + scene.lungs[1]
    scene.air *= 1 + np.float32(at(_S.emphysema_dark, severity)) * cavity
    for _ in range(1 + int(3 * severity)):
        side = _side(rng)
        u = rng.random(3)
        size = 0.035 + 0.045 * float(u[2]) * (0.4 + severity)
        centre = scene.anatomy.place(side, 0.35 + 0.5 * float(u[0]), 0.12 + 0.4 * float(u[1]))
        bulla = radius(scene.size, centre, (size, size))
        inside = edge(1 - bulla, 0.2) * scene.lungs[side]
        scene.air *= 1 + np.float32(at(_S.emphysema_dark, severity)) * inside
        scene.vessels *= 1 - inside
        scene.added += np.float32(0.05) * bell(np.clip(np.abs(bulla - 1) / 0.22, 0, 1)) * scene.lungs[side]
    return cavity


def fibrosis(scene: Scene, severity: float, rng: Generator) -> Array:
    """A coarse net of lines, densest at the bases and the periphery."""
    net = scene.empty()
    for cells in (24, 40):
        ridge = np.abs(smooth_noise(rng, cells, scene.size) - 0.5)
        net = np.maximum(net, np.clip(1 - ridge / 0.16, 0, 1))
    zone = scene.empty()
    for side in SIDES:
        rim = np.clip(0.25 + 0.75 * scene.lateral[side], 0, 1)
        zone += scene.lungs[side] * rim * np.clip((scene.depth - 0.35) / 0.5, 0.08, 1)
    scene.fill(np.float32(at(_S.fibrosis_opacity, severity)) * net * zone)
    return zone


def pleural_thickening(scene: Scene, severity: float, rng: Generator) -> Array:
    """A smooth dense band along the ribs of one or both sides, with a cap over the apex."""
    side = _side(rng)
    u = rng.random(2)
    width = at(_S.thickening_width, severity) / scene.anatomy.width
    middle, reach = 0.30 + 0.35 * float(u[0]), 0.20 + 0.22 * float(u[1])
    swell = np.exp(-(((scene.depth - middle) / reach) ** 4)) + 0.9 * np.exp(-scene.depth / 0.10)
    band = scene.empty()
    for one in SIDES if rng.random() < 0.4 else (side,):
        band += edge(scene.lateral[one] - (1 - width * swell), 0.03) * scene.lungs[one]
    scene.fill(np.float32(at(_S.thickening_opacity, severity)) * band)
    scene.added += np.float32(0.05) * band
    return np.asarray(band)


def hernia(scene: Scene, severity: float, rng: Generator) -> Array:
    """Stomach behind the heart: a round opacity above the diaphragm with gas over a fluid level."""
    u = rng.random(2)
    size = at(_S.hernia_radius, severity)
    _, y = grid(scene.size)
    low = (scene.anatomy.dome_of(-1) + scene.anatomy.dome_of(1)) / 2
    centre = (scene.anatomy.middle + 0.005 + 0.05 * float(u[0]), low - 0.35 * size - 0.03 * float(u[1]))
    sac = radius(scene.size, centre, (size * 1.15, size))
    region = edge(1 - sac, 0.14)
    scene.fill(0.9 * region)
    wall = bell(np.clip(np.abs(sac - 0.93) / 0.2, 0, 1))
    scene.added += np.float32(0.06) * region + np.float32(0.07) * wall
    gas = edge(0.88 - sac, 0.12) * edge(np.float32(centre[1] - 0.1 * size) - y, 0.012)
    scene.dark += np.float32(at(_S.hernia_gas, severity)) * gas
    return region


RESHAPES: dict[str, Reshape] = {
    "Atelectasis": reshape_atelectasis,
    "Cardiomegaly": reshape_cardiomegaly,
    "Emphysema": reshape_emphysema,
    "Fibrosis": reshape_fibrosis,
    "Pneumothorax": reshape_pneumothorax,
}
SIGNS: dict[str, Sign] = {
    "Atelectasis": atelectasis,
    "Cardiomegaly": cardiomegaly,
    "Effusion": effusion,
    "Infiltration": infiltration,
    "Mass": mass,
    "Nodule": nodule,
    "Pneumonia": pneumonia,
    "Pneumothorax": pneumothorax,
    "Consolidation": consolidation,
    "Edema": edema,
    "Emphysema": emphysema,
    "Fibrosis": fibrosis,
    "Pleural_Thickening": pleural_thickening,
    "Hernia": hernia,
}
