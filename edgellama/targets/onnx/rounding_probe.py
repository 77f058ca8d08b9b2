"""One MatMulNBits of int4 weights, whose result tells over which values its kernel rounds the input.

`rounding_here` asks the kernels of this machine, and the emulator runs the same probe on its processors. The golden
vectors see a wrong rounding only as far as it exceeds the noise of a whole model. A single product has no
noise: the three formulas differ by percents, and the right one is met to seven digits.
"""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from edgellama.errors import MissingDependencyError
from edgellama.model.activations import quantize_activations
from edgellama.targets.onnx.families import FLOAT, PER_BLOCK, PER_ROW
from edgellama.targets.onnx.numerics import quantize_blocks

COLUMNS, ROWS, BLOCK = 256, 32, 32
UNKNOWN = "unknown"  # rounding of no known kernel
SAME = 1e-4  # largest error of the right formula, relative to the largest result
Float = npt.NDArray[np.float32]


def _codes() -> npt.NDArray[np.int64]:
    """Codes of the weight, -8 to 7, int64 [ROWS, COLUMNS]."""
    return (np.arange(ROWS * COLUMNS).reshape(ROWS, COLUMNS) * 7919 % 101) % 16 - 8


def probe_input() -> Float:
    """Input float32 [8, COLUMNS], whose channels differ in size."""
    draw = np.random.default_rng(0)
    values = draw.standard_normal((8, COLUMNS)) * np.exp(draw.standard_normal((1, COLUMNS)))
    rounded: Float = values.astype(np.float32)
    return rounded


def write_probe(directory: Path) -> None:
    """Writes probe.onnx, `x` float32 [T, COLUMNS] -> `y` float32 [T, ROWS] with scales of 1, and its input probe.npy."""
    import onnx
    from onnx import TensorProto, helper

    codes = (_codes() + 8).astype(np.uint8).reshape(ROWS, COLUMNS // BLOCK, BLOCK)
    packed = codes[..., 0::2] | (codes[..., 1::2] << 4)
    scales = np.ones(ROWS * COLUMNS // BLOCK, np.float32)
    graph = helper.make_graph(
        [
            helper.make_node(
                "MatMulNBits",
                ["x", "w", "s"],
                ["y"],
                domain="com.microsoft",
                K=COLUMNS,
                N=ROWS,
                bits=4,
                block_size=BLOCK,
                accuracy_level=4,
            )
        ],
        "probe",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["T", COLUMNS])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["T", ROWS])],
        [
            helper.make_tensor("w", TensorProto.UINT8, packed.shape, packed.tobytes(), raw=True),
            helper.make_tensor("s", TensorProto.FLOAT, scales.shape, scales.tobytes(), raw=True),
        ],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), directory / "probe.onnx")
    np.save(directory / "probe.npy", probe_input())


def rounding_of(result: Float) -> str:
    """`per-block`, `per-row`, `float`, or `unknown`, of the probe's result float32 [8, ROWS].

    >>> rounding_of((probe_input() @ _codes().T.astype(np.float32)))
    'float'
    """
    x = torch.from_numpy(probe_input())
    values, scale = quantize_activations(x)
    inputs = {FLOAT: x, PER_BLOCK: quantize_blocks(x, BLOCK), PER_ROW: values * scale}
    weight = _codes().T.astype(np.float64)
    errors = {}
    for name, rounded in inputs.items():
        expected = rounded.double().numpy() @ weight
        errors[name] = float(np.abs(result - expected).max() / np.abs(expected).max())
    best = min(errors, key=errors.__getitem__)
    return best if errors[best] < SAME else UNKNOWN


@cache
def rounding_here(entries: tuple[tuple[str, str], ...]) -> str:
    """Rounding of this machine's kernels under the session entries: `per-block`, `per-row` or `float`.

    Raises MissingDependencyError for an ONNX Runtime that rounds in another way.
    """
    from edgellama.host.onnxruntime_library import ort

    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    for name, value in entries:
        options.add_session_config_entry(name, value)
    x = probe_input()
    with tempfile.TemporaryDirectory() as directory:
        write_probe(Path(directory))
        session = ort.InferenceSession(
            str(Path(directory) / "probe.onnx"), options, providers=["CPUExecutionProvider"]
        )
    prefill = session.run(None, {"x": x})[0]
    decode = np.concatenate([session.run(None, {"x": row[None]})[0] for row in x])
    found = {rounding_of(prefill), rounding_of(decode)}
    if len(found) > 1 or UNKNOWN in found:
        raise MissingDependencyError(
            f"ONNX Runtime {ort.__version__} rounds activations on this processor in a way that edgellama does not "
            f"know (one product gives: {', '.join(sorted(found))})",
            remedy="Install the version of onnxruntime that pyproject.toml names, or report the processor.",
        )
    return found.pop()
