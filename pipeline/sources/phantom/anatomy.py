"""The healthy synthetic chest: a patient's proportions, and the scene of densities that signs then change."""

from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.sources.phantom.parameters import PARAMETERS, spread
from pipeline.sources.phantom.shapes import Array, bands, bell, blur, edge, grid, radius, strokes

SIDES = (-1, 1)
"""-1: the image's left, which is the patient's right; +1: the image's right, the patient's left."""


@dataclass(frozen=True)
class Anatomy:
    """One patient's proportions, as fractions of the image side; meanings are in `parameters.AnatomyRanges`."""

    width: float
    apex: float
    dome: float
    left_drop: float
    angle_depth: float
    taper: float
    mediastinum: float
    heart: float
    heart_height: float
    heart_tilt: float
    knob: float
    wall: float
    clavicle: float
    rib_pitch: float
    rib_slope: float
    rib_density: float
    lung_depth: float
    tissue: float
    vessels: float
    breast: float
    bubble: float
    spine: float
    female: bool = False
    portable: bool = False  # an AP view
    middle: float = 0.5  # x of the mediastinum
    lift: tuple[float, float] = (0.0, 0.0)  # hemidiaphragms raised by loss of volume, right then left
    flatten: float = 0.0  # how far the domes are pressed flat, 0..1

    def dome_of(self, side: int) -> float:
        """Height of a hemidiaphragm's top."""
        return self.dome + (self.left_drop if side > 0 else 0.0) - self.lift[side > 0]

    def half_width(self, y: Array) -> Array:
        """Half width of the thorax at heights y; same shape."""
        depth = np.clip((y - self.apex) / (self.dome - self.apex), 0, 1)
        return np.float32(self.width) * np.sqrt(1 - (1 - depth) ** np.float32(self.taper))

    def place(self, side: int, lateral: float, depth: float) -> tuple[float, float]:
        """A point in a lung: `lateral` 0 at the mediastinum, 1 at the ribs; `depth` 0 at the apex, 1 at the dome."""
        y = self.apex + depth * (self.dome_of(side) - self.apex)
        outer = float(self.half_width(np.array([y]))[0])
        inner = self.mediastinum + 0.01
        return 0.5 + side * (inner + lateral * (outer - inner)), y


@dataclass(frozen=True)
class Pose:
    """How one image was taken; meanings are in `parameters.PoseRanges`."""

    tilt: float
    yaw: float
    shift_x: float
    shift_y: float
    zoom: float
    inspiration: float
    exposure: float
    contrast: float
    noise: float


@dataclass
class Scene:
    """Densities under construction, each [size, size]: signs change them in place."""

    size: int
    anatomy: Anatomy
    lungs: dict[int, Array]  # 1 inside a pleural cavity, by side
    lateral: dict[int, Array]  # 0 at the mediastinum, 1 at the ribs
    depth: Array  # 0 at the apices, 1 at the domes; [size, 1]
    heart: Array
    air: Array  # share of air in the beam's path
    vessels: Array
    added: Array  # density on top of tissue
    bones: Array
    dark: Array = field(init=False)  # additional lucency

    def __post_init__(self) -> None:
        """Starts without lucency."""
        self.dark = self.empty()

    def empty(self) -> Array:
        """Zeros of the scene's size, float32."""
        return np.zeros((self.size, self.size), np.float32)

    def fill(self, opacity: Array) -> None:
        """Replaces air by fluid or cells: opacity in [0, 1]."""
        self.air *= 1 - opacity


def draw_anatomy(rng: np.random.Generator, female: bool) -> Anatomy:
    """A patient's proportions, uniform over `AnatomyRanges`."""
    ranges = PARAMETERS.anatomy
    values: dict[str, Any] = spread(ranges, rng.random(len(fields(ranges))).tolist())
    return Anatomy(**values, female=female)


def draw_pose(rng: np.random.Generator) -> Pose:
    """An image's geometry and exposure, uniform over `PoseRanges`."""
    ranges = PARAMETERS.pose
    return Pose(**spread(ranges, rng.random(len(fields(ranges))).tolist()))


def build(anatomy: Anatomy, size: int, rng: np.random.Generator) -> Scene:
    """The healthy chest of an anatomy at `size` pixels; `rng` draws the vessels."""
    x, y = grid(size)
    soft = max(1.0 / size, 0.006)
    depth = np.clip((y - anatomy.apex) / (anatomy.dome - anatomy.apex), 0, 1.3)
    half, inner = anatomy.half_width(y), _inner(anatomy, depth)
    floor = np.where(x < 0.5, _floor(anatomy, -1, x), _floor(anatomy, 1, x))
    above = edge(floor - y, soft)
    lungs, lateral = {}, {}
    for side in SIDES:
        outward = (x - np.float32(0.5)) * side
        lateral[side] = (outward - inner) / np.maximum(half - inner, 1e-3)
        lungs[side] = edge(outward - inner, soft) * edge(half - outward, soft) * above
    cavity = lungs[-1] + lungs[1]
    heart = _heart(anatomy, size)
    air = cavity * (1 - 0.93 * heart) * (0.78 + 0.22 * np.clip(lateral[-1] + lateral[1] + 1.2, 0, 1))
    scene = Scene(size, anatomy, lungs, lateral, depth, heart, air, _vessels(anatomy, size, rng),
                  np.zeros((size, size), np.float32), _bones(anatomy, size))  # fmt: skip
    _soft_tissue(scene, above)
    return scene


def _inner(anatomy: Anatomy, depth: Array) -> Array:
    """Half width of the mediastinum at each height: wide at the apex, narrow at the aortic window."""
    window = 0.25 * np.exp(-(((depth - 0.3) / 0.15) ** 2))
    return anatomy.mediastinum * (1 + 0.9 * np.exp(-depth / 0.05) - window)


def _floor(anatomy: Anatomy, side: int, x: Array) -> Array:
    """Height of the lung's lower border: a dome that falls to the costophrenic angle; [1, size]."""
    from_peak = ((x - np.float32(0.5)) * side - 0.47 * anatomy.width) / (0.53 * anatomy.width)
    curve = np.where(from_peak > 0, from_peak**2, 0.45 * from_peak**2)
    dome = anatomy.dome_of(side)
    flat = dome + 0.45 * anatomy.angle_depth * anatomy.flatten
    return flat + np.float32(anatomy.angle_depth * (1 - 0.75 * anatomy.flatten)) * curve


def _heart(anatomy: Anatomy, size: int) -> Array:
    """Heart, aortic knob and great vessels as one silhouette in [0, 1]."""
    x, y = grid(size)
    total = anatomy.heart * 2 * anatomy.width
    half, upright = total / 2, total / 2 * anatomy.heart_height
    tilt = anatomy.heart_tilt
    # The tilted ellipse's horizontal extent must stay total / 2: the cardiothoracic ratio is exact.
    along = np.sqrt(max(half**2 - (upright * np.sin(tilt)) ** 2, 1e-6)) / np.cos(tilt)
    low = (anatomy.dome_of(-1) + anatomy.dome_of(1)) / 2 + 0.03
    centre = (anatomy.middle + 0.19 * total, low - 0.80 * upright)
    soft = max(1.5 / size, 0.010)
    distance = radius(size, centre, (float(along), upright), tilt)
    body = edge((1 - distance) * np.float32(min(half, upright)), soft)
    knob_y = anatomy.apex + 0.27 * (anatomy.dome - anatomy.apex)
    knob = radius(size, (anatomy.middle + anatomy.mediastinum * 0.75, knob_y), (anatomy.knob, anatomy.knob * 1.15))
    aorta = edge((1 - knob) * np.float32(anatomy.knob), soft)
    stem = np.float32(anatomy.mediastinum) + np.float32(0.05) * np.clip((y - knob_y) / 0.22, 0, 1)
    trunk = edge(stem - np.abs(x - anatomy.middle - 0.008), 2 * soft)
    trunk = trunk * edge(y - knob_y, 0.02) * edge(centre[1] - y, 0.1)
    return np.maximum(np.maximum(body, aorta), trunk)


def _vessels(anatomy: Anatomy, size: int, rng: np.random.Generator) -> Array:
    """Pulmonary vessels: branches that leave the hila, fork twice and fade outwards; [size, size] in [0, 1]."""
    steps = np.linspace(0, 1, 6)
    stems, twigs = [], []
    for side in SIDES:
        uniform = rng.random((5, 11))
        angle = np.linspace(-1.35, 1.45, 11) + 0.3 * (uniform[0] - 0.5)
        length = (0.13 + 0.13 * uniform[1]) * (1 + 0.45 * np.abs(np.sin(angle)))
        bend = 0.10 * (uniform[2] - 0.5) * steps[:, None] ** 2
        root = np.array(anatomy.place(side, 0.03, 0.48)) + np.stack([0 * angle, 0.055 * np.sin(angle)], -1)
        ahead, across = _headings(side, angle)
        path = root + steps[:, None, None] * (length[:, None] * ahead) + bend[..., None] * across
        stems.append(path.transpose(1, 0, 2))
        for turn, node in ((-0.4, 2), (0.45, 3), (-0.35, 4)):
            ahead, _ = _headings(side, angle + turn * (0.6 + uniform[3]))
            reach = (0.05 + 0.06 * uniform[4])[:, None] * ahead
            twigs.append((path[node] + steps[::2, None, None] * reach).transpose(1, 0, 2))
    paths = np.concatenate(stems)
    drawn = 0.8 * strokes(size, paths[:, :4], 0.0085)
    drawn = np.maximum(drawn, 0.6 * strokes(size, paths, 0.006))
    return np.maximum(drawn, 0.42 * strokes(size, np.concatenate(twigs), 0.0045))


def _headings(side: int, angle: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Unit vectors along and across directions that open outwards on a side; each [n, 2]."""
    ahead = np.stack([side * np.cos(angle), np.sin(angle)], -1)
    return ahead, np.stack([-ahead[:, 1], ahead[:, 0]], -1)


def _bones(anatomy: Anatomy, size: int) -> Array:
    """Ribs, clavicles and scapulae: density to add, already scaled; [size, size]."""
    steps = np.linspace(0, 1, 12)[None, :]
    start = anatomy.apex + 0.015 + anatomy.rib_pitch * np.arange(9)[:, None]
    down = start + anatomy.rib_slope * steps**1.7 - 0.035 * np.sin(np.pi * steps)
    back = _mirrored(0.028 + steps * (anatomy.half_width(down) - 0.028), down)
    turn = start[:7] + anatomy.rib_slope + 0.13 * steps**1.4
    front = _mirrored(anatomy.half_width(turn) * (1 - 0.62 * steps), turn)
    along = np.linspace(0.035, 0.34, 12)[None, :]
    rise = anatomy.apex + anatomy.clavicle - 0.10 * (along - 0.035) / 0.3 + 0.012 * np.sin(2 * np.pi * along / 0.34)
    collar = _mirrored(along, rise - (0.03 if anatomy.portable else 0.0))
    # Cortex is denser than marrow: a wide band minus a narrow one.
    bones = bands(size, back, 0.027) - 0.40 * bands(size, back, 0.015)
    bones += 0.55 * bands(size, front, 0.030) - 0.2 * bands(size, front, 0.017)
    bones += 1.2 * bands(size, collar, 0.032) - 0.35 * bands(size, collar, 0.018)
    bones *= anatomy.rib_density
    lateral = 0.30 if anatomy.portable else 0.385
    for side in SIDES:
        blade = radius(size, (0.5 + side * lateral, anatomy.apex + 0.17), (0.055, 0.14), -side * 0.25)
        bones += 0.05 * edge((1 - blade) * 0.055, 0.025)
    return bones


def _mirrored(outward: NDArray[np.float64], down: NDArray[np.float64]) -> NDArray[np.float64]:
    """Curves [n, points] given from the midline outwards, on both sides: [2 n, points, 2] of x and y."""
    return np.concatenate([np.stack([0.5 + side * outward, down], -1) for side in SIDES])


def _soft_tissue(scene: Scene, above: Array) -> None:
    """Adds mediastinum, spine, trachea, hila, abdomen, stomach gas and breasts."""
    anatomy, size = scene.anatomy, scene.size
    x, y = grid(size)
    added = scene.added
    centre = np.abs(x - np.float32(0.5))
    added += np.float32(0.13) * (1 - above) * edge(y - np.float32(anatomy.dome - 0.05), 0.1)
    column = edge(anatomy.mediastinum - np.abs(x - np.float32(anatomy.middle)), 0.02)
    added += 0.10 * np.maximum(column, scene.heart * (0.4 + 0.6 * above))
    discs = 0.75 + 0.25 * np.sign(np.sin(y * np.float32(2 * np.pi / 0.052)))
    added += np.float32(anatomy.spine) * edge(0.036 - centre, 0.012) * discs
    windpipe = edge(0.017 - np.abs(x - anatomy.middle), 0.012) * edge(anatomy.apex + 0.22 - y, 0.02)
    added -= np.float32(0.11) * windpipe
    for side in SIDES:
        hilum = radius(size, anatomy.place(side, 0.05, 0.46 if side < 0 else 0.43), (0.045, 0.075), -side * 0.2)
        added += np.float32(0.55 * anatomy.vessels) * bell(hilum / 1.3)
        if anatomy.female:
            breast = radius(size, (0.5 + side * 0.6 * anatomy.width, anatomy.dome - 0.03), (0.165, 0.15))
            added += np.float32(anatomy.breast) * edge((1 - breast) * np.float32(0.15), 0.04)
    bubble = radius(size, (0.5 + 0.45 * anatomy.width, anatomy.dome_of(1) + 0.075), (0.075, 0.042))
    scene.dark += np.float32(anatomy.bubble) * bell(bubble / 1.2)


def outline(anatomy: Anatomy, size: int) -> Array:
    """Thickness of the body in [0, 1]: neck, shoulders, chest wall and arms against air; [size, size]."""
    x, y = grid(size)
    off = np.abs(x - np.float32(0.5))
    shoulder = 0.095 + 0.42 * np.clip((y - (anatomy.apex - 0.085)) / 0.13, 0, 1) ** 0.7
    waist = anatomy.half_width(y) + anatomy.wall
    fold = np.clip((y - (anatomy.apex + 0.13)) / 0.30, 0, 1)  # the axillary fold, from shoulder to chest wall
    trunk = waist + (0.66 - waist) * (1 - fold) ** 2.2
    body = np.sqrt(np.clip((np.minimum(shoulder, trunk) - off) * (1 / 0.085), 0, 1))
    arm = waist + 0.012 + 0.16 * np.clip(y - (anatomy.apex + 0.30), 0, 1)
    arms = 0.9 * edge(off - arm, 0.03) * edge(y - (anatomy.apex + 0.08), 0.06)
    return blur(np.maximum(body, arms), 0.006)
