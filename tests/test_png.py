"""decode: PNG and JPEG of every colour type, depth and turn, built byte by byte so that no library chooses for us."""

import struct
import zlib

import imagecodecs
import numpy as np
import pytest
from pictures import encoded
from PIL import Image

from pipeline.decode import DecodeError, decode

GREY, RGB, PALETTE, GREY_ALPHA, RGBA = 0, 2, 3, 4, 6
ENTRIES, INDICES = (b"PLTE", bytes([10] * 3 + [200] * 3 + [90] * 3 + [255] * 3)), b"\0\0\1\0\2\3"
DEEP = (np.arange(64, dtype=np.uint16) * 1040).reshape(8, 8)
SHOWN = np.rint(DEEP * (255 / 65535)).astype(np.uint8)


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def lines(values) -> bytes:
    """Rows with filter 0; the numpy type says the depth."""
    return b"".join(b"\0" + np.ascontiguousarray(row).tobytes() for row in values)


def png(body: bytes, colour: int, bits: int, side: int = 2, extra: tuple = (), interlaced: int = 0) -> bytes:
    header = struct.pack(">IIBBBBB", side, side, bits, colour, 0, 0, interlaced)
    parts = [(b"IHDR", header), *extra, (b"IDAT", zlib.compress(body)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def alike(values, *alpha) -> np.ndarray:
    """Grey values as equal red, green and blue, then alpha; 16 bits."""
    return np.dstack([values] * 3 + list(alpha)).astype(">u2")


FULL, TWELVE = np.array([[0, 65535], [32768, 257]], ">u2"), np.array([[0, 4095], [2048, 100]], ">u2")
OPAQUE, HALF = np.full((2, 2), 65535), np.array([[65535, 0], [65535, 65535]])


CASES = {
    "grey-16": (png(lines(FULL), GREY, 16), [[0, 255], [128, 1]]),
    "grey-12-in-16": (png(lines(TWELVE), GREY, 16), [[0, 255], [128, 6]]),
    "grey-16-key": (png(lines(FULL), GREY, 16, extra=((b"tRNS", b"\xff\xff"),)), [[0, 0], [128, 1]]),
    "alpha-16": (png(lines(np.dstack([FULL, HALF]).astype(">u2")), GREY_ALPHA, 16), [[0, 0], [128, 1]]),
    "alpha-12-in-16": (png(lines(np.dstack([TWELVE, OPAQUE]).astype(">u2")), GREY_ALPHA, 16), [[0, 255], [128, 6]]),
    "rgb-16": (png(lines(alike(FULL)), RGB, 16), [[0, 255], [128, 1]]),
    "rgb-12-in-16": (png(lines(alike(TWELVE)), RGB, 16), [[0, 255], [128, 6]]),
    "rgb-16-key": (png(lines(alike(FULL)), RGB, 16, extra=((b"tRNS", b"\xff\xff" * 3),)), [[0, 0], [128, 1]]),
    "rgba-12-in-16": (png(lines(alike(TWELVE, OPAQUE)), RGBA, 16), [[0, 255], [128, 6]]),
    "grey-8": (png(b"\0\x0a\xc8\0\x5a\xff", GREY, 8), [[10, 200], [90, 255]]),
    "grey-8-key": (png(b"\0\x0a\xc8\0\x5a\xff", GREY, 8, extra=((b"tRNS", b"\0\xc8"),)), [[10, 0], [90, 255]]),
    "grey-4": (png(b"\0\x0f\0\x81", GREY, 4), [[0, 255], [136, 17]]),
    "grey-2": (png(b"\0\x10\0\xb0", GREY, 2), [[0, 85], [170, 255]]),
    "grey-1": (png(b"\0\x40\0\x80", GREY, 1), [[0, 255], [255, 0]]),
    "alpha-8": (png(b"\0\x0a\xff\xc8\x80\0\x5a\0\xff\xff", GREY_ALPHA, 8), [[10, 100], [0, 255]]),
    "palette": (png(INDICES, PALETTE, 8, extra=(ENTRIES,)), [[10, 200], [90, 255]]),
    "palette-key": (png(INDICES, PALETTE, 8, extra=(ENTRIES, (b"tRNS", b"\xff\0\x80\xff"))), [[10, 0], [45, 255]]),
}


@pytest.mark.parametrize("case", CASES)
def test_every_colour_type_and_depth(case):
    data, expected = CASES[case]
    np.testing.assert_array_equal(decode(data, "x", 2, "pad"), expected)


def test_colours_of_16_bits_become_their_luma():
    colours = np.array([[[40000, 0, 0], [0, 40000, 0]], [[0, 0, 40000], [65535] * 3]], ">u2")
    expected = np.rint(colours @ np.array([0.299, 0.587, 0.114]) / 257)
    np.testing.assert_allclose(decode(png(lines(colours), RGB, 16), "x", 2, "pad"), expected, atol=1)


@pytest.mark.parametrize("values", [DEEP, (DEEP >> 8).astype(np.uint8)], ids=["16", "8"])
def test_interlaced(values):
    passes = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
    stored = values.astype(values.dtype.newbyteorder(">"))
    body = b"".join(lines(stored[top::down, left::right]) for left, top, right, down in passes)
    data = png(body, GREY, 8 * values.itemsize, 8, interlaced=1)
    np.testing.assert_array_equal(decode(data, "x", 8, "pad"), SHOWN if values is DEEP else values)


TURNS = {
    1: lambda a: a,
    2: np.fliplr,
    3: lambda a: np.rot90(a, 2),
    4: np.flipud,
    5: np.transpose,
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a, 2).T,
    8: np.rot90,
}


@pytest.mark.parametrize("orientation", TURNS)
def test_every_orientation(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    deep = encoded(DEEP, "PNG", exif=exif)
    np.testing.assert_array_equal(decode(deep, "x", 8, "pad"), TURNS[orientation](SHOWN))
    colours = png(lines(alike(DEEP)), RGB, 16, 8, extra=((b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0")),))
    np.testing.assert_array_equal(decode(colours, "x", 8, "pad"), TURNS[orientation](SHOWN))
    wide = np.kron(SHOWN[:4], np.ones((8, 8), np.uint8))  # 32 x 64, each value one block of the JPEG
    flat = TURNS[orientation](wide)
    pixels = decode(encoded(wide, "JPEG", quality=100, exif=exif), "x", 64, "pad").astype(int)
    inner = pixels[16:48] if flat.shape == (32, 64) else pixels[:, 16:48]
    assert np.abs(inner - flat).max() <= 1


def test_cmyk_jpeg():
    smooth = np.tile(np.linspace(0, 255, 64).astype(np.uint8), (64, 1))
    black = np.dstack([np.zeros((64, 64, 3), np.uint8), 255 - smooth])
    for ink in (Image.fromarray(smooth).convert("RGB").convert("CMYK"), Image.fromarray(black, "CMYK")):
        pixels = decode(encoded(ink, "JPEG", quality=95), "x", 64, "pad").astype(int)
        assert np.abs(pixels - smooth).max() <= 4


def test_what_pillow_does_not_know_is_said_without_an_address():
    data = imagecodecs.jpeg8_encode(DEEP >> 4, level=95, bitspersample=12)
    with pytest.raises(DecodeError, match="more than 8 bits") as caught:
        decode(data, "x", 8, "pad")
    assert caught.value.reason == "unreadable"
    assert "0x" not in str(caught.value)


def test_damaged_deep_colours_are_refused():
    rng, outcomes = np.random.default_rng(0), set()
    data = png(lines(rng.integers(0, 65536, (8, 8, 4)).astype(">u2")), RGBA, 16, 8)
    for _ in range(300):
        changed = bytearray(data)
        for position in rng.integers(8, len(data), 2):
            changed[position] = rng.integers(256)
        try:
            decode(bytes(changed), "x", 8, "pad")
            outcomes.add("decoded")
        except DecodeError as fault:
            outcomes.add(fault.reason)
    assert "unreadable" in outcomes
    for cut in range(60, len(data) - 12, 40):
        with pytest.raises(DecodeError, match="unreadable"):
            decode(data[:cut], "x", 8, "pad")
