"""Tests of the weights in ONNX models that other tools wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgellama.errors import BundleError
from edgellama.formats.onnx_model import read_onnx
from edgellama.formats.onnx_weights import weights_of

ROWS, COLUMNS = 3, 4
CODES = np.arange(COLUMNS * ROWS, dtype=np.int8).reshape(COLUMNS, ROWS)  # stored as [in, out]


def write_linear(path: Path, scales: np.ndarray, axis: int | None) -> None:
    """Writes a model of one MatMul whose weight is dequantized."""
    attributes: dict[str, Any] = {} if axis is None else {"axis": axis}
    nodes = [
        helper.make_node("DequantizeLinear", ["codes", "scales"], ["weight"], **attributes),
        helper.make_node("MatMul", ["x", "weight"], ["y"], name="linear"),
    ]
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, COLUMNS])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, ROWS])],
        [numpy_helper.from_array(CODES, "codes"), numpy_helper.from_array(scales, "scales")],
    )
    onnx.save(helper.make_model(graph), path)


@pytest.mark.parametrize(
    ("shape", "axis", "expected_shape"),
    [((ROWS,), None, (ROWS, 1)), ((ROWS,), 1, (ROWS, 1)), ((ROWS,), -1, (ROWS, 1)), ((COLUMNS,), 0, None)],
)
def test_scales_of_one_dimension(
    shape: tuple[int, ...], axis: int | None, expected_shape: tuple[int, int] | None, tmp_path: Path
) -> None:
    """One scale for each row, or for each column: code times scale is the weight either way."""
    scales = np.linspace(0.5, 2.0, shape[0], dtype=np.float32)
    write_linear(tmp_path / "model.onnx", scales, axis)
    file = read_onnx(tmp_path / "model.onnx")
    values, stored = weights_of(file)["linear"].codes(file)
    assert stored.shape == (expected_shape or (ROWS, COLUMNS))
    expected = CODES * (scales[:, None] if axis == 0 else scales)
    np.testing.assert_array_equal(values * stored, expected.T)


def test_one_scale_for_a_tensor(tmp_path: Path) -> None:
    write_linear(tmp_path / "model.onnx", np.array(0.25, np.float32), None)
    file = read_onnx(tmp_path / "model.onnx")
    values, stored = weights_of(file)["linear"].codes(file)
    np.testing.assert_array_equal(values * stored, CODES.T * np.float32(0.25))
    assert stored.shape == (ROWS, 1)


def test_scales_that_fit_no_dimension_are_refused(tmp_path: Path) -> None:
    write_linear(tmp_path / "model.onnx", np.ones(7, np.float32), None)
    file = read_onnx(tmp_path / "model.onnx")
    with pytest.raises(BundleError, match=r"scales of shape \(7,\)"):
        weights_of(file)["linear"].codes(file)
