"""Bytes of an MLX model."""

from __future__ import annotations

from edgellama.targets.base import Storage

# A scale and a bias of 16 bits for each group. A scale per row is repeated for groups of ROW_GROUP.
ROW_GROUP = 64

STORAGE = Storage(
    float_bytes=2,
    row_scale_bytes=4,
    tied_once=True,
    rope_width=0.0,
    group_scale_bytes=4,
    largest_block=ROW_GROUP,
    program=4_000,
    layer_program=4_000,
)
