"""Reader of .mlpackage directories: functions, states, operators and every weight, as stored on disk.

It reads the protobuf messages, which are Core ML's published format and which coremltools ships. It executes
nothing. Weights stay in their file until `Constant.array` reads one.
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
from edgellama.files import is_left_by_a_file_manager, strange_file
from edgellama.formats.mlpackage_tensor import REMEDY, Array, Constant, check_stored, tensor_of, type_of
from edgellama.formats.mlpackage_weights import Operation, Weight, weights_of

__all__ = [
    "MINIMUM_OS",
    "OPSETS",
    "Array",
    "Constant",
    "Feature",
    "Function",
    "MlPackage",
    "Operation",
    "Weight",
    "load_spec",
    "read_mlpackage",
]

# Specification version -> (iOS, macOS). OPSETS: opset -> specification version (coremltools.target).
MINIMUM_OS = {6: ("15", "12"), 7: ("16", "13"), 8: ("17", "14"), 9: ("18", "15"), 10: ("26", "26")}
_ARRAYS = {65568: "float32", 65552: "float16", 65600: "float64", 131104: "int32", 131080: "int8"}
_DAMAGES = (KeyError, ValueError, IndexError, TypeError, AttributeError, RecursionError, StopIteration)
OPSETS = {"CoreML5": 6, "CoreML6": 7, "CoreML7": 8, "CoreML8": 9, "CoreML9": 10}


@dataclass(frozen=True)
class Feature:
    """An input, output or state.

    Attributes:
        shape: Sizes, or (low, high) for a variable size. May be empty for an output.
        shapes: The only allowed shapes, if the package enumerates them.
    """

    name: str
    dtype: str
    shape: tuple[int | tuple[int, int], ...]
    description: str = ""
    shapes: tuple[tuple[int, ...], ...] = ()


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

    @cached_property
    def _readers(self) -> dict[str, list[Operation]]:
        readers: dict[str, list[Operation]] = {}
        for op in self.operations:
            for argument in dict.fromkeys(op.arguments):
                readers.setdefault(argument, []).append(op)
        return readers

    def consumers(self, value: str) -> list[Operation]:
        """Operators that read a value, in order."""
        return self._readers.get(value, [])

    @cached_property
    def weights(self) -> dict[str, Weight]:
        """Weights by output name: results of constexprs for other operators, and large constants."""
        return weights_of(self.operations)

    @property
    def minimum_os(self) -> dict[str, str]:
        """iOS and macOS versions that the opset needs, even if the package declares others."""
        return _minimum_os(OPSETS.get(self.opset, 0))


@dataclass(frozen=True)
class MlPackage:
    """Contents of a package, except the weights themselves, which `Constant.array` reads.

    Attributes:
        bytes: Size of all files.
        model_bytes: Size of the model file.
        weight_bytes: Size of the weight files that constants refer to.
    """

    path: Path
    specification: int
    default_function: str
    functions: tuple[Function, ...]
    metadata: Mapping[str, str]
    user_defined: Mapping[str, str]
    bytes: int
    model_bytes: int
    weight_bytes: int

    @property
    def minimum_os(self) -> dict[str, str]:
        """iOS and macOS versions that the specification version and all opsets need."""
        return _minimum_os(max([self.specification, *(OPSETS.get(f.opset, 0) for f in self.functions)]))

    @cached_property
    def operators(self) -> Counter[str]:
        """Number of calls by operator type, over all functions and without constants."""
        return Counter(op.type for f in self.functions for op in f.operations if op.type != "const")

    @cached_property
    def weights(self) -> list[Weight]:
        """Weights of all functions. Weights of several functions at the same places in a file count once."""
        unique: dict[Any, Weight] = {}
        for function in self.functions:
            for weight in function.weights.values():
                shared = any(t.offset is not None for t in weight.parts.values())
                owner = "" if shared else (function.name, weight.name)
                unique.setdefault((owner, weight.place), weight)
        return list(unique.values())

    def function(self, name: str) -> Function:
        return next(f for f in self.functions if f.name == name)


def load_spec(path: Path) -> Any:
    """The Model message of the package at `path`. Raises BundleError if it cannot be read."""
    return _parsed(path, _model_file(path))


def read_mlpackage(path: Path) -> MlPackage:
    """Reads the package at `path`. Raises BundleError unless it is complete and holds an ML Program."""
    model = _model_file(path)
    spec = _parsed(path, model)
    kind = spec.WhichOneof("Type")
    if kind != "mlProgram":
        raise BundleError(
            f"{path}: a {kind or 'model without content'}, not an ML Program",
            remedy="Convert the model with minimum_deployment_target iOS 15 or later.",
        )
    description, metadata = spec.description, spec.description.metadata
    interfaces = {f.name: f for f in description.functions} or {"main": description}
    try:
        functions = tuple(
            _function(name, interfaces[name], message, model.parent)
            for name, message in sorted(spec.mlProgram.functions.items())
        )
        if not functions:
            raise ValueError("no function")
        tensors = [t for function in functions for op in function.operations for t in _tensors(op)]
    except _DAMAGES as error:
        raise BundleError(f"{path}: its program is damaged ({error!r:.160})", remedy=REMEDY) from error
    check_stored(tensors)
    files = (p for p in path.rglob("*") if p.is_file() and not is_left_by_a_file_manager(p))
    sizes = {p: p.stat().st_size for p in files}
    return MlPackage(
        path,
        spec.specificationVersion,
        description.defaultFunctionName or functions[0].name,
        functions,
        {
            "author": metadata.author,
            "license": metadata.license,
            "version": metadata.versionString,
            "description": metadata.shortDescription,
        },
        dict(metadata.userDefined),
        sum(sizes.values()),
        sizes[model],
        sum(sizes.get(file, 0) for file in {t.weights for t in tensors if t.offset is not None}),
    )


def _model_file(path: Path) -> Path:
    """The model file that Manifest.json names. Raises BundleError for a bad manifest or for any link."""
    file: Path
    for inside in sorted(path.rglob("*")):
        if (why := strange_file(inside, links=False)) is not None:
            raise BundleError(
                f"{path}: {inside.relative_to(path)} in it is {why}", remedy="Copy the package with cp -RL."
            )
    try:
        manifest = json.loads((path / "Manifest.json").read_text(encoding="utf-8"))
        file = path / "Data" / manifest["itemInfoEntries"][manifest["rootModelIdentifier"]]["path"]
    except OSError as error:
        raise BundleError(
            f"{path}: not an .mlpackage: Manifest.json cannot be read ({error.strerror})",
            remedy="Give the directory NAME.mlpackage itself, copied as a whole.",
        ) from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise BundleError(
            f"{path}: its Manifest.json names no model ({error!r:.80})", remedy=REMEDY
        ) from error
    if not file.resolve().is_relative_to(path.resolve()):
        raise BundleError(f"{path}: its Manifest.json names a file outside of it", remedy=REMEDY)
    return file


def _parsed(path: Path, model: Path) -> Any:
    from coremltools.proto import Model_pb2

    spec = Model_pb2.Model()
    try:
        spec.ParseFromString(model.read_bytes())
    except OSError as error:
        raise BundleError(f"{model}: {error.strerror}", remedy=REMEDY) from error
    except Exception as error:  # protobuf's DecodeError has a different base class in each version
        raise BundleError(f"{path}: its model is damaged ({error})", remedy=REMEDY) from error
    return spec


def _function(name: str, interface: Any, message: Any, root: Path) -> Function:
    """root: the directory of the model file."""
    if message.opset not in message.block_specializations:
        raise ValueError(f"function {name} has no block for its opset {message.opset!r}")
    block = message.block_specializations[message.opset]
    _check_order(block, {x.name for x in message.inputs})
    function = Function(
        name,
        message.opset,
        tuple(_feature(x, x.type.multiArrayType) for x in interface.input),
        tuple(_feature(x, x.type.multiArrayType) for x in interface.output),
        tuple(_feature(x, x.type.stateType.arrayType) for x in interface.state),
        tuple(_operation(op, root) for op in _flat(block)),
    )
    _ = function.weights  # raises here for damaged weights
    return function


def _tensors(op: Operation) -> Iterator[Constant]:
    if op.value is not None:
        yield op.value
    for arguments in op.inputs.values():
        yield from (a for a in arguments if isinstance(a, Constant))


def _flat(block: Any) -> Iterator[Any]:
    for op in block.operations:
        yield op
        for inner in op.blocks:
            yield from _flat(inner)


def _check_order(block: Any, known: set[str]) -> None:
    """Raises ValueError for a value that is read before it is computed, or computed twice.

    Walks along the values therefore come to an end.
    """
    for op in block.operations:
        for name in (a.name for argument in op.inputs.values() for a in argument.arguments):
            if name and name not in known:
                raise ValueError(f"{op.type} reads {name!r}, which nothing before it computes")
        for inner in op.blocks:
            _check_order(inner, known | {x.name for x in inner.inputs})
        outputs = {output.name for output in op.outputs}
        if outputs & known:
            raise ValueError(f"{op.type} computes {min(outputs & known)!r} again")
        known |= outputs


def _operation(op: Any, root: Path) -> Operation:
    inputs = {
        key: tuple(
            a.name if a.WhichOneof("binding") == "name" else tensor_of(a.value, root)
            for a in argument.arguments
        )
        # Sorted because protobuf's maps have a different order in each process.
        for key, argument in sorted(op.inputs.items())
    }
    attributes = {k: tensor_of(v, root) for k, v in sorted(op.attributes.items())}
    name, value = attributes.pop("name", None), attributes.pop("val", None)
    if op.type == "const" and value is None:
        raise ValueError("a constant without value")
    inputs |= {key: (tensor,) for key, tensor in attributes.items()}  # iOS 16 constexprs have attributes
    label = str(name.data) if name is not None else ""
    return Operation(op.type, label, inputs, {o.name: type_of(o.type) for o in op.outputs}, value)


def _feature(message: Any, array: Any) -> Feature:
    kind = message.type.WhichOneof("Type") or "unknown"
    if kind not in ("multiArrayType", "stateType"):
        return Feature(message.name, kind.removesuffix("Type"), (), message.shortDescription)
    dtype = _ARRAYS.get(array.dataType, "unknown")
    shape: tuple[int | tuple[int, int], ...] = tuple(int(n) for n in array.shape)
    shapes: tuple[tuple[int, ...], ...] = ()
    flexibility = array.WhichOneof("ShapeFlexibility")
    if flexibility == "shapeRange":
        ranges = [(int(r.lowerBound), int(r.upperBound)) for r in array.shapeRange.sizeRanges]
        shape = tuple(low if low == high else (low, high) for low, high in ranges)
    elif flexibility == "enumeratedShapes":
        shapes = tuple(tuple(int(n) for n in s.shape) for s in array.enumeratedShapes.shapes)
        columns = [(min(sizes), max(sizes)) for sizes in zip(*shapes, strict=True)]
        shape = tuple(low if low == high else (low, high) for low, high in columns)
    return Feature(message.name, dtype, shape, message.shortDescription, shapes)


def _minimum_os(version: int) -> dict[str, str]:
    ios, macos = MINIMUM_OS.get(version, ("?", "?"))
    return {"ios": ios, "macos": macos}
