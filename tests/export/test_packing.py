"""Packed codes of ONNX and MLX: every code has its place, and no wider copy of a table is made."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch

from edgellama.export.mlx.lower import pack
from edgellama.export.onnx.builder import WeightFile, pack_int4
from edgellama.export.onnx.graph_ort import packed, stacked
from edgellama.formats.mlx_model import Packed
from edgellama.model.quantized import Codes
from edgellama.recipe import PerChannel, PerGroup, Scheme

INT8, INT4 = Scheme(8, PerChannel(), False), Scheme(4, PerGroup(32), True)


def codes_of(scheme: Scheme) -> Codes:
    """All codes of a scheme, in rows of 32."""
    low, high = scheme.code_range
    values = torch.arange(low, high + 1, dtype=torch.int16).to(torch.int8).repeat(64)
    return Codes(values.reshape(-1, 32), torch.ones(len(values) // 32, 1), scheme)


@pytest.mark.parametrize("scheme", [INT8, INT4], ids=["int8", "int4"])
def test_codes_are_counted_from_zero(scheme: Scheme) -> None:
    codes = codes_of(scheme)
    expected = codes.values.to(torch.int16).numpy() + (1 << (scheme.bits - 1))
    stored = packed(codes)
    if scheme.bits == 4:
        stored = np.stack([stored & 0xF, stored >> 4], -1).reshape(expected.shape)
    assert stored.dtype == np.uint8 and np.array_equal(stored, expected)
    words = pack(codes.values, scheme.bits).view(torch.uint8)
    if scheme.bits == 4:
        words = torch.stack((words & 0xF, words >> 4), -1).flatten(1)
    assert np.array_equal(words.numpy(), expected)
    scales = codes.scales
    assert torch.equal(Packed(words, scales, scales, 32, scheme.bits).values, codes.values)


def test_int4_with_signs() -> None:
    codes = codes_of(INT4).values.numpy()
    low = (pack_int4(codes, offset=0) << 4).view(np.int8) >> 4
    assert np.array_equal(low, codes[:, 0::2])


def test_a_table_is_copied_once(tmp_path: Path) -> None:
    table = Codes(torch.ones(4096, 1024, dtype=torch.int8), torch.ones(4096, 1), INT8)
    tracemalloc.start()
    try:
        with WeightFile(tmp_path / "data") as file:
            file.place("table", stacked([packed(table)]))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert table.values.nbytes <= peak < 1.2 * table.values.nbytes
