"""What one check found."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was checked."""

    name: str
    ok: bool
    found: str
    remedy: str = ""
    """What to do; read only where `ok` is false."""
