"""Dequantization of every GGUF type, against values that ggml's own library gave for the same blocks."""

from __future__ import annotations

import hashlib

import gguf
import numpy as np
import pytest
from numpy.typing import NDArray

from edgellama.checkpoints.gguf import QUANTIZED
from edgellama.formats.gguf import dequantize

# Offsets of the float16 scales in a block, by type.
SCALES = {
    **dict.fromkeys(("Q8_0", "Q4_0", "Q5_0", "IQ4_NL", "IQ4_XS"), (0,)),
    **dict.fromkeys(("IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ1_S"), (0,)),
    **dict.fromkeys(("Q4_1", "Q5_1", "Q4_K", "Q5_K"), (0, 2)),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q6_K": (208,),
    "TQ1_0": (52,),
    "TQ2_0": (64,),
}
# SHA-256 (first 16 digits) of the float32 values by `to_float` of libggml (llama.cpp v0.5.0).
VALUES = {
    "Q8_0": "d2bd19e10721db17",
    "Q4_0": "581cfcf48322b4a1",
    "Q4_1": "1c3693aec478af50",
    "Q5_0": "a61733b6119ba3cc",
    "Q5_1": "eaaacc00289d9d10",
    "Q2_K": "38269fb9b9e15ee7",
    "Q3_K": "10171c41beaf6935",
    "Q4_K": "2c2a3d5173c6c79e",
    "Q5_K": "59fb022a3e7a41f9",
    "Q6_K": "7b4d2b34443c340f",
    "TQ1_0": "52bff0467e4e4f0d",
    "TQ2_0": "d116cd8fbe67cb16",
    "IQ2_XXS": "82efd1d4fa01d0d5",
    "IQ2_XS": "5b5978e191982bf0",
    "IQ2_S": "e8c97e20f2ebd80a",
    "IQ3_XXS": "d3d95a3a250e8483",
    "IQ3_S": "f522d826ed7215e5",
    "IQ1_S": "4e0b1d2a5f6ef600",
    "IQ4_NL": "1c17ac63703418c5",
    "IQ4_XS": "66ed6efe33881a47",
    "MXFP4": "a3432047908afc1c",
    "NVFP4": "f0a02c9ee5bf60e2",
    "IQ1_M": "844cfad01f5f95ae",
}


def blocks(name: str, count: int = 32) -> NDArray[np.uint8]:
    """Blocks [count, bytes] with arbitrary codes and finite scales."""
    _, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]]
    content = hashlib.shake_256(name.encode()).digest(count * size)
    rows = np.frombuffer(content, np.uint8).reshape(count, size).copy()
    for place, at in enumerate(SCALES.get(name, ())):
        scale = ((np.arange(count) * 7 + 3 * place) % 13 - 6.5) / 64
        rows[:, at : at + 2] = scale.astype(np.float16)[:, None].view(np.uint8)
    if name == "MXFP4":  # an exponent of 8 bits
        rows[:, 0] = rows[:, 0] % 16 + 112
    if name == "NVFP4":  # four scales of 8 bits
        rows[:, :4] = rows[:, :4] % 112
    if name == "IQ1_M":  # the scale lies in the highest bits of four words
        rows[:, 55] = rows[:, 55] % 16 + 32
    return rows


def test_every_type_that_is_read_has_values_here() -> None:
    assert VALUES.keys() == set(QUANTIZED)


@pytest.mark.parametrize("name", VALUES)
def test_values_are_those_of_ggml(name: str) -> None:
    rows = blocks(name)
    length, _ = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]]
    values = dequantize(rows.reshape(-1), name, (len(rows), length)).numpy()
    assert values.std() > 0.005
    assert hashlib.sha256((values + 0).tobytes()).hexdigest()[:16] == VALUES[name]
