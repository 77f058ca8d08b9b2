"""Listing of a Core ML package: interface and operators of every function, constants by content."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from edgellama.formats.listing import Item, Listing, digest
from edgellama.formats.mlpackage import Constant, Function, MlPackage, Operation, load_spec, read_mlpackage

_SMALL = 16  # elements of a constant that is listed by value
_TOOL = "com.github.apple.coremltools."  # metadata about the tool that wrote the package


def list_mlpackage(path: Path) -> Listing:
    """The listing of the package at `path`. Raises BundleError if it is not readable."""
    package = read_mlpackage(path)
    return [
        *_package(package, load_spec(path)),
        *itertools.chain.from_iterable(_Function(f).items() for f in package.functions),
    ]


def _package(package: MlPackage, spec: Any) -> Iterator[Item]:
    user = {k: v for k, v in package.user_defined.items() if not k.startswith(_TOOL)}
    blocks = {name: sorted(f.block_specializations) for name, f in sorted(spec.mlProgram.functions.items())}
    yield Item(
        "the package",
        "package",
        {
            "specification": str(package.specification),
            "default function": package.default_function,
            "functions and blocks": str(blocks),
            **{f"metadata {key}": value for key, value in sorted((dict(package.metadata) | user).items())},
        },
    )


class _Function:
    """Entries of one function. Values get numbers in order of their computation; names of inputs stay."""

    def __init__(self, function: Function) -> None:
        self.function = function
        self.numbers: dict[str, str] = {}
        self.outputs = {o.name for o in function.outputs}
        self.read = {argument for op in function.operations for argument in op.arguments}

    def items(self) -> Iterator[Item]:
        function = self.function
        place = f"function {function.name}"
        yield Item(
            place,
            "function",
            {
                "name": function.name,
                "opset": function.opset,
                "inputs": str(function.inputs),
                "outputs": str(function.outputs),
                "states": str(function.states),
            },
        )
        number = 0
        for op in function.operations:
            if op.type == "const":
                unused = not self.read & op.outputs.keys() and not self.outputs & op.outputs.keys()
                if unused:
                    yield Item(f"unused constant {op.name!r} of {function.name}", "const", {})
                continue
            yield self._operator(op, f"operator {number} of {function.name} ({op.name})")
            number += 1

    def _operator(self, op: Operation, place: str) -> Item:
        fields = {key: ", ".join(map(self._text, values)) for key, values in op.inputs.items()}
        for name, (dtype, shape) in op.outputs.items():
            self.numbers[name] = name if name in self.outputs else f"%{len(self.numbers)}"
            fields[f"output {self.numbers[name]}"] = f"{dtype}{list(shape)}"
        return Item(place, op.type, fields)

    def _text(self, argument: str | Constant) -> str:
        if isinstance(argument, Constant):
            return _constant(argument)
        producer = self.function.producers.get(argument)
        if producer is not None and producer.value is not None:
            return _constant(producer.value)
        return self.numbers.get(argument, argument)


def _constant(constant: Constant) -> str:
    if constant.data is None and constant.offset is None:
        return "none"
    if isinstance(constant.data, str):
        return repr(constant.data)
    array = np.asarray(constant.array())
    shape = f"{constant.dtype}{list(constant.shape)}"
    if array.size <= _SMALL:
        return f"{shape} {array.tolist()}"
    return f"constant {digest(np.ascontiguousarray(array).tobytes())} {shape}"
