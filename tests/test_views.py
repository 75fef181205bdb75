"""Views and RED: identity, determinism, the field's law, and radiographs that stay radiographs."""

import os
import pickle
import subprocess
import sys

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from mpc.config import RedConfig, StrongConfig, ViewsConfig, WeakConfig
from mpc.red import displacement, lattice_weights, simard_rms
from mpc.views import FILL, ElasticDeformation, TwoViews, warp

SIDE, RMS, SIGMA = 224, 0.013 * 224, 0.045 * 224
STILL = {"ops": 0, "blur": 0.0, "cutout": 0.0}


def smooth_image(side: int = SIDE, seed: int = 0) -> NDArray[np.uint8]:
    noise = np.random.default_rng(seed).random((side, side), dtype=np.float32)
    blurred = cv2.GaussianBlur(noise, (0, 0), side / 20)
    return cv2.normalize(blurred, None, 5, 250, cv2.NORM_MINMAX).astype(np.uint8)


def fields(count: int, side: int = SIDE) -> NDArray[np.float32]:
    rng = np.random.default_rng(0)
    return np.array([displacement(rng, side, side, RMS, SIGMA) for _ in range(count)])


def test_field_has_its_rms_everywhere() -> None:
    drawn = fields(400)
    assert np.sqrt((drawn**2).mean()) == pytest.approx(RMS, rel=0.02)
    for region in (drawn[..., :20, :20], drawn[..., 100:120, 100:120]):  # borders are no weaker than the middle
        assert np.sqrt((region**2).mean()) == pytest.approx(RMS, rel=0.1)
    assert abs(drawn.mean()) < 0.02 * RMS


def test_field_is_correlated_over_sigma() -> None:
    lag = round(SIGMA)
    drawn = fields(200) / RMS
    expected = np.exp(-(lag**2) / (4 * SIGMA**2))
    assert expected == pytest.approx(np.exp(-0.25), abs=0.01)
    assert (drawn[..., lag:] * drawn[..., :-lag]).mean() == pytest.approx(expected, abs=0.02)
    assert (drawn[..., lag:, :] * drawn[..., :-lag, :]).mean() == pytest.approx(expected, abs=0.02)
    assert (drawn[:, 0] * drawn[:, 1]).mean() == pytest.approx(0, abs=0.02)  # the axes are independent


def test_lattice_gives_the_continuous_correlation() -> None:
    weights = lattice_weights(SIDE, SIGMA)
    distance = np.subtract.outer(np.arange(SIDE), np.arange(SIDE))
    np.testing.assert_allclose(weights @ weights.T, np.exp(-(distance**2) / (4 * SIGMA**2)), atol=2e-4)


@pytest.mark.parametrize(("alpha", "sigma"), [(34, 4), (184, 10)])
def test_rms_agrees_with_simard(alpha: float, sigma: float) -> None:
    noise = np.random.default_rng(0).uniform(-1, 1, (512, 512))
    measured = (alpha * gaussian_filter(noise, sigma, mode="wrap")).std()
    assert simard_rms(alpha, sigma) == pytest.approx(0.1629 * alpha / sigma, rel=1e-3)
    assert measured == pytest.approx(simard_rms(alpha, sigma), rel=0.1)


def test_field_of_default_strength_does_not_fold() -> None:
    for dy, dx in fields(200):
        stretch_y, stretch_x = 1 + np.diff(dy, axis=0)[:, :-1], 1 + np.diff(dx, axis=1)[:-1]
        shear = np.diff(dy, axis=1)[:-1] * np.diff(dx, axis=0)[:, :-1]
        assert (stretch_y * stretch_x - shear).min() > 0


def test_field_follows_its_seed_and_shape() -> None:
    one, same, other = (displacement(np.random.default_rng(s), 40, 60, RMS, SIGMA)[0] for s in (1, 1, 2))
    assert one.shape == (40, 60)
    assert np.array_equal(one, same)
    assert not np.array_equal(one, other)


def test_warp_without_displacement_is_identity_and_with_a_shift_moves_pixels() -> None:
    image = smooth_image()
    still = np.zeros(image.shape, np.float32)
    assert np.array_equal(warp(image, still, still), image)
    shifted = warp(image, still + 2, still - 3)
    assert np.array_equal(shifted[:-2, 3:], image[2:, :-3])


def test_red_without_rms_is_identity() -> None:
    config = ViewsConfig(strong=StrongConfig(**STILL), red=RedConfig(rms=0.0, p=1.0))
    weak, strong = TwoViews(config, SIDE, strong=True)(smooth_image(), seed=0)
    assert np.array_equal(weak, strong)
    assert not np.shares_memory(weak, strong)


def test_red_moves_pixels_by_its_rms() -> None:
    ramp = np.broadcast_to(np.arange(SIDE, dtype=np.uint8), (SIDE, SIDE)).copy()  # grey level = column
    moved = []
    for seed in range(40):
        deformation = ElasticDeformation(0.013, 0.045, p=1.0)
        deformation.set_random_seed(seed)
        moved.append(deformation(image=ramp)["image"].astype(float) - ramp)
    inner = np.array(moved)[:, :, 20:-20]
    assert np.sqrt((inner**2).mean()) == pytest.approx(RMS, rel=0.1)


def test_a_constant_image_stays_constant_under_geometry_and_red() -> None:
    image = np.full((SIDE, SIDE), 77, np.uint8)
    config = ViewsConfig(strong=StrongConfig(ops=0, blur=1.0, cutout=0.0), red=RedConfig(p=1.0), hflip=0.5)
    assert all((view == 77).all() for view in TwoViews(config, SIDE, strong=True)(image, seed=3))
    config = ViewsConfig(strong=StrongConfig(ops=4, magnitude=2.0, cutout=0.0), red=RedConfig(p=1.0))
    views = TwoViews(config, SIDE, strong=True)
    for seed in range(20):  # whatever the photometric draws do, no border shows
        strong = views(image, seed)[1]
        assert strong.min() == strong.max()


def test_views_are_pure_functions_of_the_seed() -> None:
    image = smooth_image()
    before = image.copy()
    views = TwoViews(ViewsConfig(hflip=0.5), SIDE, strong=True)
    first = [views(image, seed) for seed in range(8)]
    again = pickle.loads(pickle.dumps(TwoViews(ViewsConfig(hflip=0.5), SIDE, strong=True)))
    for seed in reversed(range(8)):
        for one, other in zip(first[seed], again(image, seed), strict=True):
            assert np.array_equal(one, other)
    assert np.array_equal(image, before)
    assert len({strong.tobytes() for _, strong in first}) == 8
    assert len({weak.tobytes() for weak, _ in first}) == 8


def test_views_do_not_depend_on_global_generators() -> None:
    image, views = smooth_image(), TwoViews(ViewsConfig(), SIDE, strong=True)
    np.random.seed(1)
    first = views(image, 5)
    np.random.seed(2)
    assert all(np.array_equal(a, b) for a, b in zip(first, views(image, 5), strict=True))


def test_weak_view_is_the_same_with_and_without_a_strong_one() -> None:
    image = smooth_image()
    single, double = (TwoViews(ViewsConfig(), SIDE, strong=strong) for strong in (False, True))
    for seed in range(200):  # many: AutoContrast, one operation of eight, once wrote into the weak view
        (alone,), (paired, strong) = single(image, seed), double(image, seed)
        assert np.array_equal(alone, paired), seed
    for view in (alone, strong):
        assert (view.shape, view.dtype, view.flags.c_contiguous) == ((SIDE, SIDE), np.uint8, True)


def test_two_strong_views_share_one_weak_draw() -> None:
    image = smooth_image()
    one = TwoViews(ViewsConfig(), SIDE, strong=True)
    two = TwoViews(ViewsConfig(strong=StrongConfig(count=2)), SIDE, strong=True)
    for seed in range(10):
        weak, first, second = two(image, seed)
        assert all(np.array_equal(a, b) for a, b in zip(one(image, seed), (weak, first), strict=True))
        assert not np.array_equal(first, second)


def test_weak_view_without_crop_is_the_image_and_flips_as_often_as_asked() -> None:
    image = smooth_image(64)
    views = TwoViews(ViewsConfig(weak=WeakConfig(crop=1.0), hflip=0.5), 64, strong=False)
    seen = [views(image, seed)[0] for seed in range(200)]
    flips = sum(np.array_equal(view, image[:, ::-1]) for view in seen)
    assert flips + sum(np.array_equal(view, image) for view in seen) == 200
    assert 75 < flips < 125
    assert not np.shares_memory(seen[0], image)


def test_red_and_blur_are_drawn_independently() -> None:
    """One seed a transform would tie them: each would read the same first number."""
    image = (np.indices((128, 128)).sum(0) % 2 * 200).astype(np.uint8)
    changed = []
    for p_red, p_blur in ((0.5, 0.0), (0.0, 0.5), (0.5, 0.5)):
        config = ViewsConfig(strong=StrongConfig(ops=0, blur=p_blur, cutout=0.0), red=RedConfig(p=p_red))
        views = TwoViews(config, 128, strong=True)
        changed.append(np.mean([not np.array_equal(*views(image, seed)) for seed in range(400)]))
    red, blur, either = changed
    assert red == pytest.approx(0.5, abs=0.08)
    assert 0.35 < blur < 0.55  # the narrowest blurs change nothing
    assert either == pytest.approx(1 - (1 - red) * (1 - blur), abs=0.06)  # tied draws would leave it near 0.5


def test_cutout_erases_at_most_its_share_and_comes_last() -> None:
    config = ViewsConfig(strong=StrongConfig(ops=4, blur=1.0, cutout=0.2), red=RedConfig(p=1.0))
    views = TwoViews(config, SIDE, strong=True)
    image = np.full((SIDE, SIDE), 30, np.uint8)
    largest = 0
    for seed in range(60):
        strong = views(image, seed)[1]
        holes = strong == FILL
        assert len(np.unique(strong)) <= 2  # a sharp edge: nothing blurred or warped the hole
        largest = max(largest, *(np.count_nonzero(holes.any(axis)) for axis in (0, 1)))
    assert 0.15 * SIDE < largest <= 0.2 * SIDE


def test_strength_grows_with_magnitude() -> None:
    image = smooth_image()

    def change(magnitude: float) -> float:
        config = ViewsConfig(strong=StrongConfig(blur=0, cutout=0, magnitude=magnitude), red=RedConfig(p=0))
        views = TwoViews(config, SIDE, strong=True)
        pairs = [views(image, seed) for seed in range(60)]
        return float(np.median([np.abs(w.astype(float) - s.astype(float)).mean() for w, s in pairs]))

    assert change(0.25) < change(1.0) < change(2.0)


def test_a_radiograph_stays_recognisable(shared_data) -> None:
    path = sorted((shared_data / "nih-256" / "images").glob("*.png"))[0]
    image = cv2.resize(cv2.imread(str(path), cv2.IMREAD_GRAYSCALE), (SIDE, SIDE), interpolation=cv2.INTER_AREA)
    views = TwoViews(ViewsConfig(), SIDE, strong=True)
    likeness = [np.corrcoef(*(view.ravel() for view in views(image, seed)))[0, 1] for seed in range(50)]
    assert np.median(likeness) > 0.8


def test_colour_or_float_images_are_refused() -> None:
    views = TwoViews(ViewsConfig(), 32, strong=True)
    with pytest.raises(ValueError, match=r"uint8 image \[H, W\], got uint8 \(32, 32, 3\)"):
        views(np.zeros((32, 32, 3), np.uint8), 0)
    with pytest.raises(ValueError, match="float32"):
        views(np.zeros((32, 32), np.float32), 0)


def test_import_does_not_ask_the_network() -> None:
    code = "import mpc.views, os; print(os.environ['NO_ALBUMENTATIONS_UPDATE'])"
    environment = {k: v for k, v in os.environ.items() if k != "NO_ALBUMENTATIONS_UPDATE"}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "1"
    assert result.stderr == ""
