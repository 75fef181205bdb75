"""read_dicom: the header's way from stored to shown values, by hand."""

import io

import numpy as np
import pydicom
import pytest
from pictures import dicom
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence

from pipeline.decode import DecodeError, decode

COLOURS = np.array([[[200, 0, 0], [0, 200, 0]], [[0, 0, 200], [250, 250, 250]]], np.uint8)
LUMA = [[60, 117], [23, 250]]  # .299 R + .587 G + .114 B


def shown(data: bytes) -> np.ndarray:
    return decode(data, "x", 2, "pad")


def test_monochrome1_with_rescale_and_window():
    stored = np.array([[0, 50], [100, 200]], np.uint16)
    data = dicom(
        stored, "MONOCHROME1", bits=12, RescaleSlope=2, RescaleIntercept=-100,
        VOILUTFunction="LINEAR_EXACT", WindowCenter=100, WindowWidth=400,
    )  # fmt: skip
    # 2 x - 100 = -100, 0, 100, 300; (y - 100) / 400 + .5 = 0, .25, .5, 1; inverted
    np.testing.assert_array_equal(shown(data), [[255, 191], [128, 0]])


def test_monochrome1_with_voi_table():
    table = Dataset()
    table.LUTDescriptor, table.LUTData = [4, 10, 16], np.array([0, 13107, 52428, 65535], "<u2").tobytes()
    stored = np.array([[0, 11], [12, 99]], np.uint16)  # below and above the table: its first and last entry
    data = dicom(stored, "MONOCHROME1", bits=12, VOILUTSequence=Sequence([table]))
    np.testing.assert_array_equal(shown(data), [[255, 204], [51, 0]])


def test_modality_table_comes_first():
    table = Dataset()
    table.LUTDescriptor, table.LUTData = [4, 0, 16], np.array([0, 1000, 3000, 4000], "<u2").tobytes()
    table.ModalityLUTType = "US"
    stored = np.array([[0, 1], [2, 3]], np.uint16)
    data = dicom(
        stored, bits=12, ModalityLUTSequence=Sequence([table]),
        VOILUTFunction="LINEAR_EXACT", WindowCenter=2000, WindowWidth=4000,
    )  # fmt: skip
    np.testing.assert_array_equal(shown(data), [[0, 64], [191, 255]])


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
def test_signed_values_with_padding(photometric):
    stored = np.array([[-2000, -100], [0, 100]], np.int16)
    data = dicom(stored, photometric, bits=12, PixelPaddingValue=-2000)
    stretched = {"MONOCHROME1": [[0, 255], [128, 0]], "MONOCHROME2": [[0, 0], [128, 255]]}
    np.testing.assert_array_equal(shown(data), stretched[photometric])
    ranged = dicom(stored, photometric, bits=12, PixelPaddingValue=-2000, PixelPaddingRangeLimit=-100)
    limits = {"MONOCHROME1": [[0, 0], [255, 0]], "MONOCHROME2": [[0, 0], [0, 255]]}
    np.testing.assert_array_equal(shown(ranged), limits[photometric])


@pytest.mark.parametrize("bits", [8, 12, 16])
@pytest.mark.parametrize("planar", [0, 1])
def test_colour_of_any_depth_and_layout(bits, planar):
    white = 2**bits - 1
    stored = np.rint(COLOURS / 255 * white).astype(np.uint8 if bits == 8 else np.uint16)
    data = dicom(stored, "RGB", bits=bits)
    if planar:
        planes = np.ascontiguousarray(stored.transpose(2, 0, 1)).tobytes()
        data = dicom(stored, "RGB", bits=bits, PlanarConfiguration=1, PixelData=planes)
    np.testing.assert_allclose(shown(data), LUMA, atol=0 if bits == 8 else 1)


def test_uncompressed_ybr():
    stored = np.array([[[60, 128, 128], [117, 128, 128]], [[23, 128, 128], [250, 128, 128]]], np.uint8)
    np.testing.assert_array_equal(shown(dicom(stored, "YBR_FULL")), LUMA)


def test_palette():
    entries = {"Red": COLOURS[..., 0], "Green": COLOURS[..., 1], "Blue": COLOURS[..., 2]}
    tags = {f"{name}PaletteColorLookupTableDescriptor": [4, 0, 16] for name in entries}
    tags |= {
        f"{name}PaletteColorLookupTableData": (v.ravel().astype("<u2") * 257).tobytes() for name, v in entries.items()
    }
    data = dicom(np.array([[0, 1], [2, 3]], np.uint8), "PALETTE COLOR", **tags)
    np.testing.assert_array_equal(shown(data), LUMA)


def test_several_windows_and_an_empty_one():
    stored = np.array([[0, 100], [300, 400]], np.uint16)
    first = dicom(stored, bits=12, VOILUTFunction="LINEAR_EXACT", WindowCenter=[200, 5], WindowWidth=[400, 5])
    np.testing.assert_array_equal(shown(first), [[0, 64], [191, 255]])
    empty = dicom(stored, bits=12, WindowCenter=None, WindowWidth=None)
    np.testing.assert_array_equal(shown(empty), [[0, 64], [191, 255]])


def test_frames_are_counted_before_pixels_are_read():
    stored = np.arange(12, dtype=np.uint8).reshape(3, 2, 2)
    data = dicom(stored[0], NumberOfFrames=3, PixelData=stored.tobytes())
    with pytest.raises(DecodeError, match="3 frames"):
        shown(data)
    one = dicom(stored[0], NumberOfFrames=1)
    np.testing.assert_array_equal(shown(one), stored[0])


def test_deflated_and_implicit():
    stored = np.array([[0, 100], [300, 400]], np.uint16)
    tags = {"VOILUTFunction": "LINEAR_EXACT", "WindowCenter": 200, "WindowWidth": 400}
    deflated = dicom(stored, bits=12, syntax=pydicom.uid.DeflatedExplicitVRLittleEndian, **tags)
    np.testing.assert_array_equal(shown(deflated), [[0, 64], [191, 255]])
    dataset = pydicom.dcmread(io.BytesIO(dicom(stored, bits=12, syntax=pydicom.uid.ImplicitVRLittleEndian, **tags)))
    np.testing.assert_array_equal(shown(saved(dataset)), [[0, 64], [191, 255]])


def saved(dataset) -> bytes:
    buffer = io.BytesIO()
    dataset.save_as(buffer)
    return buffer.getvalue()
