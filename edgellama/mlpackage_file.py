"""An .mlpackage taken apart: functions, states, operators and every weight, as they lie on disk.

Read at the level of the protobuf messages, which are Core ML's published format; weights are read one at a time from
weight.bin. coremltools 9.0 ships the messages and, as the internal `libmilstoragepython`, the reader of weight.bin.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgellama.errors import BundleError

WEIGHTS = Path("Data/com.apple.CoreML/weights")
_ROOT = Path("Data")
_REMEDY = "Export the package again, or copy it again as a whole."
Array = npt.NDArray[Any]

# DataType of MIL.proto -> name, bits
DTYPES: Mapping[int, tuple[str, int]] = {
    1: ("bool", 8),
    2: ("string", 0),
    10: ("float16", 16),
    11: ("float32", 32),
    12: ("float64", 64),
    21: ("int8", 8),
    22: ("int16", 16),
    23: ("int32", 32),
    24: ("int64", 64),
    25: ("int4", 4),
    31: ("uint8", 8),
    32: ("uint16", 16),
    33: ("uint32", 32),
    34: ("uint64", 64),
    35: ("uint4", 4),
    36: ("uint2", 2),
    37: ("uint1", 1),
    38: ("uint6", 6),
    39: ("uint3", 3),
}
_READERS = {
    "float16": "read_fp16_data",
    "float32": "read_float_data",
    **{n: f"read_{n}_data" for n in ("int4", "int8", "int16", "int32", "uint8", "uint16", "uint32")},
    **{n: f"read_{n}_data" for n in ("uint1", "uint2", "uint3", "uint4", "uint6")},
}
MINIMUM_OS = {6: ("15", "12"), 7: ("16", "13"), 8: ("17", "14"), 9: ("18", "15"), 10: ("26", "26")}


def load_spec(path: Path) -> Any:
    """The Model message of the package at `path`. Raises BundleError."""
    from coremltools.proto import Model_pb2

    try:
        if any(p.is_symlink() for p in (path, *path.rglob("*"))):
            raise BundleError(f"{path}: a symbolic link in it", remedy=_REMEDY)
        manifest = json.loads((path / "Manifest.json").read_text(encoding="utf-8"))
        item = manifest["itemInfoEntries"][manifest["rootModelIdentifier"]]
        file = path / _ROOT / item["path"]
        if not file.resolve().is_relative_to(path.resolve()):
            raise BundleError(f"{path}: its Manifest.json names a file outside", remedy=_REMEDY)
        spec = Model_pb2.Model()
        spec.ParseFromString(file.read_bytes())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BundleError(f"{path}: not a readable .mlpackage ({error!r:.160})", remedy=_REMEDY) from error
    except Exception as error:  # protobuf's DecodeError, which has another base in each of its versions
        raise BundleError(f"{path}: its model is damaged ({error})", remedy=_REMEDY) from error
    return spec


@dataclass(frozen=True)
class Tensor:
    """A constant. data: what was stored inline, or None for what lies in weight.bin at `offset`."""

    dtype: str
    shape: tuple[int, ...]
    offset: int | None
    data: Array | str | None = field(repr=False)
    weights: Path = field(repr=False)

    @property
    def nbytes(self) -> int:
        """Bytes as stored; sub-byte types are packed."""
        bits = dict(DTYPES.values())[self.dtype]
        return -(-int(np.prod(self.shape, dtype=np.int64)) * bits // 8)

    def array(self) -> Array:
        """The values; int4 and narrower as int8 or uint8. Raises BundleError for a damaged weight.bin."""
        if isinstance(self.data, np.ndarray):
            return self.data
        from coremltools.libmilstoragepython import _BlobStorageReader

        try:
            reader = _BlobStorageReader(str(self.weights / "weight.bin"))
            raw = np.asarray(getattr(reader, _READERS[self.dtype])(self.offset))
            if self.dtype == "float16":
                raw = raw.view(np.float16)
            elif self.dtype.startswith(("int4", "uint1", "uint2", "uint3", "uint4", "uint6")) and (
                self.dtype not in ("uint16", "uint32")
            ):
                raw = raw.astype(np.int8 if self.dtype == "int4" else np.uint8)
            return raw.reshape(self.shape)
        except (RuntimeError, ValueError, KeyError) as error:
            raise BundleError(
                f"{self.weights}: weight.bin is damaged at {self.offset} ({error})", remedy=_REMEDY
            ) from error


@dataclass(frozen=True)
class Operation:
    """One operator. inputs: names of values, or constants in place. outputs: name -> (dtype, shape; None varies)."""

    type: str
    name: str
    inputs: Mapping[str, tuple[str | Tensor, ...]]
    outputs: Mapping[str, tuple[str, tuple[int | None, ...]]]
    value: Tensor | None = None

    @cached_property
    def arguments(self) -> tuple[str, ...]:
        """Names of the values that it reads."""
        return tuple(a for group in self.inputs.values() for a in group if isinstance(a, str))


@dataclass(frozen=True)
class Weight:
    """What one const or constexpr stores. parts: its tensors by parameter name (`data`, `scale`, `val`, …)."""

    name: str
    type: str
    scheme: str
    bits: int
    group_size: int | None
    shape: tuple[int, ...]
    parts: Mapping[str, Tensor]

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts.values())


@dataclass(frozen=True)
class Feature:
    """An input, output or state. shape: sizes, or (low, high) where they vary; an output may have none."""

    name: str
    dtype: str
    shape: tuple[int | tuple[int, int], ...]
    description: str = ""


@dataclass(frozen=True)
class Function:
    """A function and its operators, in order."""

    name: str
    opset: str
    inputs: tuple[Feature, ...]
    outputs: tuple[Feature, ...]
    states: tuple[Feature, ...]
    operations: tuple[Operation, ...] = field(repr=False)

    @cached_property
    def producers(self) -> dict[str, Operation]:
        return {output: op for op in self.operations for output in op.outputs}

    def consumers(self, value: str) -> list[Operation]:
        return [op for op in self.operations if value in op.arguments]

    @cached_property
    def weights(self) -> dict[str, Weight]:
        """By output name: every constexpr, and every const that lies in weight.bin and belongs to no constexpr."""
        found: dict[str, Weight] = {}
        inside: set[str] = set()
        for op in self.operations:
            if op.type.startswith("constexpr"):
                weight = _constexpr(op, self.producers)
                found[weight.name] = weight
                inside.update(op.arguments)
        for op in self.operations:
            name = next(iter(op.outputs), "")
            if (
                op.type == "const"
                and op.value is not None
                and op.value.offset is not None
                and name not in inside
            ):
                t = op.value
                found[name] = Weight(
                    name, "const", t.dtype, dict(DTYPES.values())[t.dtype], None, t.shape, {"val": t}
                )
        return found


@dataclass(frozen=True)
class MlPackage:
    """Everything but the weights themselves, which `Tensor.array` reads. bytes: of all files."""

    path: Path
    specification: int
    default_function: str
    functions: tuple[Function, ...]
    metadata: Mapping[str, str]
    user_defined: Mapping[str, str]
    bytes: int
    model_bytes: int
    weight_bytes: int

    @cached_property
    def minimum_os(self) -> dict[str, str]:
        ios, macos = MINIMUM_OS.get(self.specification, ("?", "?"))
        return {"ios": ios, "macos": macos}

    @cached_property
    def operators(self) -> Counter[str]:
        """Calls by type, of all functions; constants left out."""
        return Counter(op.type for f in self.functions for op in f.operations if op.type != "const")

    @cached_property
    def weights(self) -> list[Weight]:
        """Of all functions, what several share counted once."""
        unique: dict[Any, Weight] = {}
        for function in self.functions:
            for weight in function.weights.values():
                places = tuple(sorted((n, t.offset) for n, t in weight.parts.items() if t.offset is not None))
                unique.setdefault(places or (function.name, weight.name), weight)
        return list(unique.values())

    def function(self, name: str) -> Function:
        return next(f for f in self.functions if f.name == name)


def read_mlpackage(path: Path) -> MlPackage:
    """The package at `path`. Raises BundleError for anything that is not an ML Program in an .mlpackage."""
    spec = load_spec(path)
    if spec.WhichOneof("Type") != "mlProgram":
        raise BundleError(
            f"{path}: a {spec.WhichOneof('Type') or 'model without content'}, not an ML Program",
            remedy="Convert the model with minimum_deployment_target iOS 15 or later.",
        )
    description = spec.description
    interfaces = {f.name: f for f in description.functions} or {"main": description}
    try:
        functions = tuple(
            _function(name, interfaces[name], message, path / WEIGHTS)
            for name, message in sorted(spec.mlProgram.functions.items())
        )
    except (KeyError, ValueError, StopIteration) as error:
        raise BundleError(f"{path}: its program is damaged ({error!r:.160})", remedy=_REMEDY) from error
    metadata = description.metadata
    sizes = {p.name: p.stat().st_size for p in path.rglob("*") if p.is_file()}
    return MlPackage(
        path,
        spec.specificationVersion,
        description.defaultFunctionName or next(iter(interfaces)),
        functions,
        {
            "author": metadata.author,
            "license": metadata.license,
            "version": metadata.versionString,
            "description": metadata.shortDescription,
        },
        dict(metadata.userDefined),
        sum(sizes.values()),
        sizes.get("model.mlmodel", 0),
        sizes.get("weight.bin", 0),
    )


def _function(name: str, interface: Any, message: Any, weights: Path) -> Function:
    block = message.block_specializations[message.opset]
    return Function(
        name,
        message.opset,
        tuple(_feature(x, x.type.multiArrayType) for x in interface.input),
        tuple(_feature(x, x.type.multiArrayType) for x in interface.output),
        tuple(_feature(x, x.type.stateType.arrayType) for x in interface.state),
        tuple(_operation(op, weights) for op in _flat(block)),
    )


def _flat(block: Any) -> Iterator[Any]:
    for op in block.operations:
        yield op
        for inner in op.blocks:
            yield from _flat(inner)


def _operation(op: Any, weights: Path) -> Operation:
    inputs = {
        key: tuple(
            a.name if a.WhichOneof("binding") == "name" else _tensor(a.value, weights)
            for a in argument.arguments
        )
        for key, argument in op.inputs.items()
    }
    attributes = {k: _tensor(v, weights) for k, v in op.attributes.items() if k != "name"}
    value = attributes.pop("val", None)
    inputs |= {key: (tensor,) for key, tensor in attributes.items()}  # iOS 16 constexprs have attributes
    name = op.attributes["name"].immediateValue.tensor.strings.values[0] if "name" in op.attributes else ""
    return Operation(op.type, name, inputs, {o.name: _type(o.type) for o in op.outputs}, value)


def _type(message: Any) -> tuple[str, tuple[int | None, ...]]:
    if message.WhichOneof("type") == "stateType":
        message = message.stateType.wrappedType
    if message.WhichOneof("type") != "tensorType":
        return message.WhichOneof("type") or "?", ()
    t = message.tensorType
    shape = tuple(d.constant.size if d.WhichOneof("dimension") == "constant" else None for d in t.dimensions)
    return DTYPES[t.dataType][0], shape


def _tensor(value: Any, weights: Path) -> Tensor:
    dtype, dims = _type(value.type)
    shape = tuple(int(n or 0) for n in dims)
    if value.WhichOneof("value") == "blobFileValue":
        return Tensor(dtype, shape, value.blobFileValue.offset, None, weights)
    return Tensor(dtype, shape, None, _immediate(value.immediateValue.tensor, dtype, shape), weights)


def _immediate(tensor: Any, dtype: str, shape: tuple[int, ...]) -> Array | str | None:
    kind = tensor.WhichOneof("value")
    if kind is None:
        return None
    values = getattr(tensor, kind).values
    if kind == "strings":
        return str(values[0]) if len(values) else ""
    if kind == "bytes":
        if dtype == "float16":
            return np.frombuffer(values, np.float16).reshape(shape)
        width = dict(DTYPES.values())[dtype]
        if width < 8:
            bits = np.unpackbits(np.frombuffer(values, np.uint8), bitorder="little")
            count = int(np.prod(shape, dtype=np.int64))
            numbers = bits[: count * width].reshape(count, width) @ (1 << np.arange(width))
            if dtype == "int4":
                numbers = (numbers + 8) % 16 - 8
            return numbers.astype(np.int8).reshape(shape)
        return np.frombuffer(values, np.dtype(dtype)).reshape(shape)
    return np.array(values, dtype=np.dtype(dtype)).reshape(shape)


def _constexpr(op: Operation, producers: Mapping[str, Operation]) -> Weight:
    parts: dict[str, Tensor] = {}
    for key, (argument, *_) in op.inputs.items():
        if isinstance(argument, Tensor):
            parts[key] = argument
        elif (source := producers[argument]).value is not None:
            parts[key] = source.value
    name, (_, shape) = next(iter(op.outputs.items()))
    full = tuple(int(n or 0) for n in shape)
    scheme, bits, group = _scheme(op.type, parts, full)
    stored = {
        k: t for k, t in parts.items() if t.data is None or (isinstance(t.data, np.ndarray) and t.shape)
    }
    return Weight(name, op.type, scheme, bits, group, full, stored)


def _scheme(kind: str, parts: Mapping[str, Tensor], shape: tuple[int, ...]) -> tuple[str, int, int | None]:
    """In words, bits a weight, and the size of a group along the last axis (None: whole rows or the whole tensor)."""
    bits_of = dict(DTYPES.values())
    if "data" in parts and "scale" in parts:
        data, scale = parts["data"], parts["scale"]
        bits, columns = bits_of[data.dtype], shape[-1] if shape else 1
        groups = scale.shape[-1] if scale.shape else 1
        if groups > 1 and len(shape) > 1:
            return f"{data.dtype} g{columns // groups}", bits, columns // groups
        rows = any(n > 1 for n in scale.shape)
        return f"{data.dtype} {'channel' if rows else 'tensor'}", bits, None
    if "lut" in parts:
        entries = parts["lut"].shape[-2] if len(parts["lut"].shape) > 1 else parts["lut"].shape[0]
        bits = max(1, int(np.log2(entries)))
        return f"palettized {bits} bit", bits, None
    if "quantized_data" in parts:
        dtype = parts["quantized_data"].dtype
        return f"{dtype} {'channel' if parts['scale'].shape else 'tensor'}", bits_of[dtype], None
    if "nonzero_data" in parts:
        return "sparse", bits_of[parts["nonzero_data"].dtype], None
    return kind.removeprefix("constexpr_"), 16, None


def _feature(message: Any, array: Any) -> Feature:
    names = {65568: "float32", 65552: "float16", 65600: "float64", 131104: "int32", 131080: "int8"}
    shape: tuple[int | tuple[int, int], ...] = tuple(int(n) for n in array.shape)
    kind = array.WhichOneof("ShapeFlexibility")
    if kind == "shapeRange":
        ranges = [(int(r.lowerBound), int(r.upperBound)) for r in array.shapeRange.sizeRanges]
        shape = tuple(low if low == high else (low, high) for low, high in ranges)
    elif kind == "enumeratedShapes":
        sizes = zip(*(s.shape for s in array.enumeratedShapes.shapes), strict=True)
        shape = tuple(n[0] if min(n) == max(n) else (min(n), max(n)) for n in map(tuple, sizes))
    return Feature(message.name, names.get(array.dataType, "?"), shape, message.shortDescription)
