"""The pixels behind a URI: a phantom is rendered, anything else is read and decoded."""

import numpy as np
from numpy.typing import NDArray

from mpc.errors import MissingError
from pipeline import storage
from pipeline.decode import DecodeError, Fit, decode


def load(uri: str, size: int, fit: Fit) -> NDArray[np.uint8]:
    """The image at `uri` as grey uint8 [size, size].

    Raises:
        DecodeError: this one image is missing, forbidden or not readable.
        UserError: the storage itself cannot be reached.
    """
    if uri.startswith("phantom://"):
        from pipeline.sources.phantom import render_uri  # costs a worker that reads files nothing

        return render_uri(uri, size)
    try:
        data = storage.read_bytes(uri)
    except MissingError:
        raise DecodeError("missing", "no such file") from None
    except storage.DeniedError:
        raise DecodeError("denied", "may not be read: check its rights") from None
    return decode(data, storage.name(uri), size, fit)
