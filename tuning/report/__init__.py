"""Pages of one file without network: report.html, how good a model is; search.html, what a search found."""

from tuning.report.files import search_beside
from tuning.report.page import write_report
from tuning.report.searched import write_search

__all__ = ["search_beside", "write_report", "write_search"]
