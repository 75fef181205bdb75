"""DICOM -> grey values as a viewer would show them; no other tag is read, and none leaves this module."""

import io
import logging
import zlib
from typing import Any, Literal

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.pixels import apply_color_lut, apply_modality_lut, apply_voi, get_decoder
from pydicom.uid import UID

from pipeline.dicom_codecs import stored_pixels
from pipeline.geometry import MAX_PIXELS

UNPACKED, UNPACKED_CHUNK = 6 * MAX_PIXELS, 2**20
"""Bytes of a deflated data set: those of the largest image in colour of 16 bits; and how many are looked at at once."""
LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)  # ITU-R BT.601, as for PNG and JPEG
MONOCHROME = ("MONOCHROME1", "MONOCHROME2")
# pydicom quotes doubtful values, names among them, in warnings and logs; this module refuses or ignores them itself
pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE
logging.getLogger("pydicom").setLevel(logging.CRITICAL)
COLOUR = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT", "PALETTE COLOR")


class DicomError(ValueError):
    """Why a DICOM object gives no picture; quotes no value that could name a patient."""

    def __init__(self, reason: Literal["unsupported", "unreadable", "too_large"], detail: str) -> None:
        super().__init__(reason, detail)
        self.reason: Literal["unsupported", "unreadable", "too_large"] = reason
        self.detail = detail


class _Bounded(io.BytesIO):
    """A file that pydicom reads to its end, which it does to inflate a deflated data set, only where that is safe."""

    def read(self, size: int | None = -1) -> bytes:
        """As any file; DicomError where the rest would unpack to more than an image needs."""
        content = super().read(size)
        if size is None or size < 0:
            refuse_bomb(content)
        return content


def refuse_bomb(deflated: bytes) -> None:
    """Raises DicomError where a deflated data set is larger than any image: pydicom would unpack all of it."""
    unpacker, length = zlib.decompressobj(-zlib.MAX_WBITS), 0
    while deflated and not unpacker.eof:
        try:
            length += len(unpacker.decompress(deflated, UNPACKED_CHUNK))
        except zlib.error:  # not deflated, or damaged: pydicom says so
            return
        deflated = unpacker.unconsumed_tail
        if length > UNPACKED:
            raise DicomError("too_large", f"a deflated data set of more than {UNPACKED} bytes")


def read_dicom(data: bytes) -> tuple[NDArray[Any], float]:
    """Grey [H, W] and the value of white: uint8 and 255 where the file holds it so, else float32 in [0, 1] and 1.

    MONOCHROME1 is inverted. The order is PS3.3 C.11: modality LUT or rescale, then VOI LUT or the first window
    (LINEAR, LINEAR_EXACT, SIGMOID). Without either, 8-bit values stay as they are and deeper ones are stretched
    between their extremes. Pixel padding becomes black.

    Raises:
        DicomError: no pixels, several frames, an unknown photometric interpretation or transfer syntax, damage.
    """
    try:
        dataset = pydicom.dcmread(_Bounded(data))
        photometric = _refuse(dataset)
        stored = stored_pixels(dataset)
        if photometric in COLOUR:
            return _colour(dataset, photometric, stored), 1.0
        return _monochrome(dataset, photometric, stored)
    except (DicomError, MemoryError):
        raise
    except RuntimeError:  # pydicom's word for "no plugin" as well as "every plugin failed"
        raise DicomError(*_undecoded(data)) from None
    except Exception as error:  # a damaged file can fail anywhere in a parser of nested, typed elements
        raise DicomError("unreadable", f"damaged DICOM ({type(error).__name__})") from None


def _refuse(dataset: Dataset) -> str:
    """Looks at the header before any pixel is decoded; returns the photometric interpretation."""
    if "PixelData" not in dataset:
        kind = UID(str(dataset.get("SOPClassUID", "")))
        known = kind.name if kind.name != kind else "unknown class"  # what is no UID could be any text of the file
        raise DicomError("unsupported", f"not an image with pixels ({known})")
    if int(dataset.get("NumberOfFrames") or 1) != 1:
        raise DicomError("unsupported", f"{int(dataset.NumberOfFrames)} frames; one is expected")
    rows, columns = int(dataset.Rows), int(dataset.Columns)
    if rows * columns > MAX_PIXELS:
        raise DicomError("too_large", f"{columns} x {rows} pixels; the limit is {MAX_PIXELS}")
    photometric = str(dataset.PhotometricInterpretation)
    if photometric not in MONOCHROME + COLOUR:
        raise DicomError("unsupported", "its photometric interpretation is neither grey nor RGB, YBR or palette")
    return photometric


def _monochrome(dataset: Dataset, photometric: str, stored: NDArray[Any]) -> tuple[NDArray[Any], float]:
    """The grey pipeline of the standard."""
    padding = _padding(dataset, stored)
    values = np.asarray(apply_modality_lut(stored, dataset))
    if "VOILUTSequence" in dataset:
        bits = int(dataset.VOILUTSequence[0].LUTDescriptor[2])
        mapped = apply_voi(np.rint(values).astype(np.int32), dataset, 0)
        shown = np.asarray(mapped, dtype=np.float32) / np.float32(2**bits - 1)
    elif dataset.get("WindowCenter") not in (None, "") and dataset.get("WindowWidth") not in (None, ""):
        shown = _window(dataset, values.astype(np.float32))
    elif values.dtype == np.uint8 and int(dataset.BitsStored) == 8:
        plain = 255 - values if photometric == "MONOCHROME1" else values
        return np.where(padding, np.uint8(0), plain), 255.0
    else:
        shown = _stretch(values.astype(np.float32), padding)
    if photometric == "MONOCHROME1":
        shown = 1.0 - shown
    shown[padding] = 0.0
    return np.clip(shown, 0.0, 1.0), 1.0


def _window(dataset: Dataset, values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Values through the first window, in [0, 1] (PS3.3 C.11.2.1.2)."""
    center, width = _first(dataset.WindowCenter), _first(dataset.WindowWidth)
    function = str(dataset.get("VOILUTFunction") or "LINEAR")
    if width <= 0 or (function == "LINEAR" and width < 1):
        raise DicomError("unsupported", f"a window of width {width:g}")
    if function == "SIGMOID":
        exponent = np.clip(-4.0 * (values - center) / width, -80.0, 80.0)
        return np.asarray(1.0 / (1.0 + np.exp(exponent)), dtype=np.float32)
    if function == "LINEAR_EXACT":
        return np.asarray(np.clip((values - center) / width + 0.5, 0.0, 1.0), dtype=np.float32)
    if width == 1:
        return np.asarray(values > center - 0.5, dtype=np.float32)
    return np.asarray(np.clip((values - (center - 0.5)) / (width - 1.0) + 0.5, 0.0, 1.0), dtype=np.float32)


def _stretch(values: NDArray[np.float32], padding: NDArray[np.bool_]) -> NDArray[np.float32]:
    """The range of the true pixels to [0, 1]: what is left where a file names no window."""
    inside = values[~padding] if padding.any() and not padding.all() else values
    low, high = float(inside.min()), float(inside.max())
    return np.asarray((values - low) / max(high - low, 1e-6), dtype=np.float32)


def _padding(dataset: Dataset, stored: NDArray[Any]) -> NDArray[np.bool_]:
    """Where the file marks pixels as outside of the picture."""
    if "PixelPaddingValue" not in dataset:
        return np.zeros(stored.shape, dtype=np.bool_)
    first = int(dataset.PixelPaddingValue)
    last = int(dataset.get("PixelPaddingRangeLimit", first))
    return (stored >= min(first, last)) & (stored <= max(first, last))


def _colour(dataset: Dataset, photometric: str, stored: NDArray[Any]) -> NDArray[np.float32]:
    """Luma of an RGB picture in [0, 1]; pydicom has already turned YBR into RGB."""
    bits = int(dataset.BitsStored)
    if photometric == "PALETTE COLOR":
        stored = np.asarray(apply_color_lut(stored, dataset))
        bits = 8 * stored.dtype.itemsize
    if stored.ndim != 3 or stored.shape[2] != 3:
        raise DicomError("unreadable", "a colour image without three samples a pixel")
    return np.asarray(stored[..., :3].astype(np.float32) @ LUMA / np.float32(2**bits - 1), dtype=np.float32)


def _first(value: Any) -> float:
    """The first of one or several values."""
    return float(value[0] if isinstance(value, list | tuple | pydicom.multival.MultiValue) else value)


def _undecoded(data: bytes) -> tuple[Literal["unsupported", "unreadable"], str]:
    """Tells a missing decoder from damaged pixels, and names the transfer syntax."""
    try:
        syntax = UID(pydicom.dcmread(io.BytesIO(data), stop_before_pixels=True).file_meta.TransferSyntaxUID)
    except Exception:  # the header itself is damaged
        return "unreadable", "damaged DICOM header"
    if not syntax.is_transfer_syntax:
        return "unreadable", "unknown transfer syntax"
    if _decodable(syntax):
        return "unreadable", f"pixels cannot be decoded (transfer syntax {syntax.name})"
    return "unsupported", f"no decoder is installed for transfer syntax {syntax.name}"


def _decodable(syntax: UID) -> bool:
    """Whether pydicom has a decoder for this syntax and the library behind it."""
    try:
        return bool(get_decoder(syntax).is_available)
    except RuntimeError:
        return False
