"""An .mlpackage taken apart: functions, states, operators and every weight, as they lie on disk.

Read at the level of the protobuf messages, which are Core ML's published format.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from edgellama.errors import BundleError
from edgellama.mlpackage_tensor import BITS, REMEDY, read_tensor, read_type
from edgellama.mlpackage_weights import Operation, Weight, constexpr

WEIGHTS = Path("Data/com.apple.CoreML/weights")
_ROOT = Path("Data")

MINIMUM_OS = {6: ("15", "12"), 7: ("16", "13"), 8: ("17", "14"), 9: ("18", "15"), 10: ("26", "26")}


def load_spec(path: Path) -> Any:
    """The Model message of the package at `path`. Raises BundleError."""
    from coremltools.proto import Model_pb2

    try:
        if any(p.is_symlink() for p in (path, *path.rglob("*"))):
            raise BundleError(f"{path}: a symbolic link in it", remedy=REMEDY)
        manifest = json.loads((path / "Manifest.json").read_text(encoding="utf-8"))
        item = manifest["itemInfoEntries"][manifest["rootModelIdentifier"]]
        file = path / _ROOT / item["path"]
        if not file.resolve().is_relative_to(path.resolve()):
            raise BundleError(f"{path}: its Manifest.json names a file outside", remedy=REMEDY)
        spec = Model_pb2.Model()
        spec.ParseFromString(file.read_bytes())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BundleError(f"{path}: not a readable .mlpackage ({error!r:.160})", remedy=REMEDY) from error
    except Exception as error:  # protobuf's DecodeError, which has another base in each of its versions
        raise BundleError(f"{path}: its model is damaged ({error})", remedy=REMEDY) from error
    return spec


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
                weight = constexpr(op, self.producers)
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
                found[name] = Weight(name, "const", t.dtype, BITS[t.dtype], None, t.shape, {"val": t})
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
        raise BundleError(f"{path}: its program is damaged ({error!r:.160})", remedy=REMEDY) from error
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
            a.name if a.WhichOneof("binding") == "name" else read_tensor(a.value, weights)
            for a in argument.arguments
        )
        for key, argument in op.inputs.items()
    }
    attributes = {k: read_tensor(v, weights) for k, v in op.attributes.items() if k != "name"}
    value = attributes.pop("val", None)
    inputs |= {key: (tensor,) for key, tensor in attributes.items()}  # iOS 16 constexprs have attributes
    name = op.attributes["name"].immediateValue.tensor.strings.values[0] if "name" in op.attributes else ""
    return Operation(op.type, name, inputs, {o.name: read_type(o.type) for o in op.outputs}, value)


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
