"""Hidden states of a lowered Llama as additional outputs of its graph, for parity of single layers."""

from __future__ import annotations

from onnx import TensorProto, helper

from edgellama.errors import BundleError
from edgellama.formats.onnx_model import OnnxFile

_RESIDUAL = 3  # output of SkipSimplifiedLayerNormalization with the sum that it normalizes


def with_states(file: OnnxFile, layers: int) -> tuple[bytes, list[str]]:
    """(model with the input of each layer as an output after the others, names of these outputs).

    External weights stay in their file. Raises BundleError if the norm before a layer is missing.
    """
    names = [_state(file, f"model.layers.{layer}.input_layernorm") for layer in range(layers)]
    proto = type(file.proto).FromString(file.proto.SerializeToString())
    proto.graph.output.extend(helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in names)
    content: bytes = proto.SerializeToString()
    return content, names


def _state(file: OnnxFile, norm: str) -> str:
    """Name of the value that the node `norm` normalizes."""
    node = file.by_name.get(norm)
    if node is not None and node.operator == "RMSNormalization":
        return node.inputs[0]
    if node is None or len(node.outputs) <= _RESIDUAL:
        raise BundleError(f"{file.path}: no {norm} with a residual sum", remedy="Export the bundle again.")
    return node.outputs[_RESIDUAL]
