"""Targets, one folder each: the format, its numerics, its limits and its structure checks."""

from __future__ import annotations

from edgellama.targets.base import Target
from edgellama.targets.table import TARGETS, find_target

__all__ = ["TARGETS", "Target", "find_target"]
