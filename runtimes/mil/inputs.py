"""Input checks of the reference interpreter: refuses, by name, the inputs that Core ML refuses."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from edgellama.errors import BundleError, UsageError
from edgellama.formats.mlpackage import Feature, Function, load_spec

Shapes = Mapping[tuple[str, str], frozenset[tuple[int, ...]]]
DTYPES = {
    "float16": torch.float16,
    "float32": torch.float32,
    "int32": torch.int32,
    "int16": torch.int16,
    "uint16": torch.int32,
    "int8": torch.int8,
    "uint8": torch.uint8,
    "bool": torch.bool,
}


def enumerated_shapes(path: Path) -> Shapes:
    """Returns the only allowed shapes, by (function, input). Inputs without a list are left out."""
    description = load_spec(path).description
    functions = {f.name: f for f in description.functions} or {"main": description}
    return {
        (name, x.name): frozenset(tuple(int(n) for n in s.shape) for s in listed)
        for name, function in functions.items()
        for x in function.input
        if (listed := x.type.multiArrayType.enumeratedShapes.shapes)
    }


def check_names(given: Iterable[str], function: Function, path: Path) -> None:
    """Raises UsageError for an input that is missing or not declared."""
    names, declared = set(given), [feature.name for feature in function.inputs]
    for name in (*sorted(set(declared) - names), *sorted(names - set(declared))):
        raise UsageError(
            f"{path}, function {function.name!r}: input {name!r} "
            f"{'is missing' if name in declared else 'is not declared'}",
            remedy=f"It takes: {', '.join(declared)}.",
        )


def check_input(value: Tensor, feature: Feature, listed: frozenset[tuple[int, ...]] | None) -> None:
    """Raises UsageError for a dtype or a shape that the package does not declare.

    listed: the only allowed shapes; None to use the feature's own shape or ranges.
    """
    ranges = [(n, n) if isinstance(n, int) else n for n in feature.shape]
    shape = tuple(value.shape)
    if listed:
        fits, declared = shape in listed, " or ".join(str(list(s)) for s in sorted(listed))
    else:
        fits = len(shape) == len(ranges) and all(
            low <= n and (n <= high or high < 0) for n, (low, high) in zip(shape, ranges, strict=True)
        )
        declared = ", ".join(str(low) if low == high else f"{low}..{high}" for low, high in ranges)
        declared = f"[{declared}]"
    if not fits:
        raise UsageError(
            f"input {feature.name!r} has the shape {list(shape)}, the package declares {declared}",
            remedy="Feed the declared shapes, or export the package with other ones.",
        )
    if value.dtype != DTYPES.get(feature.dtype):
        raise UsageError(
            f"input {feature.name!r} is {value.dtype}, the package declares {feature.dtype}",
            remedy="Convert it first; Core ML does not.",
        )


def check_state(state: Mapping[str, Tensor] | None, function: Function) -> None:
    """Raises UsageError for a state that the package's `make_state` cannot have made."""
    if function.states and state is None:
        raise UsageError(
            f"function {function.name!r} keeps a state", remedy="Pass one that make_state() made."
        )
    for feature in function.states:
        assert state is not None
        actual = list(state[feature.name].shape) if feature.name in state else None
        if actual != list(state_shape(feature)):
            raise UsageError(
                f"state {feature.name!r} {'is missing' if actual is None else f'has the shape {actual}'}, "
                f"the package declares {list(state_shape(feature))}",
                remedy="Pass one that make_state() of this model made.",
            )


def state_shape(feature: Feature) -> tuple[int, ...]:
    """Returns the shape of a state. Raises BundleError if it is flexible."""
    if not all(isinstance(n, int) for n in feature.shape):
        raise BundleError(
            f"state {feature.name!r} has no fixed shape", remedy="Core ML keeps states of fixed shapes only."
        )
    return tuple(n for n in feature.shape if isinstance(n, int))
