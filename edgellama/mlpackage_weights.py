"""Operators of a MIL program and what its weights are: schemes, bits, groups, bytes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from edgellama.mlpackage_tensor import BITS, Tensor


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


def constexpr(op: Operation, producers: Mapping[str, Operation]) -> Weight:
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
    if "data" in parts and "scale" in parts:
        data, scale = parts["data"], parts["scale"]
        bits, columns = BITS[data.dtype], shape[-1] if shape else 1
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
        return f"{dtype} {'channel' if parts['scale'].shape else 'tensor'}", BITS[dtype], None
    if "nonzero_data" in parts:
        return "sparse", BITS[parts["nonzero_data"].dtype], None
    return kind.removeprefix("constexpr_"), 16, None
