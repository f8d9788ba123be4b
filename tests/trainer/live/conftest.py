"""Fixtures: those of the report's tests that open a page in Chromium."""

from tests.trainer.report.conftest import browser, open_report

__all__ = ["browser", "open_report"]
