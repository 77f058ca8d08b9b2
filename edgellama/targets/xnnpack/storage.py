"""Bytes of an ExecuTorch .pte for XNNPACK."""

from __future__ import annotations

from edgellama.targets.base import Storage

STORAGE = Storage(
    float_bytes=4,
    row_scale_bytes=4,
    tied_once=False,
    rope_width=1.0,
    pairs=True,
    program=16_000,
    layer_program=11_000,
)
