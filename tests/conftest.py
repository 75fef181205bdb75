"""Fixtures that several test files share."""

from pathlib import Path

import pytest

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real NIH radiographs beside the checkout; the project itself never needs them."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"real radiographs are not here: {SHARED_DATA} is absent")
    return SHARED_DATA
