"""Near-identical images: hashes and pairs by hand, and a copy in another split that prepare finds and check knows."""

import io
from pathlib import Path

import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from test_nih import collection

from pipeline import near
from pipeline.card import NEAR_FILE
from pipeline.check import check
from pipeline.decode import decode
from pipeline.pixels import load
from pipeline.prepare_config import PhantomConfig, PrepareConfig, SplitConfig
from pipeline.shards import prepare
from pipeline.sources import open_source


def differing(first: bytes, second: bytes) -> int:
    return (int.from_bytes(first, "big") ^ int.from_bytes(second, "big")).bit_count()


def phantom_images(count: int, size: int) -> list[np.ndarray]:
    table = open_source(PrepareConfig(phantom=PhantomConfig(images=count)), None).table
    return [load(uri, size, "pad") for uri in table["uri"].to_pylist()]


def test_the_hash_of_one_wave_is_one_bit():
    wave = np.cos(np.pi * 3 * (np.arange(64) + 0.5) / 64)  # the basis function of coefficient (0, 3), and of no other
    image = np.rint(128 + 100 * np.tile(wave, (64, 1))).astype(np.uint8)
    bits = np.unpackbits(np.frombuffer(near.fingerprint(image), np.uint8)).reshape(16, 16)
    assert bits[0, 0] == 1  # the mean
    assert bits[0, 3] == 1
    assert not bits[1:].any()  # rows do not vary


def test_an_inverted_image_has_the_opposite_hash():
    image = phantom_images(1, 64)[0]
    assert differing(near.fingerprint(image), near.fingerprint(255 - image)) >= 254  # all but the mean, and one tie


def saved_as_jpeg(image):
    return cv2.imdecode(cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, 75])[1], cv2.IMREAD_GRAYSCALE)


def halved(image):
    return cv2.resize(image, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA)


def brightened(image):
    return np.rint(255 * (image / 255) ** 0.8).astype(np.uint8)


@pytest.mark.parametrize("change", [saved_as_jpeg, halved, brightened])
def test_the_same_image_is_within_the_limit_and_others_are_not(change):
    images = phantom_images(24, 128)
    originals, changed = ([near.fingerprint(image) for image in made] for made in (images, map(change, images)))
    for number, fingerprint in enumerate(changed):
        distances = [differing(fingerprint, original) for original in originals]
        assert distances[number] <= near.LIMIT
        assert sorted(distances)[1] > near.LIMIT


def test_images_of_different_patients_are_far_apart(shared_data: Path):
    files = sorted((shared_data / "nih-256" / "images").glob("*.png"))[::4]
    prints = near.unpacked([near.packed([near.fingerprint(decode(f.read_bytes(), f.name, 64, "pad")) for f in files])])
    bits = np.bitwise_count(prints[:, None] ^ prints[None]).sum(axis=2, dtype=int)
    patients = np.array([file.stem.partition("_")[0] for file in files])
    assert bits[patients[:, None] != patients].min() >= 2 * near.LIMIT


def prints(*words: int) -> np.ndarray:
    return np.array([[word, 0, 0, 0] for word in words], np.uint64)


def test_pairs_by_hand():
    none, few, many = 0, 2**24 - 1, 2**25 - 1  # 0, 24 and 25 bits
    splits = np.array(["train", "unlabelled", "val", "test", "test", "train"])
    found = list(near.across_splits(prints(none, many, few, many, 2**63, none), splits))
    assert found == [(2, 1, 1), (3, 1, 0), (4, 0, 1)]  # the nearest alone; the first where two are as near
    assert list(near.across_splits(prints(none, many), np.array(["train", "val"]))) == []
    assert list(near.across_splits(prints(none, none), np.array(["val", "val"]))) == []
    far = np.full((1, 4), 2**64 - 1, np.uint64)
    assert list(near.across_splits(np.vstack([far, prints(0)]), np.array(["val", "train"]))) == []  # 256 bits, not 0


@pytest.mark.usefixtures("ray_session")
def test_a_copy_in_another_split_is_found(tmp_path):
    rows = [(f"{p:08d}_000.png", "Mass", str(p), "50", "F", "PA") for p in range(12)]
    root = collection(tmp_path / "nih", rows=rows)
    images = phantom_images(12, 96)
    for row, image in zip(rows, images, strict=True):
        Image.fromarray(image).save(root / "images" / row[0])
    copy = io.BytesIO()
    Image.fromarray(images[2]).save(copy, "JPEG", quality=80)
    Image.open(copy).resize((80, 80)).save(root / "images" / rows[7][0])
    lines = "".join(f"{p},{'test' if p in (7, 8) else 'val' if p == 9 else 'train'}\n" for p in range(12))
    (tmp_path / "splits.csv").write_text(f"patient_id,split\n{lines}")
    split = SplitConfig(by="file", file=str(tmp_path / "splits.csv"))
    out = tmp_path / "out"
    config = PrepareConfig(source="nih", findings=("Mass",), image_size=64, split=split)
    card = prepare(config, str(root), str(out))
    assert card.near_duplicates == 1
    (found,) = pq.read_table(out / NEAR_FILE).to_pylist()
    assert (found["image_id"], found["split"]) == ("00000007_000", "test")
    assert (found["near_image_id"], found["near_split"]) == ("00000002_000", "train")
    assert 0 <= found["bits"] <= near.LIMIT
    assert check(str(out)) == []
    (out / NEAR_FILE).unlink()
    assert check(str(out)) == [f"{NEAR_FILE}: the file is missing"]
