"""Checks and reports, and the forms in which people and machines read them."""

from __future__ import annotations

from edgellama.report.checks import Check, above, below, check
from edgellama.report.report import Report

__all__ = ["Check", "Report", "above", "below", "check"]
