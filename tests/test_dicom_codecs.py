"""Transfer syntaxes of DICOM: the same picture from every encoder, and no damaged file that ends the process."""

import io
import resource
import subprocess
import sys
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import gdcm
import imagecodecs
import numpy as np
import pydicom
import pydicom.uid as uids
import pytest
from pictures import dicom
from pydicom.encaps import encapsulate
from pydicom.pixels import get_decoder

from pipeline.decode import DecodeError, decode
from pipeline.dicom_codecs import LIBRARIES, stored_pixels

ROWS, COLUMNS = np.mgrid[0:40, 0:56]
SMOOTH = (np.sin(COLUMNS / 7) + np.cos(ROWS / 9) + 2) / 4
GRAIN = np.random.default_rng(0).integers(0, 24, ROWS.shape)
PICTURES = {
    bits: (SMOOTH * (2**bits - 64) + GRAIN).astype(np.uint8 if bits == 8 else np.uint16) for bits in (8, 12, 16)
}
WINDOW = {bits: {"WindowCenter": 2 ** (bits - 1), "WindowWidth": 2**bits} for bits in PICTURES}
BY_GDCM = {
    uids.JPEGBaseline8Bit: gdcm.TransferSyntax.JPEGBaselineProcess1,
    uids.JPEGLossless: gdcm.TransferSyntax.JPEGLosslessProcess14,
    uids.JPEGLosslessSV1: gdcm.TransferSyntax.JPEGLosslessProcess14_1,
    uids.JPEGLSLossless: gdcm.TransferSyntax.JPEGLSLossless,
    uids.JPEG2000Lossless: gdcm.TransferSyntax.JPEG2000Lossless,
    uids.JPEG2000: gdcm.TransferSyntax.JPEG2000,
    uids.RLELossless: gdcm.TransferSyntax.RLELossless,
}
BY_PYDICOM = {
    uids.JPEGLSLossless: {},
    uids.JPEGLSNearLossless: {"jls_error": 2},
    uids.JPEG2000Lossless: {},
    uids.JPEG2000: {"j2k_psnr": [60]},
    uids.RLELossless: {},
}
BY_IMAGECODECS = {
    uids.JPEGExtended12Bit: lambda pixels, bits: imagecodecs.jpeg8_encode(pixels, level=98, bitspersample=bits),
    uids.JPEGLossless: lambda pixels, bits: imagecodecs.jpeg8_encode(
        pixels, lossless=True, predictor=7, bitspersample=bits
    ),
    **dict.fromkeys(
        (uids.HTJ2KLossless, uids.HTJ2KLosslessRPCL, uids.HTJ2K),
        lambda pixels, _: imagecodecs.htj2k_encode(pixels, reversible=True),
    ),
}
LOSSY = {
    uids.JPEGBaseline8Bit: 1 / 50,
    uids.JPEGExtended12Bit: 1 / 50,
    uids.JPEGLSNearLossless: 0,
    uids.JPEG2000: 1 / 50,
}
"""Largest error as a share of white."""
SECRETS = ("Doe", "Jane", "4711")


def by_gdcm(data: bytes, syntax) -> bytes:
    with TemporaryDirectory() as folder:
        plain, packed = Path(folder, "plain"), Path(folder, "packed")
        plain.write_bytes(data)
        reader, writer, change = gdcm.ImageReader(), gdcm.ImageWriter(), gdcm.ImageChangeTransferSyntax()
        reader.SetFileName(str(plain))
        assert reader.Read()
        change.SetTransferSyntax(gdcm.TransferSyntax(BY_GDCM[syntax]))
        change.SetInput(reader.GetImage())
        assert change.Change()
        writer.SetFileName(str(packed))
        writer.SetFile(reader.GetFile())
        writer.SetImage(change.GetOutput())
        assert writer.Write()
        return packed.read_bytes()


def by_pydicom(data: bytes, syntax, **tags) -> bytes:
    dataset = pydicom.dcmread(io.BytesIO(data))
    dataset.compress(syntax, generate_instance_uid=False, **BY_PYDICOM[syntax])
    return saved(dataset)


def by_imagecodecs(data: bytes, syntax) -> bytes:
    dataset = pydicom.dcmread(io.BytesIO(data))
    return packed(dataset, syntax, BY_IMAGECODECS[syntax](dataset.pixel_array, int(dataset.BitsStored)))


def packed(dataset, syntax, frame: bytes) -> bytes:
    """A data set around a frame that is compressed already."""
    dataset.PixelData = encapsulate([frame])
    dataset["PixelData"].VR, dataset["PixelData"].is_undefined_length = "OB", True
    dataset.file_meta.TransferSyntaxUID = syntax
    return saved(dataset)


def saved(dataset) -> bytes:
    buffer = io.BytesIO()
    dataset.save_as(buffer)
    return buffer.getvalue()


CASES = [
    pytest.param(encoder, syntax, bits, id=f"{encoder.__name__}-{syntax.rpartition('1.2.')[2]}-{bits}")
    for encoder, table in ((by_gdcm, BY_GDCM), (by_pydicom, BY_PYDICOM), (by_imagecodecs, BY_IMAGECODECS))
    for syntax in table
    for bits in PICTURES
    if bits == 8 or syntax != uids.JPEGBaseline8Bit
    if bits != 16 or syntax != uids.JPEGExtended12Bit
]


@cache
def sample(encoder, syntax, bits: int) -> bytes:
    return encoder(dicom(PICTURES[bits], bits=bits, **WINDOW[bits]), syntax)


@pytest.mark.parametrize(("encoder", "syntax", "bits"), CASES)
def test_every_syntax_shows_the_same_picture(encoder, syntax, bits, capfd):
    plain, data = dicom(PICTURES[bits], bits=bits, **WINDOW[bits]), sample(encoder, syntax, bits)
    assert pydicom.dcmread(io.BytesIO(data)).file_meta.TransferSyntaxUID == syntax
    capfd.readouterr()
    shown = decode(data, "x", 56, "pad")
    assert "".join(capfd.readouterr()) == ""
    stored = stored_pixels(pydicom.dcmread(io.BytesIO(data)))
    error = np.abs(stored.astype(int) - PICTURES[bits]).max()
    assert error <= (2 if syntax == uids.JPEGLSNearLossless else LOSSY.get(syntax, 0) * 2**bits)
    if syntax not in LOSSY:
        np.testing.assert_array_equal(shown, decode(plain, "x", 56, "pad"))


def test_each_syntax_has_one_library_and_never_gdcm():
    for syntax, library in LIBRARIES.items():
        assert library in get_decoder(syntax).available_plugins
        assert library != "gdcm"
    assert "gdcm" in get_decoder(uids.JPEGLosslessSV1).available_plugins  # else this test shows nothing


@pytest.mark.parametrize("syntax", [uids.JPEGLosslessSV1, uids.JPEGLSLossless, uids.JPEG2000Lossless, uids.RLELossless])
def test_signed_values_with_padding(syntax):
    values = (PICTURES[12].astype(np.int16) - 2040).copy()
    values[:, :8] = -2048
    tags = {"PixelPaddingValue": -2048, "WindowCenter": 0, "WindowWidth": 4096}
    plain = dicom(values, bits=12, **tags)
    data = (by_gdcm if syntax in BY_GDCM else by_pydicom)(plain, syntax)
    np.testing.assert_array_equal(stored_pixels(pydicom.dcmread(io.BytesIO(data))), values)
    shown = decode(data, "x", 56, "pad")
    np.testing.assert_array_equal(shown, decode(plain, "x", 56, "pad"))
    assert (shown[8:48, :8] == 0).all()
    # PS3.3 C.11.2.1.2.1: ((x + 0.5) / 4095 + 0.5) * 255
    assert shown[8 + 20, 30] == round(((int(values[20, 30]) + 0.5) / 4095 + 0.5) * 255)


@pytest.mark.parametrize("syntax", [uids.JPEGLosslessSV1, uids.JPEGLSLossless, uids.JPEG2000Lossless, uids.RLELossless])
def test_colour_survives_every_syntax(syntax):
    colours = np.dstack([PICTURES[8], PICTURES[8][::-1], PICTURES[8][:, ::-1]])
    plain = dicom(colours, "RGB")
    data = by_gdcm(plain, syntax)
    np.testing.assert_array_equal(stored_pixels(pydicom.dcmread(io.BytesIO(data))), colours)
    np.testing.assert_array_equal(decode(data, "x", 56, "pad"), decode(plain, "x", 56, "pad"))


def test_ybr_jpeg_becomes_grey_by_its_luma():
    colours = np.dstack([PICTURES[8], PICTURES[8] // 2, np.full_like(PICTURES[8], 90)])
    frame = imagecodecs.jpeg8_encode(colours, level=98, subsampling="444")
    for syntax in (uids.JPEGBaseline8Bit, uids.JPEGExtended12Bit):
        data = packed(pydicom.dcmread(io.BytesIO(dicom(colours, "YBR_FULL"))), syntax, frame)
        expected = colours @ [0.299, 0.587, 0.114]
        assert np.abs(decode(data, "x", 56, "pad")[8:48] - expected).max() < 4


@pytest.mark.parametrize("syntax", [uids.JPEGLosslessSV1, uids.JPEGLSLossless, uids.JPEG2000Lossless, uids.HTJ2K])
def test_an_image_of_another_size_is_refused_before_it_is_decoded(syntax):
    encoder = by_imagecodecs if syntax in BY_IMAGECODECS else by_gdcm
    for side in ("Rows", "Columns"):
        dataset = pydicom.dcmread(io.BytesIO(sample(encoder, syntax, 12)))
        setattr(dataset, side, 41)
        with pytest.raises(DecodeError, match="unreadable"):
            decode(saved(dataset), "x", 56, "pad")


def damaged(data: bytes, rng: np.random.Generator) -> bytes:
    """Up to four changed bytes, anywhere or near the head of the compressed image, or a stretch of noise."""
    changed, start = bytearray(data), data.index(b"\xe0\x7f\x10\x00") + 28
    kind = rng.integers(4)
    if kind == 3:
        first, last = sorted(rng.integers(start, len(data), 2))
        changed[first:last] = rng.bytes(last - first)
    low, high = (132, len(data)) if kind == 0 else (start, len(data) if kind == 1 else min(start + 120, len(data)))
    for position in rng.integers(low, high, 4):
        changed[position] = rng.integers(256)
    return bytes(changed)


def outcomes(data: bytes, times: int) -> dict[str, int]:
    """How many damaged copies were decoded or refused, by reason; anything else raises or ends the process."""
    rng, counted = np.random.default_rng(len(data)), {}
    for _ in range(times):
        try:
            decode(damaged(data, rng), "x", 56, "pad")
            reason = "decoded"
        except DecodeError as fault:
            reason = "a name" if any(secret in str(fault) for secret in SECRETS) else fault.reason
        counted[reason] = counted.get(reason, 0) + 1
    return counted


@pytest.mark.parametrize(("encoder", "syntax", "bits"), [case for case in CASES if case.values[2] == 12])
def test_damaged_files_are_refused(encoder, syntax, bits, capfd, caplog):
    counted = outcomes(sample(encoder, syntax, bits), 60)
    assert sum(counted.values()) == 60
    assert "a name" not in counted
    assert counted.get("unreadable", 0) + counted.get("unsupported", 0) > 0
    assert not any(secret in caplog.text + "".join(capfd.readouterr()) for secret in SECRETS)


@pytest.mark.long
def test_thousands_of_damaged_files_end_no_process():
    process = subprocess.run([sys.executable, __file__, "1000"], capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stdout[-1000:] + process.stderr[-1000:]
    assert process.stdout.count("\n") == len(CASES)
    assert "a name" not in process.stdout


if __name__ == "__main__":  # python tests/test_dicom_codecs.py 1000: damaged files per encoder, syntax and depth
    resource.setrlimit(resource.RLIMIT_AS, (6 * 2**30, 6 * 2**30))
    for case in CASES:
        print(case.id, outcomes(sample(*case.values), int(sys.argv[1])), flush=True)
