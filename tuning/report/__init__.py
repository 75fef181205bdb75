"""report.html: what was trained on what, how well it does, what a search tried, pictures; one file, no network."""

from tuning.report.files import search_beside
from tuning.report.page import write_report

__all__ = ["search_beside", "write_report"]
