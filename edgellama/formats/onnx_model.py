"""Reader of ONNX models: nodes, weights and metadata, as stored on disk. It executes nothing.

Files are untrusted. Sizes, offsets and names are checked before any weight is read. Weights must be in plain
files beside the model.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from onnx import TensorProto, helper

from edgellama.errors import BundleError
from edgellama.files import strange_file

_REMEDY = "Export it again, or copy it again as a whole, weights included."
_LARGEST = 2**31 - 1  # bytes of a protobuf message
_PACKED: dict[int, int] = {TensorProto.INT4: 2, TensorProto.UINT4: 2}  # elements in a byte


@dataclass(frozen=True)
class Node:
    """An operator. `domain` is empty for those of the ONNX standard."""

    name: str
    operator: str
    domain: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any]

    @property
    def full_name(self) -> str:
        return f"{self.domain}::{self.operator}" if self.domain else self.operator


@dataclass(frozen=True)
class Value:
    """An input or output of the graph. `shape` holds sizes, or names of sizes that vary."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class OnnxFile:
    """The model at `path`. `bytes` counts the model file and its external weight files."""

    path: Path
    proto: onnx.ModelProto = field(repr=False)
    bytes: int

    @cached_property
    def nodes(self) -> tuple[Node, ...]:
        return tuple(
            Node(
                n.name,
                n.op_type,
                n.domain,
                tuple(n.input),
                tuple(n.output),
                {a.name: helper.get_attribute_value(a) for a in n.attribute},
            )
            for n in self.proto.graph.node
        )

    @cached_property
    def by_name(self) -> dict[str, Node]:
        return {node.name: node for node in self.nodes}

    @cached_property
    def operators(self) -> Counter[str]:
        """Number of calls of each operator."""
        return Counter(node.full_name for node in self.nodes)

    @property
    def opsets(self) -> dict[str, int]:
        """Version by domain. The standard's domain is called ai.onnx."""
        return {o.domain or "ai.onnx": o.version for o in self.proto.opset_import}

    @property
    def metadata(self) -> dict[str, str]:
        return {p.key: p.value for p in self.proto.metadata_props}

    @cached_property
    def inputs(self) -> tuple[Value, ...]:
        """Inputs that a call must give."""
        return tuple(_value(v) for v in self.proto.graph.input if v.name not in self.tensors)

    @cached_property
    def optional_inputs(self) -> tuple[Value, ...]:
        """Inputs with a tensor of their name, which stands for a value that a call leaves out."""
        return tuple(_value(v) for v in self.proto.graph.input if v.name in self.tensors)

    @cached_property
    def outputs(self) -> tuple[Value, ...]:
        return tuple(_value(v) for v in self.proto.graph.output)

    @cached_property
    def tensors(self) -> dict[str, TensorProto]:
        """Weights and constants by name. External tensors come without their content."""
        return {t.name: t for t in self.proto.graph.initializer}

    @property
    def external_files(self) -> list[str]:
        return sorted({_location(t) for t in self.tensors.values() if _is_external(t)})

    def tensor(self, name: str) -> TensorProto:
        """The tensor `name`. Raises BundleError if there is none."""
        if name not in self.tensors:
            raise _bad(self.path, f"no tensor {name!r:.80}")
        return self.tensors[name]

    def bits(self, name: str) -> int:
        """Number of bits of one element of a tensor."""
        kind = self.tensor(name).data_type
        return 4 if kind in _PACKED else 8 * int(helper.tensor_dtype_to_np_dtype(kind).itemsize)

    def place(self, name: str) -> tuple[str, int, int]:
        """Location of a tensor: (file, offset, bytes). The file is empty for a tensor inside the model.

        Raises BundleError if the location is invalid.
        """
        tensor = self.tensor(name)
        if not _is_external(tensor):
            return "", 0, _nbytes(tensor)
        entries = {e.key: e.value for e in tensor.external_data}
        try:
            offset, length = int(entries.get("offset", "0")), int(entries.get("length", str(_nbytes(tensor))))
        except ValueError as error:
            raise _bad(self.path, f"{name}: its place is {entries!r:.100}") from error
        file = self.path.parent / _location(tensor)
        if offset < 0 or length != _nbytes(tensor) or offset + length > file.stat().st_size:
            raise _bad(
                self.path,
                f"{name}: {length} bytes at {offset} of {file.name} are not where its values can lie",
            )
        return file.name, offset, length

    def array(self, name: str) -> np.ndarray:
        """Values of a tensor. int4 becomes one int8 per number. Raises BundleError if it cannot be read."""
        tensor = self.tensor(name)
        file, offset, length = self.place(name)
        if not file:
            try:
                return onnx.numpy_helper.to_array(tensor)
            except (ValueError, TypeError) as error:
                raise _bad(self.path, f"{name}: {error}") from error
        with (self.path.parent / file).open("rb") as stream:
            stream.seek(offset)
            raw = np.frombuffer(stream.read(length), np.uint8)
        if tensor.data_type in _PACKED:
            return _unpacked(raw, tuple(tensor.dims), signed=tensor.data_type == TensorProto.INT4)
        return raw.view(helper.tensor_dtype_to_np_dtype(tensor.data_type)).reshape(tuple(tensor.dims))


def read_onnx(path: Path) -> OnnxFile:
    """Reads a .onnx file, or the model.onnx in a directory. Raises BundleError if it is not a valid model."""
    file = path / MODEL_FILE if path.is_dir() else path
    if path.is_dir() and (why := strange_file(file)) is not None:
        raise _bad(file, f"this is {why}")
    try:
        size = file.stat().st_size
        if size > _LARGEST:
            raise _bad(file, f"{size} bytes, and no ONNX model has more than {_LARGEST}")
        proto = onnx.ModelProto.FromString(file.read_bytes())
    except OSError as error:
        raise BundleError(f"{file}: {error.strerror}", remedy="Check the path.") from error
    except (DecodeError, RecursionError) as error:
        raise _bad(file, f"not an ONNX model ({error})") from error
    if not proto.graph.node:
        raise _bad(file, "not an ONNX model (no operator in it)")
    _check_texts(file, proto)
    model = OnnxFile(file, proto, size)
    external_bytes = 0
    for tensor in proto.graph.initializer:
        if not 0 < tensor.data_type <= max(TensorProto.DataType.values()) or any(d < 0 for d in tensor.dims):
            raise _bad(file, f"{tensor.name!r:.80}: no tensor of ONNX (type {tensor.data_type})")
    for name in model.external_files:
        target = file.parent / name
        if Path(name).name != name or name in ("", ".", "..") or target.is_symlink() or not target.is_file():
            raise _bad(file, f"weights in {name!r:.80}, which is no plain file beside it")
        external_bytes += target.stat().st_size
    for name in model.tensors:
        model.place(name)
    return OnnxFile(file, proto, size + external_bytes)


def read_bytes(file: OnnxFile, name: str) -> bytes:
    """Bytes of a tensor as stored: those of the data file, or of the message."""
    place, offset, length = file.place(name)
    if not place:
        tensor = file.tensor(name)
        return bytes(tensor.raw_data) or bytes(tensor.SerializeToString(deterministic=True))
    with (file.path.parent / place).open("rb") as stream:
        stream.seek(offset)
        return stream.read(length)


def _check_texts(file: Path, message: Any) -> None:
    """Raises BundleError for text that is not UTF-8. protobuf leaves it as bytes, which equal no name."""
    for kind, value in message.ListFields():
        if kind.type not in (kind.TYPE_STRING, kind.TYPE_MESSAGE):
            continue
        single = isinstance(value, (str, bytes)) or hasattr(value, "ListFields")
        for part in [value] if single else value:
            if kind.type == kind.TYPE_MESSAGE:
                _check_texts(file, part)
            elif not isinstance(part, str):
                raise _bad(file, f"{part!r:.80} in it is not UTF-8")


def _is_external(tensor: TensorProto) -> bool:
    return bool(tensor.data_location == TensorProto.EXTERNAL)


def _location(tensor: TensorProto) -> str:
    return next((str(e.value) for e in tensor.external_data if e.key == "location"), "")


def _nbytes(tensor: TensorProto) -> int:
    count: int = math.prod(tensor.dims)
    if tensor.data_type in _PACKED:
        return -(-count // _PACKED[tensor.data_type])
    try:
        size: int = count * helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    except KeyError:
        return 0
    return size


def _unpacked(raw: np.ndarray, shape: tuple[int, ...], *, signed: bool) -> np.ndarray:
    """int8 numbers from bytes that hold two each, the first in the low bits."""
    nibbles = np.stack([raw & 0xF, raw >> 4], axis=-1).reshape(-1)[: math.prod(shape)].astype(np.int8)
    if signed:
        nibbles = np.where(nibbles > 7, nibbles - 16, nibbles).astype(np.int8)
    return nibbles.reshape(shape)


def _value(value: onnx.ValueInfoProto) -> Value:
    tensor = value.type.tensor_type
    try:
        dtype = str(helper.tensor_dtype_to_np_dtype(tensor.elem_type))
    except KeyError:
        dtype = "none"
    shape = tuple(d.dim_param or d.dim_value for d in tensor.shape.dim)
    return Value(value.name, dtype, shape)


def _bad(path: Path, what: str) -> BundleError:
    return BundleError(f"{path}: {what}", remedy=_REMEDY)


MODEL_FILE = "model.onnx"
