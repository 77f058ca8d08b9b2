"""Checks and reports, and their forms for people and machines."""

from __future__ import annotations

from edgellama.report.checks import Check, above, below, check
from edgellama.report.report import Report

__all__ = ["Check", "Report", "above", "below", "check"]
