"""The synthetic radiographs: determinism, label statistics, signs that show, a difficulty that tells methods apart."""

import hashlib
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest

from mpc.errors import UserError
from pipeline.manifest import matrix
from pipeline.policy import apply
from pipeline.prepare_config import PhantomConfig, PolicyConfig, PrepareConfig, SplitConfig
from pipeline.sources import open_source, phantom
from pipeline.sources.phantom.anatomy import SIDES, build, draw_pose
from pipeline.sources.phantom.labels import count_label_sets, frequencies, generator
from pipeline.sources.phantom.picture import proportions
from pipeline.split import assign

FINDINGS = phantom.FINDINGS
LOCAL = ("Mass", "Nodule", "Pneumonia", "Effusion", "Consolidation", "Pleural_Thickening", "Hernia")


def label_matrix(profile: phantom.Profile, images: int, seed: int = 0) -> np.ndarray:
    return np.stack([phantom.labels(seed, index, profile) for index in range(images)])


def test_parameters_are_the_committed_ones():
    """Whoever changes a parameter raises PHANTOM_VERSION and says so here: figures of old runs no longer compare."""
    assert phantom.PHANTOM_VERSION == 1
    assert phantom.digest() == "dfdde524eed10f82d31e6b9afcdc1408043885e6b003cedfac23a9161527666a"


def test_an_image_is_the_same_in_another_process_and_order():
    wanted = [(3, 40, "dense", 64), (3, 41, "nih", 128), (0, 10**9, "dense", 64)]
    ours = [hashlib.sha256(phantom.render(*image).tobytes()).hexdigest() for image in reversed(wanted)]
    code = (
        "import hashlib; from pipeline.sources import phantom\n"
        f"for image in {wanted!r}: print(hashlib.sha256(phantom.render(*image).tobytes()).hexdigest())"
    )
    root = Path(__file__).resolve().parents[1]
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root).stdout
    assert other.split() == ours[::-1]


@pytest.mark.parametrize("size", [64, 128, 224, 1024])
def test_pixels_are_grey_bytes_that_use_the_range(size):
    image = phantom.render(0, 5, "dense", size)
    assert image.shape == (size, size)
    assert image.dtype == np.uint8
    assert image.min() < 40 < 180 < image.max()


def test_every_size_shows_the_same_chest():
    for index in range(0, 60, 12):
        small, large = phantom.render(1, index, "dense", 64), phantom.render(1, index, "dense", 512)
        reduced = cv2.resize(large, (64, 64), interpolation=cv2.INTER_AREA)
        assert np.corrcoef(small.ravel(), reduced.ravel())[0, 1] > 0.985


def test_images_differ_by_index_and_seed():
    images = [phantom.render(seed, index, "dense", 64).tobytes() for seed in (0, 1) for index in range(20)]
    assert len(set(images)) == 40


def test_patients_have_several_images_and_one_anatomy():
    people = [phantom.patient(0, index) for index in range(2400)]
    numbers = [person.number for person in people]
    assert numbers == sorted(numbers)  # a patient's images are neighbours: cutting the collection splits one at most
    counts = np.unique(numbers, return_counts=True)[1]
    assert 2.5 < counts.mean() < 4.5
    assert counts.max() <= 6
    cases = [phantom.case_of(0, index, "dense") for index in range(200)]
    widths = {(case.patient, proportions(case, draw_pose(generator(0, "pose", case.index))).width) for case in cases}
    assert len(widths) == len({case.patient for case in cases})
    assert len({width for _, width in widths}) == len(widths)


def test_views_occur_as_in_the_nih_table():
    views = [phantom.view(0, index) for index in range(4000)]
    assert set(views) == {"PA", "AP"}
    assert abs(views.count("AP") / 4000 - 44_810 / 112_120) < 0.03


def test_dense_profile_keeps_its_promises():
    labels = label_matrix("dense", 8000)
    number = labels.sum(1)
    assert abs(number[number > 0].mean() - 2.5) < 0.06
    assert abs((number == 0).mean() - 0.18) < 0.02
    assert labels.mean(0).min() > 0.10
    assert labels.mean(0).max() < 0.22
    effusion, cardiomegaly = (labels[:, FINDINGS.index(name)] for name in ("Effusion", "Cardiomegaly"))
    assert (effusion & cardiomegaly).mean() > 1.4 * effusion.mean() * cardiomegaly.mean()


@pytest.mark.parametrize("seed", range(5))
def test_the_test_split_of_the_demo_holds_twenty_positives_a_finding(seed):
    source = open_source(PrepareConfig(phantom=PhantomConfig(images=3000, seed=seed)), None)
    table = assign(apply(source, PolicyConfig())[0], SplitConfig())
    tested = table.filter(np.array(table["split"].to_pylist()) == "test")
    assert matrix(tested["labels"]).sum(0).min() >= 20


def test_nih_profile_has_the_real_joint_frequencies():
    sets, counts = frequencies()
    assert sum(counts) == 112_120
    labels = label_matrix("nih", 20_000)
    real = np.zeros((len(FINDINGS), len(FINDINGS)))
    for members, count in zip(sets, counts, strict=True):
        real[np.ix_(members, members)] += count / 112_120
    drawn = labels.T.astype(float) @ labels / len(labels)
    assert np.abs(drawn - real).max() < 0.01
    assert abs((labels.sum(1) == 0).mean() - 60_361 / 112_120) < 0.015


def test_frequency_file_is_what_the_nih_table_says(shared_data):
    counted = count_label_sets(shared_data / "Data_Entry_2017_v2020.csv.gz")
    assert "NIH Clinical Center" in counted["source"]
    assert "CVPR 2017" in counted["citation"]
    sets, counts = frequencies()
    assert list(counted["counts"].values()) == list(counts)
    assert list(counted["counts"]) == ["|".join(FINDINGS[k] for k in members) for members in sets]


def test_label_sets_are_counted_from_a_table(tmp_path):
    table = tmp_path / "table.csv"
    table.write_text("Image Index,Finding Labels\na,No Finding\nb,Hernia|Mass\nc,Mass|Hernia\n")
    assert count_label_sets(table)["counts"] == {"Mass|Hernia": 2, "": 1}


@pytest.mark.parametrize("finding", FINDINGS)
def test_a_sign_shows_and_grows_with_severity(finding):
    """Every patient's picture changes; averaged over patients, a plain case changes it more than a subtle one."""
    change = {0.05: [], 0.95: []}
    for index in range(0, 240, 24):
        case = replace(phantom.case_of(2, index, "dense"), severities={})
        healthy = phantom.draw(case, 128)[0].astype(float)
        for severity, found in change.items():
            image, masks = phantom.draw(replace(case, severities={finding: severity}), 128)
            assert masks[finding].any()
            found.append(np.abs(image - healthy).sum() / 128**2)
    assert min(change[0.05]) > 0.05
    assert np.mean(change[0.95]) > 1.2 * np.mean(change[0.05])


@pytest.mark.parametrize("finding", LOCAL)
def test_a_local_sign_lies_in_its_mask(finding):
    for index in range(0, 120, 24):
        case = replace(phantom.case_of(2, index, "dense"), severities={})
        image, masks = phantom.draw(replace(case, severities={finding: 0.8}), 128)
        change = np.abs(image.astype(float) - phantom.draw(case, 128)[0])
        near = cv2.dilate(masks[finding].astype(np.uint8), np.ones((9, 9), np.uint8)) > 0
        assert change[near].mean() > 5 * change[~near].mean()
        assert masks[finding].mean() < 0.25


def test_masks_are_those_of_the_image_and_change_nothing():
    for index in range(20):
        image, masks = phantom.render_with_signs(0, index, "dense", 64)
        present = phantom.labels(0, index, "dense")
        assert list(masks) == [name for name, one in zip(FINDINGS, present, strict=True) if one]
        assert np.array_equal(image, phantom.render(0, index, "dense", 64))


@pytest.mark.parametrize("severities", [{}, {"Cardiomegaly": 0.0}, {"Cardiomegaly": 1.0}])
def test_cardiothoracic_ratio_is_above_one_half_only_with_cardiomegaly(severities):
    for index in range(0, 480, 24):
        case = replace(phantom.case_of(0, index, "dense"), severities=severities)
        scene = build(proportions(case, draw_pose(generator(0, "pose", index))), 512, generator(0, "vessels", index))
        heart = np.ptp(np.flatnonzero((scene.heart > 0.5).any(0))) + 1
        thorax = np.ptp(np.flatnonzero((sum(scene.lungs[side] for side in SIDES) > 0.5).any(0))) + 1
        assert (heart / thorax > 0.5) == bool(severities)


def test_source_table_is_synthetic_stable_and_grows_at_its_end():
    short = open_source(PrepareConfig(phantom=PhantomConfig(images=40, seed=3)), None)
    longer = open_source(PrepareConfig(phantom=PhantomConfig(images=90, seed=3)), None)
    assert short.synthetic
    assert short.findings == FINDINGS
    assert short.digests["phantom_parameters"] == phantom.digest()
    assert longer.table.slice(0, 40).equals(short.table)
    row = short.table.slice(12, 1).to_pylist()[0]
    assert row["image_id"] == "phantom-dense-3-00000012"
    assert row["uri"] == "phantom://dense/3/12"
    assert row["split"] is None
    assert row["sex"] in ("M", "F")
    assert row["labels"] == phantom.labels(3, 12, "dense").tolist()
    assert np.array_equal(phantom.render_uri(row["uri"], 64), phantom.render(3, 12, "dense", 64))


@pytest.mark.parametrize("address", ["phantom://dense/0", "phantom://other/0/1", "phantom://dense/0/-1", "file.png"])
def test_another_address_is_a_user_error(address):
    with pytest.raises(UserError, match="phantom://dense/<seed>/<index>"):
        phantom.parse_uri(address)


@pytest.mark.long
def test_a_small_supervised_network_lands_between_85_and_95():
    import timm
    import torch
    from sklearn.metrics import roc_auc_score

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    images = torch.from_numpy(np.stack([phantom.render(0, index, "dense", 64) for index in range(3300)]))
    pixels = (images.float()[:, None] / 255 - 0.449) / 0.226
    labels = label_matrix("dense", 3300)
    targets = torch.from_numpy(labels).float()
    torch.manual_seed(0)
    model = timm.create_model("test_efficientnet_gn", in_chans=1, num_classes=len(FINDINGS))
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3, weight_decay=1e-2)
    steps = torch.cat([torch.randperm(2400) for _ in range(10)]).split(32)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=len(steps), pct_start=0.15)
    for rows in steps:
        shift = torch.randint(-3, 4, (2,)).tolist()
        logits = model(torch.roll(pixels[rows], shift, (2, 3)))
        optimizer.zero_grad()
        torch.nn.functional.binary_cross_entropy_with_logits(logits, targets[rows]).backward()
        optimizer.step()
        schedule.step()
    model.eval()
    with torch.no_grad():
        scores = model(pixels[2400:]).numpy()
    torch.set_num_threads(threads)
    aurocs = [roc_auc_score(labels[2400:, k], scores[:, k]) for k in range(len(FINDINGS))]
    assert 0.85 < np.mean(aurocs) < 0.95
