"""Files `.onnx_adapter` of ONNX Runtime: named tensors that stand for optional inputs of a model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from edgellama.errors import BundleError
from edgellama.host.onnxruntime_library import ort

_VERSION = 1  # of the content's form, for clients


def write_onnx_adapter(path: Path, arrays: Mapping[str, np.ndarray], model_version: int) -> None:
    """Writes the tensors to `path`. model_version: number of the model that they belong to, below 2^31."""
    file = ort.AdapterFormat()
    file.set_adapter_version(_VERSION)
    file.set_model_version(model_version)
    values = {name: ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(a)) for name, a in arrays.items()}
    file.set_parameters(values)
    file.export_adapter(str(path))


def read_onnx_adapter(path: Path) -> tuple[dict[str, np.ndarray], int]:
    """(tensors by name, number of the model). Raises BundleError for another format."""
    file = open_onnx_adapter(path)
    return {
        name: value.numpy().copy() for name, value in file.get_parameters().items()
    }, file.get_model_version()


def open_onnx_adapter(path: Path) -> ort.AdapterFormat:
    """The opened file, which owns the memory of its tensors. Raises BundleError for another format."""
    try:
        return ort.AdapterFormat.read_adapter(str(path))
    except Exception as error:  # ONNX Runtime raises its own root class here
        reason = str(error).strip().partition("\n")[0]
        raise BundleError(
            f"{path}: ONNX Runtime cannot read this adapter ({reason:.120})",
            remedy="Export the bundle again, or copy it again as a whole.",
        ) from error
