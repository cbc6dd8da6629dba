"""The report of a run: one self-contained HTML file that needs no network to open."""

from npo_core.report.build import write_report

__all__ = ["write_report"]
