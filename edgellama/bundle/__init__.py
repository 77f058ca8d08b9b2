"""The directory that an app ships."""

from __future__ import annotations

from edgellama.bundle.bundle import Bundle

__all__ = ["Bundle"]
