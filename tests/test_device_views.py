"""Device views: known values, the field's law, independence, and the same distribution as the CPU views."""

import random
import re
import subprocess
import sys

import albumentations as A
import cv2
import numpy as np
import pytest
import torch
from scipy.stats import wasserstein_distance
from torch._subclasses.fake_tensor import FakeTensorMode

from mpc import red, views
from mpc.config import RedConfig, StrongConfig, ViewsConfig, WeakConfig
from mpc.device_views import OPERATIONS, DeviceViews, Draws, displacement, lattice_weights, positions, warp
from mpc.strengths import FILL

SIDE, COUNT = 96, 500
RMS, SIGMA = 0.013, 0.045


def only(crop=1.0, hflip=0.0, red=RedConfig(p=0.0), **strong):  # noqa: B008 - frozen
    """Everything is switched off but what is named."""
    chosen = StrongConfig(**{"ops": 0, "blur": 0.0, "cutout": 0.0} | strong)
    return ViewsConfig(hflip=hflip, weak=WeakConfig(crop=crop), strong=chosen, red=red)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def picture(side=SIDE):
    """Smooth shades, sharp edges, fine noise, a black and a white patch: all that an operation could treat apart."""
    noise = np.random.default_rng(0).random((2, side, side), dtype=np.float32)
    shades = cv2.normalize(cv2.GaussianBlur(noise[0], (0, 0), side / 16), None, 30, 200, cv2.NORM_MINMAX)
    image = (shades + 20 * noise[1]).astype(np.uint8)
    cv2.circle(image, (side // 3, side // 2), side // 6, 220, 2)
    image[: side // 12, : side // 5], image[-side // 10 :, -side // 4 :] = 255, 0
    return image


def batch(image, count):
    return torch.from_numpy(image)[None, None].expand(count, 1, *image.shape)


def on_device(config, image, count=COUNT, strong=1, seed=0, side=SIDE):
    """Weak and strong views of copies of one image, NumPy [count, side, side] each."""
    weak, views = DeviceViews(config, side, strong)(batch(image, count), generator(seed))
    return weak[:, 0].numpy(), None if views is None else views[:, 0].numpy()


def on_cpu(config, image, count=COUNT, side=SIDE):
    draw = views.TwoViews(config, side, strong=True)
    pairs = [draw(image, seed) for seed in range(count)]
    return np.array([weak for weak, _ in pairs]), np.array([strong for _, strong in pairs])


FEATURES = ("mean", "std", "log gradient energy", "correlation", "share of FILL", "share kept")
SLACK = (0.2, 0.2, 0.03, 0.001, 0.001, 0.02)  # how far rounding and the single resampling may move each


def features(reference, view):
    """One row a feature, one column a view."""
    reference, view = (np.asarray(images, np.float32) for images in (reference, view))
    energy = (np.diff(view, axis=1) ** 2).mean((1, 2)) + (np.diff(view, axis=2) ** 2).mean((1, 2))
    correlation = [np.corrcoef(one.ravel(), other.ravel())[0, 1] for one, other in zip(reference, view, strict=True)]
    filled, kept = (view == FILL).mean((1, 2)), (abs(view - reference) <= 1).mean((1, 2))
    return np.array([view.mean((1, 2)), view.std((1, 2)), np.log(energy), correlation, filled, kept])


def assert_same_law(ours, theirs):
    """Earth mover's distance of each feature, in its standard deviations; two samples of one law differ by 0.05."""
    for name, slack, one, other in zip(FEATURES, SLACK, ours, theirs, strict=True):
        distance, spread = wasserstein_distance(one, other), other.std()
        assert distance < 0.2 * spread + slack, f"{name}: {distance:.3g} apart, spread {spread:.3g}"


def force(monkeypatch, *names):
    """Makes every strong view draw exactly these operations."""
    chosen = lambda self, count: {o: torch.full((self.count, 1, 1), o in names) for o in OPERATIONS}  # noqa: E731
    monkeypatch.setattr(Draws, "operations", chosen)


def test_views_without_strength_are_the_identity(monkeypatch):
    assert on_device(only(), picture(), count=1, strong=0)[1] is None
    force(monkeypatch, *(name for name in OPERATIONS if name not in ("autocontrast", "equalize")))
    for config in (only(), only(ops=1, magnitude=0.0)):
        assert all((seen == picture()).all() for seen in on_device(config, picture(), count=3))


def test_a_constant_image_stays_constant(monkeypatch):
    config = only(crop=0.5, hflip=0.5, ops=1, magnitude=2.0, blur=1.0, red=RedConfig(p=1.0))
    force(monkeypatch, "autocontrast", "sharpen", "equalize", *OPERATIONS[5:])
    for level in (0, 77, 255):
        for seen in on_device(config, np.full((SIDE, SIDE), level, np.uint8), count=20):
            assert (seen == level).all()


@pytest.mark.parametrize("name", ["translate_x", "translate_y"])
def test_a_shift_moves_pixels_and_mirrors_the_border(monkeypatch, name):
    force(monkeypatch, name)
    image, seen = picture(), on_device(only(ops=1), picture(), count=100)[1]
    if name == "translate_y":
        image, seen = image.T, seen.transpose(0, 2, 1)
    widened = np.pad(image, ((0, 0), (9, 9)), mode="reflect")  # without repeating the edge
    known = [widened[:, start : start + SIDE].tobytes() for start in range(19)]  # whole shifts up to a tenth of 96
    assert len({known.index(view.tobytes()) for view in seen}) > 12


def test_flips_are_as_frequent_as_asked_all_over_the_batch():
    image = picture()
    for probability, slack in ((0.0, 0), (0.3, 0.08), (1.0, 0)):
        weak, _ = on_device(only(hflip=probability), image, strong=0)
        flipped = np.array([np.array_equal(view, image[:, ::-1]) for view in weak])
        assert (weak[~flipped] == image).all()
        for part in np.split(flipped, 2):
            assert part.mean() == pytest.approx(probability, abs=slack)


def test_lattice_is_that_of_red():
    for length, sigma in ((SIDE, SIGMA * SIDE), (224, 10.08), (224, 3.3), (512, 60.0), (33, 16.5)):
        ours = lattice_weights(length, sigma, torch.device("cpu")).numpy()
        np.testing.assert_allclose(ours, red.lattice_weights(length, sigma), atol=1e-5)


def test_field_has_its_rms_and_correlation_everywhere():
    rms, sigma = RMS * SIDE, SIGMA * SIDE
    drawn = displacement(SIDE, torch.full((COUNT, 1, 1), rms), sigma, Draws(generator(), torch.empty(COUNT))).numpy()
    assert drawn.shape == (COUNT, 2, SIDE, SIDE)
    unit, lag = drawn / rms, round(sigma)
    for region in (unit, unit[..., :9, :9], unit[..., 44:53, 44:53], unit[..., -9:]):  # no weaker at the border
        assert region.std() == pytest.approx(1, rel=0.1)
    expected = np.exp(-(lag**2) / (4 * sigma**2))
    for one, other in ((unit[..., lag:], unit[..., :-lag]), (unit[..., lag:, :], unit[..., :-lag, :])):
        assert (one * other).mean() == pytest.approx(expected, abs=0.02)
    for one, other in ((unit[:, 0], unit[:, 1]), (unit[1:], unit[:-1])):  # axes and images are independent
        assert (one * other).mean() == pytest.approx(0, abs=0.02)


def test_red_moves_pixels_by_its_rms_together_over_sigma():
    ramp = np.broadcast_to(np.arange(224, dtype=np.uint8), (224, 224)).copy()  # grey level = column
    config = only(red=RedConfig(rms=RMS, sigma=SIGMA, p=1.0))
    moved = (on_device(config, ramp, count=60, side=224)[1].astype(float) - ramp)[:, :, 20:-20] / (RMS * 224)
    assert moved.std() == pytest.approx(1, rel=0.05)
    lag = round(SIGMA * 224)
    assert (moved[:, lag:] * moved[:, :-lag]).mean() == pytest.approx(np.exp(-0.25), abs=0.05)


def test_photometric_strengths_span_their_ranges(monkeypatch):
    halves = np.repeat(np.array([80, 120], np.uint8), SIDE // 2)[None].repeat(SIDE, 0)
    seen = {}
    for name in ("brightness", "contrast", "sharpen"):
        force(monkeypatch, name)
        views = on_device(only(ops=1), halves)[1]
        seen[name] = views[:, 0, SIDE // 2].min(), views[:, 0, SIDE // 2].max()  # a pixel of 120 at the edge
    assert seen["brightness"] == (84, 155)  # 120 * 0.7 and just below 120 * 1.3: fractions are cut off
    assert seen["contrast"] == (114, 125)  # 100 + 20 * 0.7, just below 100 + 20 * 1.3
    assert seen["sharpen"] == (120, 144)  # three of nine neighbours are 40 darker, times 0 to 0.2


@pytest.mark.parametrize("sigma", [0.25, 0.5, 1.1, 1.95])
def test_blur_is_that_of_a_kernel_of_its_sigma(monkeypatch, sigma):
    share = (sigma - 0.1) / 1.9  # uniform from 0.1 to 2 px at 224 px
    monkeypatch.setattr(Draws, "unit", lambda self, *shape: torch.full((self.count, *shape), share))
    steps = np.arange(-int(3.5 * sigma), int(3.5 * sigma) + 1)
    kernel = np.exp(-0.5 * (steps / sigma) ** 2)
    expected = cv2.sepFilter2D(picture(224), -1, kernel / kernel.sum(), kernel / kernel.sum())
    seen = on_device(only(blur=1.0), picture(224), count=1, side=224)[1][0]
    assert np.abs(seen.astype(int) - expected).max() <= 1


def test_cutout_spans_its_range_anywhere():
    holes = on_device(only(cutout=0.2), np.full((SIDE, SIDE), 30, np.uint8))[1] == FILL
    rows, columns = (holes[holes.any((1, 2))].any(axis) for axis in (2, 1))  # a tenth has no pixel
    assert rows.sum(1).max() == columns.sum(1).max() == 19  # whole pixels below 0.2 * 96
    assert np.all(rows.any(0) & columns.any(0))
    assert abs(np.corrcoef(rows.argmax(1), columns.argmax(1))[0, 1]) < 0.15


def test_warp_reads_where_opencv_reads():
    image = picture()
    dy, dx = red.displacement(np.random.default_rng(0), SIDE, SIDE, 3.0, 10.0)
    y, x = positions(SIDE, torch.device("cpu"))
    offset = torch.from_numpy(np.stack([dy, dx]))[:, None] * 2 / (SIDE - 1)
    ours = warp(torch.from_numpy(image)[None].float(), y + offset[0], x + offset[1])[0].numpy()
    assert np.abs(ours - views.warp(image, dy, dx)).max() <= 5  # OpenCV rounds positions to a 32nd of a pixel


@pytest.mark.parametrize("name", OPERATIONS)
def test_each_operation_follows_the_law_of_albumentations(monkeypatch, name):
    image, pipeline = picture(), A.Compose([views._operations(1.0)[OPERATIONS.index(name)]])
    theirs = [views._run(pipeline, image, (np.random.default_rng(i), random.Random(i))) for i in range(COUNT)]
    force(monkeypatch, name)
    weak, ours = on_device(only(ops=1), image)
    assert_same_law(features(weak, ours), features(weak, theirs))
    if name in ("autocontrast", "equalize"):  # no randomness: the very same pixels
        assert np.abs(ours - np.array(theirs, float)).max() <= 1


KINDS = {
    "crop": only(crop=0.6, hflip=0.3),
    "operations": only(crop=0.9, ops=4, magnitude=1.5),
    "blur": only(blur=0.7),
    "red": only(red=RedConfig(rms=0.02, sigma=0.07, p=0.7)),
    "cutout": only(cutout=0.4),
    "default": ViewsConfig(),
    "all": only(crop=0.7, hflip=0.5, ops=3, magnitude=0.5, blur=0.8, cutout=0.2, red=RedConfig(p=1.0)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_views_follow_the_law_of_the_cpu_views(kind):
    image = picture(128)  # larger than the views, so that the crop resizes
    resized = np.broadcast_to(cv2.resize(image, (SIDE, SIDE)), (COUNT, SIDE, SIDE))
    ours, theirs = on_device(KINDS[kind], image), on_cpu(KINDS[kind], image)
    assert_same_law(features(resized, ours[0]), features(resized, theirs[0]))
    assert_same_law(features(*ours), features(*theirs))


def test_operations_are_distinct_and_equally_frequent():
    for count in (1, 2, 4):
        chosen = torch.stack(list(Draws(generator(), torch.empty(5000)).operations(count).values()), 1)[:, :, 0, 0]
        assert (chosen.sum(1) == count).all()
        assert (chosen.float().mean(0) - count / len(OPERATIONS)).abs().max() < 0.03


def test_views_are_functions_of_the_generator():
    one, same, other = (on_device(ViewsConfig(), picture(), 8, strong=2, seed=seed) for seed in (1, 1, 2))
    assert all(np.array_equal(a, b) for a, b in zip(one, same, strict=True))
    assert not any(np.array_equal(a, b) for a, b in zip(one, other, strict=True))
    assert np.array_equal(one[0], on_device(ViewsConfig(), picture(), 8, strong=0, seed=1)[0])  # weak ones come first


def test_equal_images_get_different_views_whatever_their_neighbours():
    images, draw = batch(picture(), 6).clone(), DeviceViews(ViewsConfig(), SIDE, 1)
    weak, strong = draw(images, generator())
    assert torch.equal(images, batch(picture(), 6))
    assert len({view.numpy().tobytes() for view in weak}) == len({view.numpy().tobytes() for view in strong}) == 6
    images[1:] = 255 - images[1:]
    assert torch.equal(draw(images, generator())[1][0], strong[0])  # nothing leaks from image to image


def test_strong_views_come_view_by_view_on_one_weak_draw():
    images = torch.cat([batch(picture(), 2), batch(255 - picture(), 2)])
    weak, strong = DeviceViews(only(crop=0.9), SIDE, 2)(images, generator())
    assert torch.equal(strong, torch.cat([weak, weak]))
    _, strong = DeviceViews(ViewsConfig(), SIDE, 2)(images, generator())
    assert not any(torch.equal(first, second) for first, second in zip(strong[:4], strong[4:], strict=True))


def test_one_image_is_a_batch_and_half_precision_around_changes_nothing():
    draw, one = DeviceViews(ViewsConfig(), SIDE, 1), batch(picture(), 1)
    weak, strong = draw(one, generator())
    assert all((seen.shape, seen.dtype) == ((1, 1, SIDE, SIDE), torch.uint8) for seen in (weak, strong))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(draw(one, generator())[1], strong)


@pytest.mark.parametrize("shape", [(2, 3, 8, 8), (2, 1, 8, 9), (8, 8)])
def test_other_images_are_refused(shape):
    for images in (torch.zeros(shape, dtype=torch.uint8), torch.zeros(2, 1, 8, 8)):
        told = f"views need square uint8 images [B, 1, H, H], got {images.dtype} {tuple(images.shape)}"
        with pytest.raises(ValueError, match=f"^{re.escape(told)}$"):
            DeviceViews(ViewsConfig(), 8, 1)(images, generator())


@pytest.mark.parametrize(("side", "strong", "told"), [(8, 3, "0, 1 or 2 views, got 3"), (1, 1, "at least 2 pixels")])
def test_impossible_settings_are_refused(side, strong, told):
    with pytest.raises(ValueError, match=told):
        DeviceViews(ViewsConfig(), side, strong)


def test_nothing_waits_for_the_gpu_or_leaves_it(monkeypatch):
    """Tensors without data, on a GPU that need not exist: reading a value or mixing devices raises an error."""
    monkeypatch.setattr(Draws, "unit", lambda self, *shape: torch.rand((self.count, *shape), device=self.device))
    with FakeTensorMode():
        images = torch.empty((4, 1, SIDE, SIDE), dtype=torch.uint8, device="cuda")
        weak, strong = DeviceViews(ViewsConfig(hflip=0.5), SIDE, 2)(images, generator())
    assert (weak.device.type, strong.device.type, strong.shape) == ("cuda", "cuda", (8, 1, SIDE, SIDE))


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")  # torch calls it a prototype
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_views_on_the_gpu_follow_the_law_of_the_cpu():
    images, source = batch(picture(), COUNT).cuda(), torch.Generator("cuda").manual_seed(0)
    torch.cuda.set_sync_debug_mode("error")
    try:
        weak, strong = DeviceViews(ViewsConfig(), SIDE, 1)(images, source)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_same_law(features(weak[:, 0].cpu(), strong[:, 0].cpu()), features(*on_cpu(ViewsConfig(), picture())))


def test_import_needs_no_albumentations():
    code = "import sys, mpc.device_views; print({'albumentations', 'cv2'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"
