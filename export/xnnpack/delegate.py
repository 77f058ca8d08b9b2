"""Torch module -> payload of one XNNPACK delegate, written directly, without an Edge program in between.

ExecuTorch makes a payload in several steps. It exports a module, decomposes and partitions it, traces each
partition again in up to seventeen passes, and walks the result. This takes 3 to 8 seconds per decoder layer,
for the same work each time. A payload is a list of some fifty operators in XNNPACK's own terms. Here torch.fx
reads it from the module, node by node, in milliseconds.

Only this file depends on executorch's format of delegates. It uses the schema classes, the serializer, the
names of constants, and `LoweredBackendModule`. They were read in, and proven with, the versions of
`edgellama.host.executorch_versions.PROVEN`. With any other version, export/xnnpack/lower.py lowers the same
modules by ExecuTorch's own partitioner. Both ways compute the same logits, bit for bit
(tests/export/test_lower_xnnpack.py).
"""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from executorch.backends.xnnpack.serialization import xnnpack_graph_schema as xnn
from executorch.backends.xnnpack.serialization.xnnpack_graph_serialize import (
    CONSTANT_TENSOR_ALIGNMENT,
    serialize_xnnpack_binary,
)
from executorch.backends.xnnpack.utils.xnnpack_constants import (
    UINT64_MAX,
    XNN_INVALID_VALUE_ID,
    XNN_VALUE_FLAG_EXTERNAL_INPUT,
    XNN_VALUE_FLAG_EXTERNAL_OUTPUT,
)
from executorch.exir._serialize._named_data_store import NamedDataStore
from executorch.exir.lowered_backend_module import LoweredBackendModule
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from edgellama.export.xnnpack.blocks import Block, Shape
from edgellama.export.xnnpack.modules import DecomposedLinear
from edgellama.export.xnnpack.spool import Spool


def delegate(block: Block, longest_call: int, shapes: ExportedProgram, spool: Spool) -> nn.Module:
    """`block` as a module that calls an XNNPACK delegate, for up to `longest_call` tokens.

    shapes: program of `shape_program`. Blocks of the same class share one. spool: place of the weights.
    """
    writer = _Writer(spool)
    writer.write(_Tracer().trace(block), block, block.inputs(longest_call))
    payload = serialize_xnnpack_binary(writer.graph, bytearray())
    module: nn.Module = LoweredBackendModule(
        shapes, "XnnpackBackend", payload, [], writer.data.get_named_data_store_output()
    )
    return module


def shape_program(block: Block, longest_call: int) -> ExportedProgram:
    """Program that makes outputs of the block's shapes from its inputs. Tracing the method needs no more.

    ExecuTorch traces a delegate's program again in every pass. These few nodes replace the original program.
    """
    example = min(8, longest_call)
    tokens = torch.export.Dim("tokens", max=longest_call)
    inputs = [torch.zeros(shape) for shape in block.inputs(example)]
    dynamic = tuple(
        {i: tokens for i, (n, m) in enumerate(zip(shape, other, strict=True)) if n != m} or None
        for shape, other in zip(block.inputs(1), block.inputs(2), strict=True)
    )
    return torch.export.export(_Shapes(block.outputs), tuple(inputs), dynamic_shapes=(dynamic,), strict=False)


class _Shapes(nn.Module):
    def __init__(self, outputs: Callable[[int], list[Shape]]) -> None:
        super().__init__()
        self.outputs = outputs

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(inputs[0].new_empty(shape) for shape in self.outputs(inputs[0].shape[1]))


class _Tracer(fx.Tracer):
    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return isinstance(module, DecomposedLinear)


class _Writer:
    """Builds an XNNGraph value by value. `dims` holds the largest shape of each value, by its id."""

    def __init__(self, spool: Spool) -> None:
        self.data, self.spool = NamedDataStore(), spool
        self.graph = xnn.XNNGraph(
            version="0",
            xnodes=[],
            xvalues=[],
            num_externs=0,
            input_ids=[],
            output_ids=[],
            constant_data=[xnn.ConstantDataOffset(0, 0)],  # index 0: no constant
        )
        self.dims: list[Shape] = []
        self.outputs: dict[fx.Node, int] = {}  # external id by node
        self.quantized: dict[int, int] = {}

    def write(self, graph: fx.Graph, block: nn.Module, inputs: Sequence[Shape]) -> None:
        ids: dict[fx.Node, int] = {}
        results: Any = graph.output_node().args[0]
        results = results if isinstance(results, tuple) else (results,)
        self.outputs = {node: len(inputs) + i for i, node in enumerate(results)}
        self.graph.num_externs = len(inputs) + len(results)
        shapes = iter(inputs)
        for node in graph.nodes:
            if node.op == "placeholder":
                external = len(self.graph.input_ids)
                ids[node] = self.value(next(shapes), external, XNN_VALUE_FLAG_EXTERNAL_INPUT)
                self.graph.input_ids.append(ids[node])
            elif node.op == "get_attr":
                ids[node] = self.constant(_attribute(block, node.target))
            elif node.op == "call_module":
                ids[node] = self.linear(node, ids[node.args[0]], block.get_submodule(node.target))
            elif node.op in ("call_function", "call_method"):
                ids[node] = _OPERATORS[node.target](self, node, *fx.node.map_arg(node.args, ids.__getitem__))

    def value(self, dims: Shape, external: int = XNN_INVALID_VALUE_ID, flags: int = 0) -> int:
        return self._add(xnn.XNNDatatype.xnn_datatype_fp32, dims, external=external, flags=flags)

    def result(self, node: fx.Node, dims: Shape) -> int:
        """Id of the value that `node` computes: an output of the delegate, or an intermediate value."""
        if node not in self.outputs:
            return self.value(dims)
        identifier = self.value(dims, self.outputs[node], XNN_VALUE_FLAG_EXTERNAL_OUTPUT)
        self.graph.output_ids.append(identifier)
        return identifier

    def constant(self, tensor: Tensor) -> int:
        index = self._store(tensor.detach().float())
        return self._add(xnn.XNNDatatype.xnn_datatype_fp32, tuple(tensor.shape), constant=index)

    def node(self, union: Any) -> None:
        self.graph.xnodes.append(xnn.XNode(union, debug_handle=len(self.graph.xnodes)))

    def linear(self, node: fx.Node, x: int, module: nn.Module) -> int:
        """A quantized linear. Its input becomes int8 once, for all linears that read it."""
        assert isinstance(module, DecomposedLinear)
        if x not in self.quantized:
            per_token = xnn.PerTokenDynamicQuant(num_nonbatch_dims=1)
            self.quantized[x] = self._add(
                xnn.XNNDatatype.xnn_datatype_qdint8, self.dims[x], quantization=per_token
            )
            self.node(xnn.XNNConvert(x, self.quantized[x], 0))
        weight = self._weight(module, module.scales)
        bias = XNN_INVALID_VALUE_ID if module.bias is None else self.constant(module.bias)
        if module.less is None:
            return self.fully_connected(node, self.quantized[x], weight, bias)
        shape = (*self.dims[x][:-1], self.dims[weight][0])
        # A bias of zeros, because ExecuTorch's cache of packed weights knows them by the names of codes and bias.
        zeros = self.constant(torch.zeros(shape[-1]))
        products = [self.value(shape), self.value(shape)]
        self.node(xnn.XNNFullyConnected(self.quantized[x], weight, bias, products[0], 0))
        less = self._weight(module, module.less)
        self.node(xnn.XNNFullyConnected(self.quantized[x], less, zeros, products[1], 0))
        y = self.result(node, shape)
        self.node(xnn.XNNSubtract(*products, y, 0))
        return y

    def fully_connected(self, node: fx.Node, x: int, weight: int, bias: int) -> int:
        y = self.result(node, (*self.dims[x][:-1], self.dims[weight][0]))
        self.node(xnn.XNNFullyConnected(x, weight, bias, y, 0))
        return y

    def _weight(self, module: DecomposedLinear, scales: Tensor) -> int:
        codes = module.values
        bits = 4 if module.code_range == (-8, 7) else 8
        if bits == 4:
            codes = pack_int4(codes)
        index = self._store(codes)
        if module.group_size:
            scales = scales.to(torch.bfloat16)
            scale_index = self._store(scales, "scale_")
            kind = xnn.XNNDatatype.xnn_datatype_qbint4
            quantization: Any = xnn.PerChannelGroupQuant(
                scale=[],
                channel_dim=0,
                group_size=module.group_size,
                scale_buffer_idx=scale_index,
                num_scales=scales.numel(),
            )
        else:
            scale_index = self._store(scales, "scale_")
            kind = xnn.XNNDatatype.xnn_datatype_qcint4 if bits == 4 else xnn.XNNDatatype.xnn_datatype_qcint8
            quantization = xnn.PerChannelQuant(
                scale=[], channel_dim=0, scale_buffer_idx=scale_index, num_scales=scales.numel()
            )
        return self._add(kind, tuple(module.values.shape), constant=index, quantization=quantization)

    def _store(self, tensor: Tensor, prefix: str = "") -> int:
        """Index of a constant. Its bytes go to the program's named data, under the hash of its content."""
        data = tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        content_hash = hashlib.sha256(data)
        stored = self.spool.add(data, content_hash.digest())
        key = prefix + content_hash.hexdigest()
        self.data.add_named_data(key, stored, CONSTANT_TENSOR_ALIGNMENT)
        self.graph.constant_data.append(xnn.ConstantDataOffset(UINT64_MAX, len(data), key))
        return len(self.graph.constant_data) - 1

    def _add(
        self,
        kind: xnn.XNNDatatype,
        dims: Shape,
        *,
        constant: int = 0,
        external: int = XNN_INVALID_VALUE_ID,
        flags: int = 0,
        quantization: Any = None,
    ) -> int:
        identifier = len(self.graph.xvalues)
        tensor = xnn.XNNTensorValue(kind, len(dims), list(dims), constant, external, flags, identifier)
        union = tensor if quantization is None else xnn.XNNQuantizedTensorValue(tensor, quantization)
        self.graph.xvalues.append(xnn.XValue(union))
        self.dims.append(dims)
        return identifier


def pack_int4(codes: Tensor) -> Tensor:
    """int8 codes -8..7, [rows, columns] -> uint8 [rows, columns / 2]: offset by 8, even columns low."""
    offset = codes.to(torch.uint8) + 8
    return offset[:, ::2] | offset[:, 1::2] << 4


def _attribute(block: nn.Module, target: str) -> Tensor:
    owner, _, name = target.rpartition(".")
    tensor: Tensor = getattr(block.get_submodule(owner), name)
    return tensor


def _binary(kind: type[Any]) -> Callable[..., int]:
    def write(writer: _Writer, node: fx.Node, a: int, b: int) -> int:
        y = writer.result(node, tuple(torch.broadcast_shapes(writer.dims[a], writer.dims[b])))
        writer.node(kind(a, b, y, 0))
        return y

    return write


def _unary(kind: type[Any]) -> Callable[..., int]:
    def write(writer: _Writer, node: fx.Node, x: int) -> int:
        y = writer.result(node, writer.dims[x])
        writer.node(kind(x, y, 0))
        return y

    return write


def _linear(writer: _Writer, node: fx.Node, x: int, weight: int, bias: int | None = None) -> int:
    return writer.fully_connected(node, x, weight, XNN_INVALID_VALUE_ID if bias is None else bias)


def _reshape(writer: _Writer, node: fx.Node, x: int, *shape: int) -> int:
    known_size = -torch.Size(shape).numel()
    total = torch.Size(writer.dims[x]).numel()
    y = writer.result(node, tuple(total // known_size if n == -1 else n for n in shape))
    writer.node(xnn.XNNStaticReshape(len(shape), [0 if n == -1 else n for n in shape], x, y, 0))
    return y


def _narrow(writer: _Writer, node: fx.Node, x: int, dim: int, start: int, length: int) -> int:
    dims = writer.dims[x]
    dim %= len(dims)
    y = writer.result(node, (*dims[:dim], length, *dims[dim + 1 :]))
    # A size of 0 means the whole dimension, whose size is known at run time.
    offsets = [start if i == dim else 0 for i in range(len(dims))]
    sizes = [length if i == dim else 0 for i in range(len(dims))]
    writer.node(xnn.XNNStaticSlice(len(dims), offsets, sizes, x, y, 0))
    return y


def _cat(writer: _Writer, node: fx.Node, pair: Sequence[int], dim: int) -> int:
    first, second = pair
    dims = writer.dims[first]
    dim %= len(dims)
    y = writer.result(node, (*dims[:dim], dims[dim] + writer.dims[second][dim], *dims[dim + 1 :]))
    no_value = XNN_INVALID_VALUE_ID
    writer.node(xnn.XNNConcatenate2(dim, first, second, no_value, no_value, y, 0, no_value))
    return y


_OPERATORS: dict[Any, Callable[..., int]] = {
    operator.add: _binary(xnn.XNNAdd),
    operator.mul: _binary(xnn.XNNMultiply),
    operator.truediv: _binary(xnn.XNNDiv),
    torch.sigmoid: _unary(xnn.XNNSigmoid),
    torch.rsqrt: _unary(xnn.XNNReciprocalSquareRoot),
    torch.cat: _cat,
    F.linear: _linear,
    "view": _reshape,
    "narrow": _narrow,
}
