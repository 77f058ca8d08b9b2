"""The probe tells the three roundings apart, and knows the one of this machine's kernels."""

from __future__ import annotations

from pathlib import Path

import onnxruntime as ort
import pytest
import torch

from edgellama.emulator.processors import PROCESSORS
from edgellama.gate.emulation import check_rounding
from edgellama.model.activations import quantize_activations
from edgellama.runtimes.emulated_worker import probed
from edgellama.targets.onnx.numerics import quantize_blocks
from edgellama.targets.onnx.rounding_probe import (
    BLOCK,
    Float,
    _codes,
    probe_input,
    rounding_of,
    write_probe,
)


def results() -> dict[str, Float]:
    """The probe's result under each rounding, float32 [8, ROWS], summed in float32."""
    x, weight = torch.from_numpy(probe_input()), torch.from_numpy(_codes().T).float()
    values, scale = quantize_activations(x)
    inputs = {"float": x, "per block": quantize_blocks(x, BLOCK), "per row": values * scale}
    return {name: (rounded @ weight).numpy() for name, rounded in inputs.items()}


@pytest.mark.parametrize("name", ["float", "per block", "per row"])
def test_each_rounding_is_known(name: str) -> None:
    assert rounding_of(results()[name]) == name
    assert rounding_of(results()[name] * 1.01) == "unknown"


def test_the_check_needs_the_expected_rounding_in_both_calls() -> None:
    block, row, exact = (results()[name] for name in ("per block", "per row", "float"))
    new, old = PROCESSORS["cortex-a76"], PROCESSORS["cortex-a53"]
    assert check_rounding(new, [block, block]).verdict == "pass"
    assert check_rounding(old, [exact, exact]).verdict == "pass"
    for processor, wrong in (
        (new, [row, row]),
        (new, [block, row]),
        (new, [exact, exact]),
        (old, [block, block]),
    ):
        assert check_rounding(processor, wrong).verdict == "fail"


def test_the_kernels_of_this_machine_round_per_block(tmp_path: Path) -> None:
    write_probe(tmp_path)
    options = ort.SessionOptions()
    options.add_session_config_entry("mlas.disable_kleidiai", "1")
    all_rows, one_by_one = probed(ort, options, str(tmp_path))
    assert rounding_of(all_rows) == rounding_of(one_by_one) == "per block"
