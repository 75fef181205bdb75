"""single_positive: known draws computed independently, uniform over seeds, blind to order."""

import hashlib

import numpy as np
import pytest

from pipeline.single_positive import draw

LABELS = np.array([[1, 0, 1, 1, 0], [0, 1, 0, 0, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]], np.int8)
KNOWN = np.ones((4, 5), bool)
IDS = ["00000061_012", "00000001_000", "x", "фото"]


@pytest.mark.parametrize("seed", [0, 1, 7, 123456789])
def test_against_hashlib(seed):
    observed = draw(IDS, LABELS, KNOWN, seed)
    for row, image_id in enumerate(IDS):
        positives = [finding for finding in range(5) if LABELS[row, finding]]
        expected = np.zeros(5, int)
        if positives:
            number = int(hashlib.blake2b(f"{seed}:{image_id}".encode(), digest_size=8).hexdigest(), 16)
            expected[positives[number % len(positives)]] = 1
        np.testing.assert_array_equal(observed[row], expected)


def test_known_values():
    """Fixed once by `python -c "import hashlib; ..."`: a change of these breaks every published draw."""
    assert int(hashlib.blake2b(b"0:00000061_012", digest_size=8).hexdigest(), 16) == 3069725453260724215
    assert draw(IDS[:1], LABELS[:1], KNOWN[:1], 0)[0].tolist() == [0, 0, 1, 0, 0]
    five = np.ones((6, 5), np.int8)
    drawn = draw([f"image-{row}" for row in range(6)], five, five.astype(bool), 3).argmax(axis=1)
    assert drawn.tolist() == [2, 2, 4, 1, 1, 3]


def test_each_row_has_one_of_its_known_positives():
    rng = np.random.default_rng(0)
    labels = (rng.random((500, 14)) < 0.3).astype(np.int8)
    known = rng.random((500, 14)) < 0.7
    observed = draw([str(row) for row in range(500)], labels, known, 0)
    eligible = labels.astype(bool) & known
    np.testing.assert_array_equal(observed.sum(axis=1), eligible.any(axis=1))
    assert not observed[~eligible].any()


def test_independent_of_order_and_company():
    observed = draw(IDS, LABELS, KNOWN, 5)
    order = [3, 1, 0, 2]
    np.testing.assert_array_equal(draw([IDS[i] for i in order], LABELS[order], KNOWN[order], 5), observed[order])
    np.testing.assert_array_equal(draw(IDS[3:], LABELS[3:], KNOWN[3:], 5), observed[3:])


def test_uniform_over_seeds_and_over_images():
    seeds = 4000
    rows = np.array([draw(IDS[:1], LABELS[:1], KNOWN[:1], seed)[0] for seed in range(seeds)])
    np.testing.assert_allclose(rows.mean(axis=0), [1 / 3, 0, 1 / 3, 1 / 3, 0], atol=4 * (2 / 9 / seeds) ** 0.5)
    same = np.ones((seeds, 4), np.int8)
    images = draw([f"{row:08d}" for row in range(seeds)], same, same.astype(bool), 0)
    np.testing.assert_allclose(images.mean(axis=0), 0.25, atol=4 * (3 / 16 / seeds) ** 0.5)


def test_wrong_lengths_are_refused():
    with pytest.raises(ValueError, match="3 image ids for 4 rows"):
        draw(IDS[:3], LABELS, KNOWN, 0)
