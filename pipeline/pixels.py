"""The pixels behind a URI: a phantom is rendered, anything else is read and decoded."""

import numpy as np
from numpy.typing import NDArray

from mpc.errors import MissingError
from pipeline import storage
from pipeline.decode import DecodeError, Fit, decode
from pipeline.geometry import square
from pipeline.headers import kind_flags


def load(uri: str, size: int, fit: Fit, reduce_to: int | None = None) -> NDArray[np.uint8]:
    """The image at `uri` as grey uint8 [size, size]; larger than `reduce_to`, it is first reduced to that side.

    Raises: as `load_flagged` does.
    """
    return load_flagged(uri, size, fit, reduce_to)[0]


def load_flagged(
    uri: str, size: int, fit: Fit, reduce_to: int | None = None
) -> tuple[NDArray[np.uint8], tuple[str, ...]]:
    """The image as `load` gives it, and what its header says against a frontal radiograph.

    Raises:
        DecodeError: this one image is missing, forbidden or not readable.
        UserError: the storage itself cannot be reached.
    """
    if uri.startswith("phantom://"):
        from pipeline.sources.phantom import render_uri  # costs a worker that reads files nothing

        return np.asarray(square(render_uri(uri, size), size, fit, reduce_to), dtype=np.uint8), ()
    try:
        data = storage.read_bytes(uri)
    except MissingError:
        raise DecodeError("missing", "no such file") from None
    except storage.DeniedError:
        raise DecodeError("denied", "may not be read: check its rights") from None
    return decode(data, storage.name(uri), size, fit, reduce_to), kind_flags(data)
