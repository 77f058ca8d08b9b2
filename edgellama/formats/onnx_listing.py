"""Listing of an ONNX model: interface, nodes with attributes, tensors by content, and everything else."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from edgellama.formats.listing import Item, Listing, digest
from edgellama.formats.onnx_model import OnnxFile, read_bytes

# Listed on their own, or of the tool that wrote the file.
_OF_MODEL = {"graph", "metadata_props", "opset_import", "producer_name", "producer_version"}
_OF_GRAPH = {"node", "initializer", "input", "output", "doc_string"}


def list_onnx(file: OnnxFile) -> Listing:
    """The listing of a model. Places and padding in the data file are left out."""
    return list(_items(file))


def _items(file: OnnxFile) -> Iterator[Item]:
    proto, graph = file.proto, file.proto.graph
    opsets = ", ".join(f"{o.domain or 'ai.onnx'} {o.version}" for o in proto.opset_import)
    yield Item("the model", "model", {"opset imports": opsets, **_others(proto, _OF_MODEL)})
    for entry in proto.metadata_props:
        yield Item(f"metadata {entry.key}", "metadata", {"key": entry.key, "value": entry.value})
    for kind, values in (("input", graph.input), ("output", graph.output)):
        for value in values:
            yield Item(f"{kind} {value.name}", kind, {"name": value.name, "type": _text(value.type)})
    for number, node in enumerate(graph.node):
        yield Item(
            f"node {number} {node.name!r}",
            f"{node.domain}::{node.op_type}" if node.domain else node.op_type,
            {
                "name": node.name,
                "inputs": ", ".join(node.input),
                "outputs": ", ".join(node.output),
                **{f"attribute {a.name}": _text(a) for a in node.attribute},
                **_others(node, {"op_type", "domain", "name", "input", "output", "attribute"}),
            },
        )
    for tensor in graph.initializer:
        kind = f"{tensor.data_type} {list(tensor.dims)}"
        content = digest(read_bytes(file, tensor.name))
        yield Item(
            f"tensor {tensor.name!r}",
            "tensor",
            {"name": tensor.name, "type and shape": kind, "content": content},
        )
    yield Item("the graph", "graph", _others(graph, _OF_GRAPH))


def _others(message: Any, known: set[str]) -> dict[str, str]:
    """Text of every field that is set and not in `known`, such as functions, sparse tensors or value types."""
    texts = {}
    for field, value in message.ListFields():
        if field.name not in known:
            several = hasattr(value, "__iter__") and not isinstance(value, (str, bytes))
            texts[field.name.replace("_", " ")] = "; ".join(map(_text, value)) if several else _text(value)
    return texts


def _text(value: Any) -> str:
    return " ".join(str(value).split())
