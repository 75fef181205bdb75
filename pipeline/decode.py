"""JPEG, PNG or DICOM bytes -> one grey uint8 square: the only decoder of files in the project.

Only pixels leave this module: no tag, name or date of a file does, and no reason for a refusal quotes one.
"""

import io
import struct
from typing import Any, Literal

import cv2
import numpy as np
from imagecodecs import PngError, png_decode
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from pipeline.dicom import LUMA, DicomError, read_dicom
from pipeline.geometry import MAX_PIXELS, Fit, square

Reason = Literal["missing", "denied", "empty", "unsupported", "unreadable", "too_large", "blank"]
GREY_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr")
DEPTHS = (8, 10, 12, 14, 16)
DAMAGE = (OSError, SyntaxError, ValueError, EOFError, struct.error, KeyError, TypeError, OverflowError, PngError)
"""What Pillow and libpng raise on files with changed bytes."""

cv2.setNumThreads(0)  # a Ray task owns one core; OpenCV would take all of them

__all__ = ["MAX_PIXELS", "DecodeError", "Fit", "Reason", "decode"]


class DecodeError(ValueError):
    """One image cannot be used: `reason` is a code for counting, `detail` a few words for a person."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason: Reason = reason
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}"


def decode(data: bytes, name: str, size: int, fit: Fit, reduce_to: int | None = None) -> NDArray[np.uint8]:
    """Decodes one image to grey uint8 [size, size].

    The kind of file is told by its first bytes, never by `name`. PNG of up to 16 and JPEG of 8 bits, grey, colour,
    palette or with alpha (over black), turned as EXIF says; DICOM with one frame, inverted where MONOCHROME1, through
    rescale and VOI LUT or window. 16-bit values are scaled by the smallest of 8, 10, 12, 14, 16 bits that holds the
    largest.
    The square is made by `fit`, then resized (by area when it shrinks, else linearly), after `reduce_to` if given.

    Args:
        data: content of the file.
        name: file name, for nothing but the message on an unknown kind of file.
        size: side of the result in pixels.
        fit: `crop` cuts the longer side centrally, `pad` adds black to the shorter.
        reduce_to: longest side in pixels that keeps its detail; larger images are first reduced to it.

    Raises:
        DecodeError: with a reason from `Reason`.
    """
    if not data:
        raise DecodeError("empty", "the file has no content")
    if data.startswith((b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff")):
        grey, peak = _picture(data)
    elif data[128:132] == b"DICM":
        try:
            grey, peak = read_dicom(data)
        except DicomError as fault:
            raise DecodeError(fault.reason, fault.detail) from None
    else:
        suffix = name.rpartition(".")[2][:8] if "." in name else "no suffix"
        raise DecodeError("unsupported", f"neither PNG nor JPEG nor DICOM by its first bytes ({suffix})")
    if grey.min() == grey.max():
        raise DecodeError("blank", "every pixel has the same value")
    pixels = square(grey, size, fit, reduce_to)
    if pixels.dtype == np.uint8:
        return np.asarray(pixels, dtype=np.uint8)
    scaled = pixels.astype(np.float32) * np.float32(255.0 / peak)
    return np.asarray(np.rint(np.clip(scaled, 0.0, 255.0)), dtype=np.uint8)


def _picture(data: bytes) -> tuple[NDArray[Any], float]:
    """PNG or JPEG as grey uint8 or uint16 [H, W], and the value of white."""
    try:
        with Image.open(io.BytesIO(data), formats=("PNG", "JPEG")) as image:
            _refuse(image)
            image.load()
            upright = ImageOps.exif_transpose(_deep(data, image) if _is_deep_colour(data) else image)
            return _grey(upright)
    except UnidentifiedImageError:  # its own words hold an address, another in every process
        raise DecodeError("unreadable", "a damaged header, or a JPEG of more than 8 bits") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise DecodeError("too_large", f"more than {MAX_PIXELS} pixels") from None
    except (
        OSError,
        SyntaxError,
        ValueError,
        EOFError,
        struct.error,
        KeyError,
        TypeError,
        OverflowError,
        PngError,
    ) as error:
        if isinstance(error, DecodeError):
            raise
        raise DecodeError("unreadable", _one_line(error)) from None


def _refuse(image: Image.Image) -> None:
    """Looks at the header before any pixel is decoded."""
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise DecodeError("too_large", f"{width} x {height} pixels; the limit is {MAX_PIXELS}")
    if image.format == "PNG" and getattr(image, "n_frames", 1) > 1:
        raise DecodeError("unsupported", "an animated PNG")


def _is_deep_colour(data: bytes) -> bool:
    """Whether this is a PNG of 16 bits with colour or alpha, of which Pillow keeps the upper eight."""
    return data.startswith(b"\x89PNG") and data[24] == 16 and data[25] in (2, 4, 6)


def _deep(data: bytes, image: Image.Image) -> Image.Image:
    """Grey of 16 bits of such a PNG, over black, with the orientation that `image` has."""
    values = png_decode(data).astype(np.float32)
    channels = values.shape[2]
    grey = values[..., :3] @ LUMA if channels >= 3 else values[..., 0]
    if channels in (2, 4):
        grey *= values[..., -1] / 65535
    deep = Image.fromarray(np.rint(grey).astype(np.uint16))
    deep.info = {key: value for key, value in image.info.items() if key != "transparency"}
    return deep


def _grey(image: Image.Image) -> tuple[NDArray[Any], float]:
    """Grey values of any mode that PNG and JPEG files have."""
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.uint16)
        if "transparency" in image.info:
            values[values == image.info["transparency"]] = 0
        largest = int(values.max())
        bits = next(depth for depth in DEPTHS if largest < 2**depth)
        return values, float(2**bits - 1)
    if image.mode not in GREY_MODES:
        raise DecodeError("unsupported", f"colour mode {image.mode}")
    if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
        coloured = image.convert("RGBA")
        black = Image.new("RGBA", coloured.size, (0, 0, 0, 255))
        image = Image.alpha_composite(black, coloured).convert("RGB")
    return np.asarray(image.convert("L")), 255.0


def _one_line(error: Exception) -> str:
    """The decoder's complaint, short."""
    text = " ".join(str(error).split())
    return (text or type(error).__name__)[:160]
