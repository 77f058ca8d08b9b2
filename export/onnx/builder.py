"""Builder of both forms of an ONNX model: nodes, tensors inside the file, and weights in a file beside it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from edgellama.model.llama import Llama, RMSNorm
from edgellama.targets.onnx.interface import (
    ADAPTER_DOWN,
    ADAPTER_UP,
    ATTENTION_MASK,
    DATA_FILE,
    INPUT_IDS,
    IR_VERSION,
    LOGITS,
    OPSET,
    PAST_KEY,
    PAST_VALUE,
    PRESENT_KEY,
    PRESENT_VALUE,
    adapter_inputs,
)
from edgellama.targets.provenance import Provenance

CONTRIB = "com.microsoft"
# Bytes. A large tensor begins on a memory page, so that a runtime can map it in place.
PAGE, LARGE = 4096, 1 << 20
ALIGNMENT = 64  # bytes, of the other tensors
INLINE = 16_384  # bytes; a tensor up to this size stays inside the .onnx


class WeightFile:
    """The data file: arrays one after the other. Arrays with the same key are stored once."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb")
        self._places: dict[Any, tuple[int, int]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def place(self, key: Any, array: np.ndarray) -> tuple[int, int]:
        """Returns (offset, bytes) of `array`. Writes it unless the file has an array with this key."""
        if key not in self._places:
            alignment = PAGE if array.nbytes >= LARGE else ALIGNMENT
            self._file.write(b"\0" * (-self._file.tell() % alignment))
            offset = self._file.tell()
            self._file.write(np.ascontiguousarray(array).data)
            self._places[key] = offset, array.nbytes
        return self._places[key]


class GraphBuilder:
    """An unfinished graph of `model`. Every method that makes a value returns its name."""

    def __init__(self, model: Llama, weights: WeightFile, provenance: Provenance) -> None:
        self.llama = model
        self.weights = weights
        self.adapters = adapter_inputs(model, provenance)
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: dict[str, TensorProto] = {}

    def node(
        self,
        operator: str,
        inputs: Sequence[str],
        name: str,
        *,
        outputs: Sequence[str] | None = None,
        domain: str = "",
        **attributes: Any,
    ) -> str:
        """Adds an operator and returns the name of its first output.

        Args:
            operator: type of the operator.
            inputs: names of the input values. An empty name leaves out an optional input.
            name: name of the node.
            outputs: names of the output values. None for one output with the name of the node.
            domain: domain of the operator. Empty for the ONNX standard.
            attributes: attributes of the operator.
        """
        outputs = outputs or [name]
        self.nodes.append(helper.make_node(operator, inputs, outputs, name=name, domain=domain, **attributes))
        return outputs[0]

    def constant(self, name: str, array: np.ndarray) -> str:
        """Adds a tensor inside the .onnx file."""
        if name not in self.initializers:
            self.initializers[name] = numpy_helper.from_array(array, name)
        return name

    def weight(
        self,
        name: str,
        array: np.ndarray,
        *,
        shape: Sequence[int] | None = None,
        dtype: int | None = None,
        key: Any = None,
    ) -> str:
        """Adds a tensor in the data file, or in the .onnx if it is small.

        Args:
            name: name of the tensor.
            array: its bytes.
            shape: declared shape, if not that of `array` (int4 is packed, two to a byte).
            dtype: declared ONNX data type, if not that of `array`.
            key: identity of the bytes. Tensors with the same key lie in the file once, also with different
                declarations.
        """
        if name in self.initializers:
            return name
        if array.nbytes <= INLINE and key is None and dtype is None:
            return self.constant(name, array)
        offset, length = self.weights.place(name if key is None else key, array)
        tensor = TensorProto(
            name=name,
            dims=shape or array.shape,
            data_type=dtype or helper.np_dtype_to_tensor_dtype(array.dtype),
            data_location=TensorProto.EXTERNAL,
        )
        for entry, value in (("location", DATA_FILE), ("offset", offset), ("length", length)):
            tensor.external_data.add(key=entry, value=str(value))
        self.initializers[name] = tensor
        return name

    def rope_tables(self) -> None:
        """Adds `cos` and `sin`, float32 [context, head_dim / 2]."""
        for table in ("cos", "sin"):
            self.weight(table, getattr(self.llama.model, table)[:, 0].numpy())

    def gamma(self, norm: RMSNorm, name: str) -> str:
        return self.constant(f"{name}.weight", norm.weight.detach().numpy())

    def rms_norm(self, x: str, norm: RMSNorm, name: str) -> str:
        return self.node("RMSNormalization", [x, self.gamma(norm, name)], name, axis=-1, epsilon=norm.eps)

    def swiglu(self, gate: str, up: str, name: str) -> str:
        """Adds silu(gate) * up."""
        sigmoid = self.node("Sigmoid", [gate], f"{name}.sigmoid")
        silu = self.node("Mul", [gate, sigmoid], f"{name}.silu")
        return self.node("Mul", [silu, up], f"{name}.product")

    def adaptable(self, names: Sequence[str]) -> bool:
        """Returns True if an adapter may change these linears."""
        return ADAPTER_DOWN.format(names[0]) in self.adapters

    def adapted(self, x: str, y: str, names: Sequence[str], name: str, output: str) -> str:
        """Adds the change of an adapter to `y`, the product of `x` with the weights of `names`, stacked by rows."""
        changes = []
        for linear in names:
            down, up = ADAPTER_DOWN.format(linear), ADAPTER_UP.format(linear)
            for value in (down, up):
                shape = [0 if isinstance(size, str) else size for size in self.adapters[value]]
                self.constant(value, np.zeros(shape, np.float32))
            thin = self.node("MatMul", [x, down], f"{linear}.lora_A")
            changes.append(self.node("MatMul", [thin, up], f"{linear}.lora_B"))
        change = changes[0]
        if len(changes) > 1:
            change = self.node("Concat", changes, f"{name}.lora", axis=-1)
        return self.node("Add", [y, change], f"{name}.adapted", outputs=[output])

    def proto(self, metadata: dict[str, str], summary: str) -> onnx.ModelProto:
        """The graph as a model. It contains nothing that differs between two exports."""
        inputs, outputs = interface(self.llama)
        inputs += [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
            for name, shape in self.adapters.items()
        ]
        graph = helper.make_graph(
            self.nodes, "llama", inputs, outputs, list(self.initializers.values()), doc_string=summary
        )
        proto: onnx.ModelProto = helper.make_model(
            graph,
            opset_imports=[helper.make_opsetid("", OPSET)]
            + ([helper.make_opsetid(CONTRIB, 1)] if any(n.domain == CONTRIB for n in self.nodes) else []),
            ir_version=IR_VERSION,
            producer_name="edgellama",
        )
        helper.set_model_props(proto, metadata)
        return proto


def interface(model: Llama) -> tuple[list[onnx.ValueInfoProto], list[onnx.ValueInfoProto]]:
    """(inputs, outputs) as declared, with the cache. They are the same in both forms."""
    config = model.config
    inputs = [
        helper.make_tensor_value_info(INPUT_IDS, TensorProto.INT64, [1, "T"]),
        helper.make_tensor_value_info(ATTENTION_MASK, TensorProto.INT64, [1, "E"]),
    ]
    outputs = [helper.make_tensor_value_info(LOGITS, TensorProto.FLOAT, [1, 1, config.output_size])]
    for layer in range(config.num_hidden_layers):
        for names, values, length in (
            ((PAST_KEY, PAST_VALUE), inputs, "P"),
            ((PRESENT_KEY, PRESENT_VALUE), outputs, "S"),
        ):
            values += [
                helper.make_tensor_value_info(
                    name.format(layer),
                    TensorProto.FLOAT,
                    [1, config.num_key_value_heads, length, config.head_dim],
                )
                for name in names
            ]
    return inputs, outputs


def pack_int4(values: np.ndarray, *, offset: int) -> np.ndarray:
    """uint8 [..., n / 2]: codes -8..7 plus `offset`, two per byte (last axis), the first in the low bits."""
    shifted = values.view(np.uint8) + np.uint8(offset)  # wraps around, and the low bits are right
    packed: np.ndarray = (shifted[..., 0::2] & 0xF) | (shifted[..., 1::2] << 4)
    return packed
