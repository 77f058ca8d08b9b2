"""The probe tells the three roundings apart, and knows the one of this machine's kernels."""

from __future__ import annotations

import platform
from pathlib import Path

import onnxruntime as ort
import pytest
import torch

from edgellama.emulator.processors import PROCESSORS
from edgellama.errors import MissingDependencyError
from edgellama.gate.emulated_kernels import check_rounding
from edgellama.model.activations import quantize_activations
from edgellama.runtimes.emulated_worker import probed
from edgellama.targets.onnx import rounding_probe
from edgellama.targets.onnx.numerics import quantize_blocks
from edgellama.targets.onnx.rounding_probe import (
    BLOCK,
    Float,
    _codes,
    probe_input,
    rounding_here,
    rounding_of,
    write_probe,
)


def results() -> dict[str, Float]:
    """The probe's result under each rounding, float32 [8, ROWS], summed in float32."""
    x, weight = torch.from_numpy(probe_input()), torch.from_numpy(_codes().T).float()
    values, scale = quantize_activations(x)
    inputs = {"float": x, "per-block": quantize_blocks(x, BLOCK), "per-row": values * scale}
    return {name: (rounded @ weight).numpy() for name, rounded in inputs.items()}


@pytest.mark.parametrize("name", ["float", "per-block", "per-row"])
def test_each_rounding_is_known(name: str) -> None:
    assert rounding_of(results()[name]) == name
    assert rounding_of(results()[name] * 1.01) == "unknown"


@pytest.mark.parametrize("family", ["per-block", "per-row", "float"])
def test_the_check_needs_the_rounding_of_the_golden_vectors_in_both_calls(family: str) -> None:
    processor = PROCESSORS["cortex-a76"]
    right = results()[family]
    assert check_rounding(processor, [right, right], family).verdict == "pass"
    for other, wrong in results().items():
        if other != family:
            assert check_rounding(processor, [wrong, wrong], family).verdict == "fail"
            assert check_rounding(processor, [right, wrong], family).verdict == "fail"


def test_golden_vectors_without_families_are_per_block() -> None:
    block, row, exact = (results()[name] for name in ("per-block", "per-row", "float"))
    new, old = PROCESSORS["cortex-a76"], PROCESSORS["cortex-a53"]
    assert check_rounding(new, [block, block], None).verdict == "pass"
    assert check_rounding(old, [exact, exact], None).verdict == "pass"
    assert check_rounding(new, [row, row], None).verdict == "fail"
    assert check_rounding(old, [block, block], None).verdict == "fail"


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="kernels of x86-64")
def test_the_kernels_of_x86_round_per_block(tmp_path: Path) -> None:
    write_probe(tmp_path)
    all_rows, one_by_one = probed(ort, ort.SessionOptions(), str(tmp_path))
    assert rounding_of(all_rows) == rounding_of(one_by_one) == "per-block"
    assert rounding_here(()) == rounding_here((("mlas.disable_kleidiai", "1"),)) == "per-block"


def test_a_rounding_that_nobody_knows_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounding_probe, "SAME", 0.0)
    with pytest.raises(MissingDependencyError, match="in a way that edgellama does not know"):
        rounding_here((("session.use_env_allocators", "0"),))
