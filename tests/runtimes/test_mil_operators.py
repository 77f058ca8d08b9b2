"""Operators of the reference interpreter, in a saved package, against torch and coremltools' folding."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import coremltools as ct
import numpy as np
import pytest
import torch
from coremltools.converters.mil.mil import Function
from torch import Tensor

from edgellama.host.log_filters import coremltools_quiet
from edgellama.runtimes.mil.interpreter import OPERATORS, MilModel
from tests.helpers.mil_programs import NAMES, Case, program_of, save

# Attributes that the folding of coremltools 9.0 ignores or crashes on. Only torch is their reference.
WRONG_FOLDING = {"concat": ("interleave",), "cumsum": ("exclusive",), "scatter_along_axis": ("mode",)}


def as_tensors(case: Case) -> dict[str, Any]:
    """Arguments of a case as torch tensors."""
    return {
        name: [torch.tensor(a) for a in arrays] if isinstance(arrays, list) else torch.tensor(arrays)
        for name, arrays in case.tensors.items()
    }


def expected(case: Case) -> list[Tensor]:
    """Outputs of a case in torch."""
    result = (
        case.expected(**as_tensors(case)) if _by_name(case) else case.expected(*as_tensors(case).values())
    )
    return list(result) if isinstance(result, (tuple, list)) else [result]


def _by_name(case: Case) -> bool:
    return getattr(case.expected, "__name__", "") == "<lambda>"


@pytest.fixture(scope="module")
def interpreter_outputs(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Tensor]:
    """Outputs of all cases, computed by the interpreter from one saved package."""
    package = save(program_of(NAMES), tmp_path_factory.mktemp("ops") / "ops.mlpackage")
    inputs = {
        f"{name}_{argument}_{i}": torch.tensor(array)
        for name, case in NAMES.items()
        for argument, arrays in case.tensors.items()
        for i, array in enumerate(arrays if isinstance(arrays, list) else [arrays])
    }
    model = MilModel(package)
    declared = {feature.name for feature in model.functions["main"].inputs}
    as_declared = {n: t.float() if t.dtype == torch.bool else t for n, t in inputs.items() if n in declared}
    return model.predict({n: t.reshape(1) if t.dim() == 0 else t for n, t in as_declared.items()})


@pytest.mark.parametrize("name", NAMES)
def test_against_torch(name: str, interpreter_outputs: Mapping[str, Tensor]) -> None:
    for i, expected_tensor in enumerate(expected(NAMES[name])):
        actual = interpreter_outputs[f"{name}_out_{i}"]
        assert tuple(actual.shape) == tuple(expected_tensor.shape)
        torch.testing.assert_close(actual.double(), expected_tensor.double(), rtol=2e-5, atol=2e-6)


def test_every_operator_has_a_case() -> None:
    covered = {case.operator for case in NAMES.values()}
    assert set(OPERATORS) - covered == {"quantize", "dequantize"}  # tested below: they need 8-bit integers


@pytest.mark.parametrize("name", NAMES)
def test_against_coremltools_own_folding(name: str) -> None:
    """Given constants, coremltools computes many operators itself, in numpy."""
    case = NAMES[name]
    if any(case.attributes.get(key) for key in WRONG_FOLDING.get(case.operator, ())):
        pytest.skip("coremltools 9.0 folds this attribute wrongly, or not at all")
    with coremltools_quiet(), Function({}, ct.target.iOS18):
        result = case.call(dict(case.tensors))
    folded = [var.val for var in (result if isinstance(result, (list, tuple)) else [result])]
    if any(value is None for value in folded):
        pytest.skip("coremltools does not fold this operator")
    interpreted = OPERATORS[case.operator]({**as_tensors(case), **_attributes(case)})
    for actual, expected_array in zip(
        interpreted if isinstance(interpreted, (list, tuple)) else [interpreted], folded, strict=True
    ):
        np.testing.assert_allclose(
            actual.double().numpy(), np.asarray(expected_array, np.float64), rtol=2e-5, atol=2e-6
        )


def _attributes(case: Case) -> dict[str, Any]:
    return {k: torch.tensor(v) if isinstance(v, np.ndarray) else v for k, v in case.attributes.items()}


def test_quantize_and_dequantize_are_inverse_within_half_a_step() -> None:
    x = torch.linspace(-3, 3, 41)
    parameters = {"scale": 0.05, "zero_point": torch.tensor(7), "output_dtype": "int8"}
    codes = OPERATORS["quantize"]({"input": x, **parameters})
    assert codes.min() >= -128
    assert codes.max() <= 127
    back = OPERATORS["dequantize"]({"input": codes, **parameters})
    assert float((back - x).abs().max()) <= 0.025 + 1e-6
    fake_quantized = torch.fake_quantize_per_tensor_affine(x, 0.05, 7, -128, 127)
    torch.testing.assert_close(back, fake_quantized)


def test_half_precision_is_rounded_at_every_operator(tmp_path: Path) -> None:
    """A sum of three is rounded twice in mode fp16 and never in mode fp32."""
    from coremltools.converters.mil import Builder as mb
    from coremltools.converters.mil.mil import types

    with Function({n: mb.TensorSpec((64,), types.fp16) for n in "abc"}, ct.target.iOS18) as function:
        y = mb.add(x=mb.add(x=function.inputs["a"], y=function.inputs["b"]), y=function.inputs["c"], name="y")
        function.set_outputs([y])
    package = save(function, tmp_path / "sum.mlpackage")
    generator = torch.Generator().manual_seed(0)
    a, b, c = (torch.randn(64, generator=generator).half() for _ in range(3))
    inputs = {"a": a, "b": b, "c": c}
    assert torch.equal(MilModel(package).predict(inputs)["y"], (a + b) + c)
    assert torch.equal(MilModel(package, mode="fp32").predict(inputs)["y"], a.float() + b.float() + c.float())
