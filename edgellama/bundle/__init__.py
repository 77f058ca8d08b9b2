"""The bundle, a directory that an app ships: reading, writing, publishing and reuse."""

from __future__ import annotations

from edgellama.bundle.bundle import Bundle

__all__ = ["Bundle"]
