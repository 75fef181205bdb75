"""Looks at what a run needs before it starts, here and on the cluster: each finding says what to do."""

from infra.doctor.examine import examine
from infra.doctor.finding import Finding

__all__ = ["Finding", "examine"]
