"""Compressed DICOM pixels -> array: which library decodes which transfer syntax, through pydicom's plugins.

pydicom would take any library that is installed. Here each syntax has one, and GDCM has none: of files with a few
changed bytes it takes the process, and so a Ray worker, down with it. pydicom brings no plugin for JPEG Lossless and
12-bit JPEG but those of GDCM and of a library under the GPL, so this module is one, over libjpeg-turbo.
"""

import re
import struct
from typing import Any

import numpy as np
import pydicom.uid as syntaxes
from imagecodecs import jpeg8_decode
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.encaps import get_frame
from pydicom.pixels import get_decoder, pixel_array
from pydicom.uid import UID

TURBO = "libjpeg-turbo"
LIBRARIES = {
    syntaxes.JPEGBaseline8Bit: "pillow",
    syntaxes.JPEGExtended12Bit: TURBO,
    syntaxes.JPEGLossless: TURBO,
    syntaxes.JPEGLosslessSV1: TURBO,
    syntaxes.JPEGLSLossless: "pyjpegls",
    syntaxes.JPEGLSNearLossless: "pyjpegls",
    syntaxes.JPEG2000Lossless: "pylibjpeg",
    syntaxes.JPEG2000: "pylibjpeg",
    syntaxes.HTJ2KLossless: "pylibjpeg",
    syntaxes.HTJ2KLosslessRPCL: "pylibjpeg",
    syntaxes.HTJ2K: "pylibjpeg",
    syntaxes.RLELossless: "pydicom",
}
DECODER_DEPENDENCIES = {syntax: ("imagecodecs",) for syntax, library in LIBRARIES.items() if library == TURBO}
"""What pydicom asks of a plugin."""
JPEG_HEADER = re.compile(rb"\xff[\xc0\xc1\xc3\xf7]\x00[\x0b\x0e\x11\x14](.)(..)(..)(.)", re.DOTALL)
"""Start of frame: precision in bits, rows, columns, components (ITU-T T.81 B.2.2; T.87 C.2.2 for JPEG-LS)."""
J2K_HEADER = re.compile(rb"\xff\x4f\xff\x51.{4}(.{4})(.{4})(.{4})(.{4}).{16}(..)", re.DOTALL)
"""Image and tile size: right, bottom, left, top, components (ITU-T T.800 A.5.1)."""


def stored_pixels(dataset: Dataset) -> NDArray[Any]:
    """The stored values [H, W] or [H, W, 3] of a data set with one frame; YBR is turned into RGB.

    Raises:
        RuntimeError: nothing decodes this transfer syntax, its library failed, or the compressed image has another
            size than the data set says.
    """
    syntax = UID(dataset.file_meta.TransferSyntaxUID)
    library = LIBRARIES.get(syntax, "")
    if library == TURBO and dataset.SamplesPerPixel == 3 and syntax == syntaxes.JPEGExtended12Bit:
        library = "pillow"  # of 8 bits; more in colour exist on paper only
    if library in ("pyjpegls", "pylibjpeg"):
        _check_size(dataset)
    return np.asarray(pixel_array(dataset, decoding_plugin=library))


def is_available(syntax: UID) -> bool:
    """What pydicom asks of a plugin: whether this one decodes the syntax."""
    return syntax in DECODER_DEPENDENCIES


def decode_frame(source: bytes, runner: Any) -> bytes:
    """What pydicom asks of a plugin: the values of one frame, row by row and pixel by pixel, in 8 or 16 bits."""
    header = JPEG_HEADER.search(source)
    if header is None:
        raise ValueError("a JPEG image without a frame")
    bits, samples = (8 if header[1][0] <= 8 else 16), int(runner.samples_per_pixel)
    shape = (runner.rows, runner.columns) + (() if samples == 1 else (samples,))
    values = np.empty(shape, np.uint8 if bits == 8 else np.uint16)  # an image of another size is refused, not decoded
    colours = None if samples == 1 else "RGB"
    jpeg8_decode(source, colorspace=colours, outcolorspace=colours, out=values)  # the same twice: none is converted
    runner.set_option("bits_allocated", bits)
    if samples > 1:
        runner.set_option("planar_configuration", 0)
    return values.tobytes()


def _check_size(dataset: Dataset) -> None:
    """Looks at the compressed image's own header: its decoder would allocate whatever that says."""
    frame = get_frame(dataset.PixelData, 0, number_of_frames=1)
    if header := J2K_HEADER.search(frame):
        right, bottom, left, top, components = struct.unpack(">IIIIH", b"".join(header.groups()))
        found = (bottom - top, right - left, components)
    elif header := JPEG_HEADER.search(frame):
        found = struct.unpack(">HHB", b"".join(header.groups()[1:]))
    else:
        raise RuntimeError("compressed pixels without a header")
    if found != (dataset.Rows, dataset.Columns, dataset.SamplesPerPixel):
        raise RuntimeError("compressed pixels of another size than the data set says")


for _syntax in DECODER_DEPENDENCIES:
    if TURBO not in get_decoder(_syntax).available_plugins:
        get_decoder(_syntax).add_plugin(TURBO, (__name__, "decode_frame"))
