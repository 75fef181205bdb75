"""decode: known pixel values for every kind of file, geometry by hand, and a reason for every refusal."""

import io
import struct
import zlib
from pathlib import Path

import cv2
import numpy as np
import pydicom
import pytest
from pictures import dicom, encoded
from PIL import Image
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence
from pydicom.uid import UID

from pipeline.decode import MAX_PIXELS, DecodeError, decode
from pipeline.pixels import load

RAMP = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4


def refused(data: bytes, name: str = "x.png", size: int = 8) -> DecodeError:
    with pytest.raises(DecodeError) as caught:
        decode(data, name, size, "pad")
    assert "\n" not in str(caught.value)
    return caught.value


@pytest.mark.parametrize(
    "data",
    [
        encoded(RAMP),
        encoded(np.stack([RAMP] * 3, axis=-1)),
        encoded(np.dstack([RAMP, RAMP, RAMP, np.full_like(RAMP, 255)])),
        encoded(Image.fromarray(RAMP).convert("P")),
        encoded(Image.fromarray(RAMP).convert("LA")),
        encoded(RAMP.astype(np.uint16) * 257),
        dicom(RAMP),
        dicom(255 - RAMP, "MONOCHROME1"),
        dicom(np.stack([RAMP] * 3, axis=-1), "RGB"),
        dicom(RAMP.astype(np.uint16) + 1000, WindowCenter=1128, WindowWidth=256),
        dicom(RAMP.astype(np.int16) - 1024, WindowCenter=128, WindowWidth=256, RescaleSlope=1, RescaleIntercept=1024),
    ],
    ids=["L", "RGB", "RGBA", "P", "LA", "I;16", "mono2", "mono1", "rgb-dicom", "window", "rescale"],
)
def test_the_same_picture_from_every_kind_of_file(data):
    pixels = decode(data, "any name", 8, "pad")
    assert pixels.dtype == np.uint8
    np.testing.assert_array_equal(pixels, RAMP)


def test_one_bit_png():
    board = np.indices((8, 8)).sum(axis=0) % 2 == 0
    np.testing.assert_array_equal(decode(encoded(board), "x", 8, "pad"), np.where(board, 255, 0))


def test_jpeg_is_close():
    smooth = np.tile(np.linspace(0, 255, 64, dtype=np.uint8), (64, 1))
    for kind in (smooth, np.stack([smooth] * 3, axis=-1)):
        assert np.abs(decode(encoded(kind, "JPEG", quality=95), "x.jpg", 64, "pad").astype(int) - smooth).max() <= 4


def test_twelve_bits_in_sixteen_are_scaled_by_their_own_depth():
    deep = (np.arange(64, dtype=np.uint16) * 65).reshape(8, 8)  # up to 4095: 12 bits
    expected = np.rint(deep * (255 / 4095)).astype(np.uint8)
    np.testing.assert_array_equal(decode(encoded(deep), "x", 8, "pad"), expected)


def test_transparent_pixels_are_black():
    alpha = np.zeros((8, 8), np.uint8)
    alpha[:4] = 255
    pixels = decode(encoded(np.dstack([np.full((8, 8, 3), 200, np.uint8), alpha])), "x", 8, "pad")
    assert (pixels[:4] == 200).all()
    assert (pixels[4:] == 0).all()


@pytest.mark.parametrize(("orientation", "turn"), [(1, 0), (3, 2), (6, 3), (8, 1)])
def test_exif_rotation(orientation, turn):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(Image.fromarray(RAMP), "PNG", exif=exif)
    np.testing.assert_array_equal(decode(data, "x", 8, "pad"), np.rot90(RAMP, turn))


def test_crop_and_pad_by_hand():
    wide = np.repeat(np.array([[10, 20, 30, 40]], np.uint8), 2, axis=0)  # 2 x 4
    np.testing.assert_array_equal(decode(encoded(wide), "x", 2, "crop"), [[20, 30], [20, 30]])
    np.testing.assert_array_equal(
        decode(encoded(wide), "x", 4, "pad"), [[0] * 4, [10, 20, 30, 40], [10, 20, 30, 40], [0] * 4]
    )
    np.testing.assert_array_equal(decode(encoded(wide), "x", 2, "pad"), [[15, 35], [0, 0]])  # 1 x 2, odd row below
    tall = wide.T.copy()
    np.testing.assert_array_equal(decode(encoded(tall), "x", 2, "crop"), [[20, 20], [30, 30]])


def test_shrinking_averages_areas():
    square = np.array([[0, 100, 8, 8], [100, 200, 8, 8], [4, 4, 0, 0], [4, 4, 0, 4]], np.uint8)
    np.testing.assert_array_equal(decode(encoded(square), "x", 2, "pad"), [[100, 8], [4, 1]])


def test_window_functions_by_hand():
    values = np.array([[0, 100], [150, 400]], np.uint16)
    window = {"WindowCenter": [150, 9], "WindowWidth": [100, 9]}
    linear = decode(dicom(values, bits=12, **window), "x", 2, "pad")
    # PS3.3 C.11.2.1.2.1: ((x - 149.5) / 99 + 0.5) * 255
    np.testing.assert_array_equal(linear, [[0, 0], [round((0.5 / 99 + 0.5) * 255), 255]])
    exact = decode(dicom(values, bits=12, VOILUTFunction="LINEAR_EXACT", **window), "x", 2, "pad")
    np.testing.assert_array_equal(exact, [[0, 0], [128, 255]])
    sigmoid = decode(dicom(values, bits=12, VOILUTFunction="SIGMOID", **window), "x", 2, "pad")
    expected = np.rint(255 / (1 + np.exp(-4 * (values.astype(float) - 150) / 100)))
    np.testing.assert_allclose(sigmoid, expected, atol=1)


def test_voi_table_comes_before_the_window():
    table = Dataset()
    table.LUTDescriptor, table.LUTData = [4, 0, 8], np.array([255, 170, 85, 0], "<u2").tobytes()
    values = np.array([[0, 1], [2, 3]], np.uint16)
    data = dicom(values, bits=12, VOILUTSequence=Sequence([table]), WindowCenter=1, WindowWidth=2)
    np.testing.assert_array_equal(decode(data, "x", 2, "pad"), [[255, 170], [85, 0]])


def test_without_window_deep_values_are_stretched_and_padding_is_black():
    values = np.array([[5000, 1000], [2000, 3000]], np.uint16)
    plain = decode(dicom(values, bits=16), "x", 2, "pad")
    np.testing.assert_array_equal(plain, [[255, 0], [64, 128]])
    padded = decode(dicom(values, bits=16, PixelPaddingValue=5000), "x", 2, "pad")
    np.testing.assert_array_equal(padded, [[0, 0], [128, 255]])
    inverted = decode(dicom(values, "MONOCHROME1", bits=16, PixelPaddingValue=5000), "x", 2, "pad")
    np.testing.assert_array_equal(inverted, [[0, 255], [128, 0]])


def test_run_length_encoding():
    dataset = pydicom.dcmread(io.BytesIO(dicom(RAMP)))
    dataset.compress(pydicom.uid.RLELossless)
    buffer = io.BytesIO()
    dataset.save_as(buffer)
    np.testing.assert_array_equal(decode(buffer.getvalue(), "x", 8, "pad"), RAMP)


def bomb() -> bytes:
    """A small PNG that claims 60,000 x 60,000 pixels."""
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 0, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(bytes(1000))), (b"IEND", b"")]
    body = [struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(body)


def test_reasons():
    assert refused(b"").reason == "empty"
    assert refused(b"hello, world" * 20, "notes.txt").reason == "unsupported"
    assert refused(encoded(RAMP, "TIFF"), "x.tif").reason == "unsupported"
    assert refused(encoded(np.zeros((8, 8), np.uint8))).reason == "blank"
    assert refused(bomb()).reason == "too_large"
    noise = np.random.default_rng(0).integers(0, 255, (64, 64), dtype=np.uint8)
    for kind in ("PNG", "JPEG"):
        data = encoded(noise, kind)
        assert refused(data[: len(data) // 2]).reason == "unreadable"
    frames = [Image.fromarray(RAMP), Image.fromarray(RAMP.T.copy())]
    assert refused(encoded(frames[0], "PNG", save_all=True, append_images=frames[1:])).reason == "unsupported"


def test_reasons_of_dicom_name_no_patient():
    rng = np.random.default_rng(0)
    several = dicom(rng.integers(0, 255, (8, 8), dtype=np.uint8), NumberOfFrames=3)
    no_pixels = pydicom.dcmread(io.BytesIO(dicom(RAMP)))
    del no_pixels.PixelData

    def without_pixels(of_class: str) -> bytes:
        buffer = io.BytesIO()
        no_pixels.SOPClassUID = of_class
        no_pixels.save_as(buffer)
        return buffer.getvalue()

    cases = {
        several: ("unsupported", "3 frames"),
        without_pixels(pydicom.uid.ChestCADSRStorage): ("unsupported", "not an image with pixels (Chest CAD SR"),
        without_pixels(pydicom.uid.GrayscaleSoftcopyPresentationStateStorage): ("unsupported", "(Grayscale Softcopy"),
        without_pixels("Doe^Jane"): ("unsupported", "(unknown class)"),
        dicom(RAMP, "HSV"): ("unsupported", "photometric"),
        dicom(RAMP, WindowCenter=1, WindowWidth=0): ("unsupported", "width 0"),
        dicom(RAMP, Rows=20_000, Columns=20_000): ("too_large", str(MAX_PIXELS)),
        dicom(RAMP)[:-20]: ("unreadable", ""),
    }
    for data, (reason, words) in cases.items():
        fault = refused(data, "Doe_Jane.dcm")
        assert (fault.reason, words in fault.detail) == (reason, True), fault
        assert not any(secret in str(fault) for secret in ("Doe", "Jane", "4711"))


@pytest.mark.parametrize(
    ("syntax", "reason", "words"),
    [
        (pydicom.uid.JPEG2000Lossless, "unreadable", "JPEG 2000"),
        (pydicom.uid.JPEGLosslessSV1, "unreadable", "JPEG Lossless"),
        (pydicom.uid.HTJ2K, "unreadable", "High-Throughput"),
        (pydicom.uid.MPEG2MPML, "unsupported", "no decoder is installed for transfer syntax MPEG2"),
        (UID("1.2.840.10008.1.2.4.94"), "unsupported", "no decoder is installed for transfer syntax JPIP"),
        (UID("1.2.840.10008.1.2.7.1"), "unsupported", "no decoder is installed for transfer syntax SMPTE"),
        (UID("1.3.46.670589.33.1.4.1"), "unreadable", "unknown transfer syntax"),
    ],
)
def test_compressed_dicom_that_cannot_be_decoded_names_its_syntax(syntax, reason, words):
    dataset = pydicom.dcmread(io.BytesIO(dicom(RAMP)))
    dataset.compress(pydicom.uid.RLELossless)
    dataset.file_meta.TransferSyntaxUID = syntax
    buffer = io.BytesIO()
    dataset.save_as(buffer)
    fault = refused(buffer.getvalue(), "x.dcm")
    assert fault.reason == reason
    assert words in fault.detail


def test_mutated_files_raise_nothing_else_and_log_no_name(caplog):
    rng = np.random.default_rng(1)
    samples = [
        encoded(RAMP),
        encoded(RAMP, "JPEG"),
        dicom(RAMP),
        dicom(RAMP.astype(np.uint16), WindowCenter=1, WindowWidth=9),
    ]
    outcomes = set()
    for sample in samples:
        for _ in range(150):
            data = bytearray(sample)
            for position in rng.integers(8, len(data), 4):
                data[position] = rng.integers(256)
            try:
                assert decode(bytes(data), "x", 8, "pad").shape == (8, 8)
                outcomes.add("decoded")
            except DecodeError as fault:
                outcomes.add(fault.reason)
    assert {"decoded", "unreadable"} <= outcomes
    assert not any(secret in caplog.text for secret in ("Doe", "Jane", "4711"))


def test_real_radiographs(shared_data: Path):
    paths = sorted((shared_data / "nih-1024" / "images").glob("*.png"))
    modes = set()
    for path in paths:
        with Image.open(path) as image:
            modes.add(image.mode)
            reference = np.asarray(image.convert("L").resize((224, 224), Image.Resampling.BOX), dtype=float)
        pixels = load(str(path), 224, "crop")
        assert np.abs(pixels - reference).mean() < 1.5
    assert "RGBA" in modes


def test_real_dicom_equals_its_png(shared_data: Path):
    path = next((shared_data / "dicom").glob("*.dcm"))
    pixels = load(str(path), 1024, "pad")
    np.testing.assert_array_equal(pixels, pydicom.dcmread(path).pixel_array)
    assert 30 < pixels.mean() < 220


def test_missing_image_is_a_reason(tmp_path):
    with pytest.raises(DecodeError, match="missing"):
        load(str(tmp_path / "nothing.png"), 8, "pad")


def test_reduced_by_hand():
    square = np.array([[0, 100, 8, 8], [100, 200, 8, 8], [4, 4, 0, 0], [4, 4, 0, 4]], np.uint8)
    reduced = np.array([[100, 8], [4, 1]], np.uint8)
    np.testing.assert_array_equal(decode(encoded(square), "x", 2, "pad", 2), reduced)
    for side in (4, 5, None):
        np.testing.assert_array_equal(decode(encoded(square), "x", 4, "pad", side), square)
    grown = cv2.resize(reduced, (4, 4), interpolation=cv2.INTER_LINEAR)
    np.testing.assert_array_equal(decode(encoded(square), "x", 4, "pad", 2), grown)
    wide = np.repeat(np.array([[10, 20, 30, 40]], np.uint8), 2, axis=0)  # 2 x 4: its longer side becomes 2
    np.testing.assert_array_equal(decode(encoded(wide), "x", 2, "pad", 2), [[15, 35], [0, 0]])
    np.testing.assert_array_equal(decode(encoded(wide), "x", 2, "crop", 2), [[20, 30], [20, 30]])


def test_reduced_images_of_unequal_sharpness_carry_the_same_detail(shared_data: Path):
    sharp = sorted((shared_data / "nih-256" / "images").glob("*.png"))[:20]
    reduced = [
        cv2.resize(cv2.imread(str(path), cv2.IMREAD_GRAYSCALE), (64, 64), interpolation=cv2.INTER_AREA)
        for path in sharp
    ]
    blurred = [encoded(image) for image in reduced]

    def gap(reduce_to: int | None) -> float:
        pairs = [
            (decode(path.read_bytes(), "x", 96, "pad", reduce_to), decode(small, "x", 96, "pad", reduce_to))
            for path, small in zip(sharp, blurred, strict=True)
        ]
        return float(np.mean([np.abs(a.astype(int) - b).mean() for a, b in pairs]))

    assert gap(64) == 0
    assert gap(None) > 1
