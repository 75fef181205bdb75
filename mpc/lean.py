"""Imports that leave a part of a library out, where that part is dear and not used."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # else its import asks the network for a newer version


@contextmanager
def without(part: str) -> Iterator[None]:
    """Inside, importing the module `part` fails with ImportError unless it is loaded; afterwards it may be imported."""
    absent = part not in sys.modules
    if absent:
        sys.modules[part] = None  # type: ignore[assignment]  # Python's own mark for "not to be had"
    try:
        yield
    finally:
        if absent:
            del sys.modules[part]
