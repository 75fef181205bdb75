"""Saliency: known evidence, every family of backbones, random weights, and places that are known."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mpc.errors import UserError
from mpc.model import Classifier, build
from mpc.saliency import Saliency, agreement, locate, stages
from pipeline.overlay import Caption, blend, evidence, picture, scale
from pipeline.sources import phantom

SIZE = 32


class Squares(nn.Module):
    """A small network whose stages are told as timm tells them."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(1, 8, 5, 2, 2), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(8, 16, 3, 2, 1), nn.ReLU())
        self.feature_info = [{"module": "first", "reduction": 2}, {"module": "second", "reduction": 4}]

    def forward(self, pixels: Tensor) -> Tensor:
        return self.second(self.first(pixels)).mean((2, 3))


def squares(images: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Noise with a bright square (finding 0), a dark one (finding 1), both or none; labels; where each may be."""
    rng = np.random.default_rng(seed)
    pixels = rng.normal(128, 12, (images, SIZE, SIZE))
    labels = rng.integers(0, 2, (images, 2))
    places = np.zeros((images, 2, SIZE, SIZE), bool)
    for n in range(images):
        for k in range(2):
            y, x = rng.integers(0, SIZE - 8, 2)
            places[n, k, y : y + 8, x : x + 8] = True
            if labels[n, k]:
                pixels[n][places[n, k]] = 230 if k == 0 else 30
    return np.clip(pixels, 0, 255).astype(np.uint8), labels, places


@pytest.fixture(scope="module")
def trained() -> Classifier:
    """A network that has learned both squares."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # threads that wait for each other on a busy machine take a hundred times as long
    torch.manual_seed(0)
    model = Classifier(Squares(), 16, 2)
    images, labels, _ = squares(256, 0)
    x, y = torch.from_numpy(images)[:, None], torch.from_numpy(labels).float()
    optimiser = torch.optim.AdamW(model.parameters(), 5e-3)
    for step in range(220):
        rows = torch.arange(64) + 64 * (step % 4)
        loss = F.binary_cross_entropy_with_logits(model(x[rows]), y[rows])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    torch.set_num_threads(threads)
    assert loss.item() < 0.2
    return model


def test_evidence_adds_up_to_the_logit(trained: Classifier) -> None:
    """Between the last map and the logit lie a mean and a linear head: the map is an exact account of it."""
    images, _, _ = squares(6, 1)
    maps = Saliency(trained, SIZE, layer="second").maps(images, [0, 1, 0, 1, 0, 1])
    with torch.no_grad():
        logits = trained(torch.from_numpy(images)[:, None]).numpy()
        bias = trained.head.bias.numpy()
    for n, found in enumerate(maps):
        assert found.sum() == pytest.approx(logits[n, n % 2] - bias[n % 2], abs=1e-4)


def test_both_methods_agree_before_the_pooling(trained: Classifier) -> None:
    images, _, _ = squares(3, 2)
    ours, gradcam = (
        Saliency(trained, SIZE, method=method, layer="second").maps(images, [0, 1, 1])
        for method in ("hirescam", "gradcam")
    )
    np.testing.assert_allclose(gradcam, ours, atol=1e-6)
    earlier = [
        Saliency(trained, SIZE, method=m, layer="first").maps(images, [0, 1, 1]) for m in ("hirescam", "gradcam")
    ]
    assert np.abs(earlier[0] - earlier[1]).max() > 1e-3


def test_maps_find_what_the_network_learned_and_random_weights_do_not(trained: Classifier) -> None:
    images, labels, places = squares(60, 3)
    torch.manual_seed(5)
    random = Classifier(Squares(), 16, 2)
    hits, alike = {"trained": [], "random": []}, []
    for k in range(2):
        rows = np.flatnonzero(labels[:, k])
        found = {
            name: Saliency(model, SIZE).maps(images[rows], [k] * len(rows))
            for name, model in (("trained", trained), ("random", random))
        }
        for name, maps in found.items():
            hits[name] += [locate(evidence(m, SIZE), places[n, k]).hit for m, n in zip(maps, rows, strict=True)]
        alike += [agreement(a, b) for a, b in zip(*found.values(), strict=True)]
    area = places.mean()
    assert area < 0.07
    assert np.mean(hits["trained"]) > 0.75
    assert np.mean(hits["random"]) < 0.5
    assert abs(np.mean(alike)) < 0.5, "the maps hang on the weights (Adebayo et al., 2018)"


def test_the_network_is_left_as_it_was(trained: Classifier) -> None:
    images, _, _ = squares(2, 4)
    before = {name: value.clone() for name, value in trained.state_dict().items()}
    saliency = Saliency(trained, SIZE)
    first = saliency.maps(images, [0, 1])
    assert all(torch.equal(value, before[name]) for name, value in trained.state_dict().items())
    np.testing.assert_array_equal(saliency.maps(images, [0, 1]), first)
    alone = np.concatenate([saliency.maps(images[n : n + 1], [n]) for n in range(2)])
    np.testing.assert_allclose(alone, first, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "size", "layer", "side"),
    [
        ("test_efficientnet_gn", 64, "blocks.2", 8),  # maps with channels in front
        ("test_convnext", 64, "stages.1", 8),
        ("test_mambaout", 64, "stages.1", 8),  # channels behind
        ("test_vit", 160, "blocks.4", 10),  # tokens: nothing but the class token leaves the last block
    ],
)
def test_any_family_of_backbones(name: str, size: int, layer: str, side: int) -> None:
    torch.manual_seed(0)
    saliency = Saliency(build(name, 3), size)
    images = np.random.default_rng(0).integers(0, 256, (2, size, size), np.uint8)
    maps = saliency.maps(images, [0, 2])
    assert (saliency.layer, maps.shape) == (layer, (2, side, side))
    assert np.isfinite(maps).all()
    assert all(np.ptp(found) > 0 for found in maps)


def test_the_layer_with_most_places_where_none_has_enough() -> None:
    saliency = Saliency(build("test_efficientnet_gn", 2), 32, cells=64)
    assert saliency.layer == "blocks.0"


def test_layers_that_cannot_be_read() -> None:
    model = build("test_efficientnet_gn", 2)
    with pytest.raises(UserError, match=r"explain\.layer=blocks\.9: .*its stages end at blocks\.0, "):
        Saliency(model, 64, layer="blocks.9")
    pooled = Saliency(model, 64, layer="global_pool")
    with pytest.raises(UserError, match=r"name a module whose output is a map"):
        pooled.maps(np.zeros((1, 64, 64), np.uint8), [0])
    with pytest.raises(UserError, match="does not say where its stages end"):
        stages(nn.Linear(2, 2))


def test_places_by_hand() -> None:
    found = np.array([[0.0, 3.0], [1.0, 0.0]], np.float32)
    assert locate(found, np.array([[False, True], [False, False]])) == (True, 0.75)
    assert locate(found, np.array([[True, False], [True, True]])) == (False, 0.25)
    assert locate(np.zeros((2, 2), np.float32), np.ones((2, 2), bool)) == (False, 0.0)
    assert agreement(found, 2 * found) == pytest.approx(1)
    assert agreement(found, -found) == pytest.approx(-1)
    assert agreement(found, np.ones((2, 2), np.float32)) is None


def test_evidence_is_what_speaks_for_a_finding() -> None:
    found = np.array([[-5.0, 0.0], [0.0, 2.0]], np.float32)
    large = evidence(found, 16)
    assert large.shape == (16, 16)
    assert (large.min(), large.max()) == (0, 1)
    assert np.unravel_index(large.argmax(), large.shape) >= (12, 12)
    assert not evidence(-np.abs(found), 16).any()


def test_overlays_leave_places_without_evidence_alone() -> None:
    image = np.random.default_rng(0).integers(0, 200, (64, 64), np.uint8)
    found = np.zeros((8, 8), np.float32)
    assert (blend(image, found) == image[..., None]).all()
    found[1, 6] = 1.0
    mixed = blend(image, found).astype(int)
    assert (mixed[32:, :32] == image[32:, :32, None]).all()
    assert np.ptp(mixed[10:14, 50:54], axis=-1).min() > 60, "colour where the evidence is"
    sign = np.zeros((64, 64), bool)
    sign[40:50, 10:20] = True
    outlined = blend(image, found, sign)
    assert (outlined[40, 10:20] == 255).all()
    assert (outlined[44, 14] == image[44, 14]).all()
    assert len(scale()) == 9


def test_a_picture_carries_its_legend() -> None:
    image = np.full((64, 64), 90, np.uint8)
    caption = Caption("Pleural_Thickening", 0.83, 0.4, "a/b.dcm", "mpc-cxr/3", "hirescam at blocks.2")
    one, other = (picture(image, np.eye(8, dtype=np.float32), caption._replace(probability=p)) for p in (0.83, 0.2))
    assert one[:8] == b"\x89PNG\r\n\x1a\n"
    assert one != other, "the probability is in the picture"
    assert one == picture(image, np.eye(8, dtype=np.float32), caption)


def test_signs_of_synthetic_images_by_id_and_address() -> None:
    _, signs = phantom.render_with_signs(3, 41, "dense", 64)
    for name in (phantom.image_id(3, 41, "dense"), phantom.uri(3, 41, "dense")):
        found = phantom.signs_of(name, 64)
        assert found.keys() == signs.keys()
        assert all((found[finding] == signs[finding]).all() for finding in signs)
    with pytest.raises(UserError, match="is no synthetic image"):
        phantom.signs_of("00000001_000", 64)
