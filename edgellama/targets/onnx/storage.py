"""Bytes of an ONNX model."""

from __future__ import annotations

from edgellama.targets.base import Storage

STORAGE = Storage(
    float_bytes=4,
    row_scale_bytes=4,
    tied_once=True,
    group_scale_bytes=4,
    largest_block=256,
    program=600_000,
    layer_program=7_000,
)
