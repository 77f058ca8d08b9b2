"""Operators of an ML Program, and its weights as const and constexpr_* operators store them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from edgellama.formats.mlpackage_tensor import BITS, Constant

LARGE = 1024  # bytes from which a constant inside the program counts as a weight
_NUMBERS = ("axis", "shape", "vector_axis")  # constexpr arguments that are not part of a weight


@dataclass(frozen=True)
class Operation:
    """One operator.

    Attributes:
        inputs: Names of values, or inline constants, by parameter.
        outputs: (dtype, shape) by name; a size that varies is None.
    """

    type: str
    name: str
    inputs: Mapping[str, tuple[str | Constant, ...]]
    outputs: Mapping[str, tuple[str, tuple[int | None, ...]]]
    value: Constant | None = None

    @cached_property
    def arguments(self) -> tuple[str, ...]:
        """Names of the values that the operator reads."""
        return tuple(a for group in self.inputs.values() for a in group if isinstance(a, str))

    @property
    def is_constexpr(self) -> bool:
        return self.type.startswith("constexpr_")


@dataclass(frozen=True)
class Weight:
    """A weight as stored: a const, or a constexpr with all of its constants.

    Attributes:
        scheme: One or more of `float16`, `int4 g32`, `int8 channel`, `int8 tensor`, `palettized 4 bit` and
            `sparse`.
        bits: Bits of a code.
        group_size: Number of weights that share a scale; None for whole channels or the whole tensor.
        parts: Tensors by parameter (`val`; `data`, `scale`, `offset`; `indices`, `lut`; …). For a constexpr
            that feeds another one, the parameter that it feeds is a prefix (`data.indices`).
    """

    name: str
    type: str
    scheme: str
    bits: int
    group_size: int | None
    shape: tuple[int, ...]
    parts: Mapping[str, Constant]

    @property
    def place(self) -> tuple[tuple[str, int | bytes], ...]:
        """Offsets of parts in weight.bin, or bytes of inline parts. Only equal weights have equal places."""
        return tuple(
            (key, t.array().tobytes() if t.offset is None else t.offset)
            for key, t in sorted(self.parts.items())
        )

    @property
    def nbytes(self) -> int:
        """Bytes as stored. A part that is used twice counts once."""
        unique = {id(t) if t.offset is None else t.offset: t.nbytes for t in self.parts.values()}
        return sum(unique.values())


def weights_of(operations: Sequence[Operation]) -> dict[str, Weight]:
    """Weights by output name: results of constexprs for other operators, and large constants.

    Raises KeyError, ValueError or RecursionError for a damaged program.
    """
    producers = {output: op for op in operations for output in op.outputs}
    inside = {argument for op in operations if op.is_constexpr for argument in op.arguments}
    outside = {argument for op in operations if not op.is_constexpr for argument in op.arguments}
    weights: dict[str, Weight] = {}
    for op in operations:
        part = op.outputs.keys() & inside and not op.outputs.keys() & outside
        if part or not (op.is_constexpr or op.type == "const"):
            continue
        name, (_, dimensions) = next(iter(op.outputs.items()))
        shape = tuple(int(n or 0) for n in dimensions)
        if op.is_constexpr:
            parts = dict(_parts(op, producers))
            stored = {k: t for k, t in parts.items() if k.rpartition(".")[2] not in _NUMBERS}
            weights[name] = Weight(name, op.type, *_scheme(parts, shape), shape, stored)
        elif op.value is not None and (op.value.offset is not None or op.value.nbytes >= LARGE):
            value = op.value
            weights[name] = Weight(
                name, op.type, value.dtype, BITS[value.dtype], None, value.shape, {"val": value}
            )
    return weights


def _parts(
    op: Operation, producers: Mapping[str, Operation], prefix: str = ""
) -> Iterator[tuple[str, Constant]]:
    for key, arguments in op.inputs.items():
        for argument in arguments:
            if isinstance(argument, Constant):
                yield prefix + key, argument
                continue
            source = producers[argument]
            if source.value is not None:
                yield prefix + key, source.value
            elif source.is_constexpr:
                yield from _parts(source, producers, f"{prefix}{key}.")


def _scheme(parts: Mapping[str, Constant], shape: tuple[int, ...]) -> tuple[str, int, int | None]:
    """(scheme, bits, group size) of a constexpr, as in `Weight`."""
    names = {key.rpartition(".")[2]: tensor for key, tensor in parts.items()}
    words, bits, group = [], 16, None
    if any(name in names for name in ("mask", "data_mask", "indices_mask")):
        words.append("sparse")
        bits = BITS[names["nonzero_data"].dtype] if "nonzero_data" in names else bits
    if any("lut" in key.split(".") for key in parts):
        bits = _index_bits(names)
        words.append(f"palettized {bits} bit")
    codes = next((names[n] for n in ("data", "quantized_data", "nonzero_data") if n in names), None)
    scales = [t for key, t in parts.items() if key.endswith("scale") and "lut" not in key.split(".")]
    if scales:
        layout, group = _blocks(scales[0].shape, shape)
        if codes is not None and BITS[codes.dtype] <= 8 and not any("palettized" in w for w in words):
            bits = BITS[codes.dtype]
            words.append(f"{codes.dtype} {layout}")
        else:
            words.append(f"scaled by {layout}")
    if not words and "source_val" in names:
        words, bits = [names["source_val"].dtype], BITS[names["source_val"].dtype]
    return " ".join(words) or "unknown", bits, group


def _index_bits(names: Mapping[str, Constant]) -> int:
    """Bits of an index into a look-up table. iOS 18 has dtypes for indices; iOS 16 packs them into bytes."""
    indices = names.get("indices", names.get("indices_nonzero_data"))
    if indices is not None and "shape" not in names:
        return BITS[indices.dtype]
    return int(np.log2(names["lut"].shape[0]))


def _blocks(scales: tuple[int, ...], shape: tuple[int, ...]) -> tuple[str, int | None]:
    """(layout of the scales: `tensor`, `channel` or such as `g32`; group size, None unless grouped)."""
    if math.prod(scales) == 1:
        return "tensor", None
    if len(scales) != len(shape):  # iOS 16: one scale for each index of an axis
        return "channel", None
    if 0 in scales:
        raise ValueError(f"scales of shape {scales}")
    split = [n // s for n, s in zip(shape, scales, strict=True) if s > 1]
    if split == [1]:
        return "channel", None
    group = math.prod(shape) // math.prod(scales)
    return f"g{group}", group
