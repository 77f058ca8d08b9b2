"""Blocks of 32 weights in GGUF: codes and scales, packed and unpacked without arithmetic.

A block of Q4_0 is a float16 scale and 16 bytes: byte j holds code j + 8 in its low half and code j + 16 + 8 in
its high half. A block of Q8_0 is a float16 scale and 32 int8 codes (ggml/src/ggml-common.h).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

BLOCK = 32  # weights
BYTES = {"Q4_0": 18, "Q8_0": 34}  # of a block
_SCALE = 2  # bytes
_ROWS = 4096  # packed at once, which keeps temporaries small

Codes = npt.NDArray[np.int8]
Halves = npt.NDArray[np.float16]
Raw = npt.NDArray[np.uint8]


def pack(kind: str, values: Codes, scales: Halves) -> Raw:
    """Blocks uint8 [rows, bytes] of codes int8 [rows, columns] and scales float16 [rows, columns / 32].

    kind: `Q4_0` for codes -8..7, `Q8_0` for codes -128..127.
    """
    rows, columns = values.shape
    blocks = np.empty((rows, columns // BLOCK, BYTES[kind]), np.uint8)
    blocks[..., :_SCALE] = np.ascontiguousarray(scales)[..., None].view(np.uint8)
    for start in range(0, rows, _ROWS):
        part = values[start : start + _ROWS].reshape(-1, columns // BLOCK, BLOCK)
        if kind == "Q4_0":
            codes = (part + np.int8(8)).view(np.uint8)
            blocks[start : start + _ROWS, :, _SCALE:] = codes[..., :16] | (codes[..., 16:] << 4)
        else:
            blocks[start : start + _ROWS, :, _SCALE:] = part.view(np.uint8)
    return blocks.reshape(rows, -1)


def unpack(kind: str, raw: Raw, shape: tuple[int, ...]) -> tuple[Codes, Halves]:
    """(codes int8 [rows, columns], scales float16 [rows, columns / 32]) of the blocks in `raw`."""
    rows, columns = shape
    blocks = raw.reshape(rows, columns // BLOCK, BYTES[kind])
    scales = np.ascontiguousarray(blocks[..., :_SCALE]).view(np.float16)[..., 0]
    values = np.empty((rows, columns // BLOCK, BLOCK), np.int8)
    packed = blocks[..., _SCALE:]
    if kind == "Q4_0":
        values[..., :16] = packed & 0xF
        values[..., 16:] = packed >> 4
        values -= np.int8(8)
    else:
        values[:] = packed.view(np.int8)
    return values.reshape(rows, columns), scales
