"""Bytes of a Core ML program, in either container."""

from __future__ import annotations

from edgellama.targets.base import Storage

STORAGE = Storage(float_bytes=2, row_scale_bytes=2, tied_once=True, program=300_000, layer_program=44_000)
