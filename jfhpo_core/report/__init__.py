"""The report of a study: one HTML file that asks for nothing from anywhere, and its headline as a picture."""

from jfhpo_core.report.findings import Contrast, caveats, contrasts, verdict
from jfhpo_core.report.page import write_headline, write_report

__all__ = ["Contrast", "caveats", "contrasts", "verdict", "write_headline", "write_report"]
