"""A function of a MIL program, prepared to run: constants and weights resolved, lifetimes known."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from edgellama.errors import BundleError
from edgellama.mlpackage_file import Function
from edgellama.mlpackage_tensor import Array
from edgellama.mlpackage_tensor import Tensor as Constant
from edgellama.mlpackage_weights import Operation
from edgellama.runtimes.mil_elementwise import ELEMENTWISE
from edgellama.runtimes.mil_products import PRODUCTS
from edgellama.runtimes.mil_tensors import TENSORS
from edgellama.runtimes.mil_weights import CONSTEXPRS, Weight

Mode = Literal["fp16", "fp32"]
OPERATORS = ELEMENTWISE | TENSORS | PRODUCTS
STATE_OPERATORS = ("read_state", "write_state")
# Move values without computing any: nothing to round, nothing to observe.
MOVES = frozenset(
    (
        *("identity", "reshape", "transpose", "expand_dims", "squeeze", "tile", "concat", "stack", "split"),
        *("slice_by_index", "slice_by_size", "slice_update", "reverse", "shape", "read_state", "write_state"),
        *("gather", "gather_along_axis", "gather_nd"),
    )
)
# Arguments that are tensors even when constant; all other constants become plain Python values.
_TENSOR_ARGUMENTS = frozenset(
    (
        *(
            "x",
            "y",
            "a",
            "b",
            "cond",
            "data",
            "update",
            "updates",
            "indices",
            "weight",
            "bias",
            "values",
            "input",
        ),
        *("query", "key", "value", "attn_mask", "gamma", "beta", "mean", "variance", "ref_tensor"),
    )
)
_SCALAR_FIRST = {"fill": {"value"}, "fill_like": {"value"}}  # where such a name means a number
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
# Weights are kept as float32 up to this many bytes in all, so that a model of 1B parameters runs in 12 GB; beyond it
# as float16 and widened at each use, or, where that would round them, dequantized at each use.
FLOAT32_BUDGET = 2 * 2**30
LARGE = 4096  # elements; smaller constants are simply kept


class Step:
    """One operator, with everything resolved that is known before it runs."""

    __slots__ = ("arguments", "floats", "frees", "in_place", "name", "outputs", "run", "state", "type")

    def __init__(self, op: Operation) -> None:
        self.type, self.name = op.type, op.name
        self.run: Callable[[Mapping[str, Any]], Any] | None = OPERATORS.get(op.type)
        self.arguments: dict[str, Any] = {}
        self.outputs = [(name, DTYPES[dtype]) for name, (dtype, _) in op.outputs.items()]
        self.frees: tuple[str, ...] = ()
        self.floats = op.type not in MOVES
        self.in_place = False
        self.state = ""


class Value(str):
    """The name of a value that is computed at run time."""


class Preparation:
    """What the functions of a package share while they are prepared: the weights, by where they lie in the file."""

    def __init__(self, path: Path, mode: Mode) -> None:
        self.path, self.mode = path, mode
        self.weights: dict[Any, Weight] = {}

    def prepare(self, function: Function) -> list[Step]:
        """The steps, in order. Raises BundleError for operators or dtypes that are not known, by name."""
        self._refuse_unknown(function)
        states = {s.name for s in function.states}
        steps = []
        for op in function.operations:
            if op.type == "const" or op.type.startswith("constexpr"):
                continue
            step = Step(op)
            for key, items in op.inputs.items():
                resolved = [self._argument(op, key, item, function) for item in items]
                if resolved == [None]:
                    continue
                step.arguments[key] = resolved if key == "values" else resolved[0]
                if isinstance(items[0], str) and items[0] in states:
                    step.state = str(step.arguments.pop(key))
            steps.append(step)
        _mark_lifetimes(steps, {o.name for o in function.outputs})
        _mark_in_place(steps)
        return steps

    def _argument(self, op: Operation, key: str, item: str | Constant, function: Function) -> Any:
        """A `Value` to look up at run time, a `Weight`, a tensor, or a plain Python value."""
        if isinstance(item, str):
            producer = function.producers.get(item)
            if producer is None or not (producer.type == "const" or producer.type.startswith("constexpr")):
                return Value(item)
            if producer.type != "const":
                return self._constexpr(producer, item, function)
            assert producer.value is not None
            item = producer.value
        if key in _TENSOR_ARGUMENTS and key not in _SCALAR_FIRST.get(op.type, ()):
            if isinstance(item.data, str):
                return item.data
            if int(np.prod(item.shape)) >= LARGE and item.dtype.startswith("float"):
                place = item.offset if item.offset is not None else id(item)
                half = item.dtype == "float16"
                weight = Weight(item.shape, lambda: _tensor(item.array()), half=half)
                return self.weights.setdefault(place, weight)
            return _tensor(item.array()) if item.data is not None or item.offset is not None else None
        return (
            item.data
            if isinstance(item.data, str) or (item.data is None and item.offset is None)
            else (item.array().tolist())
        )

    def _constexpr(self, op: Operation, output: str, function: Function) -> Weight:
        weight = function.weights.get(output)
        offsets = tuple(sorted(t.offset or -1 for t in weight.parts.values())) if weight else ()
        key = (op.type, output if not offsets or -1 in offsets else offsets)
        dtype, dims = op.outputs[output]

        def produce() -> Tensor:
            return rounded(_tensor(_evaluate(output, function)), DTYPES[dtype], self.mode)

        shape = tuple(int(n or 0) for n in dims)
        half = dtype == "float16" and self.mode == "fp16"  # rounded to it; in mode fp32 wider
        return self.weights.setdefault(key, Weight(shape, produce, half=half))

    def decide_precision(self) -> None:
        """Choose how the weights are held, once all functions are prepared."""
        total = sum(weight.float32_bytes for weight in self.weights.values())
        for weight in self.weights.values():
            if total <= FLOAT32_BUDGET:
                weight.keep(torch.float32)
            elif weight.half:
                weight.keep(torch.float16)

    def _refuse_unknown(self, function: Function) -> None:
        known = {*OPERATORS, *CONSTEXPRS, *STATE_OPERATORS, "const"}
        unknown = {op.type: op.name for op in function.operations if op.type not in known}
        dtypes = {
            dtype: op.name
            for op in function.operations
            if op.type != "const" and not op.type.startswith("constexpr")
            for dtype, _ in op.outputs.values()
            if dtype not in DTYPES
        }
        if unknown or dtypes:
            found = [f"operator {t} ({n!r})" for t, n in sorted(unknown.items())]
            found += [f"dtype {t} ({n!r})" for t, n in sorted(dtypes.items())]
            raise BundleError(
                f"{self.path}: the reference interpreter does not know {', '.join(found)}",
                remedy="Add it to a table in runtimes/mil_elementwise.py, mil_tensors.py or mil_products.py, or use Core ML.",
            )


def rounded(value: Tensor, dtype: torch.dtype, mode: Mode) -> Tensor:
    """`value` as a result of that declared dtype; floats stay float32 tensors."""
    if dtype == torch.float16:
        value = value.float()
        return value.half().float() if mode == "fp16" else value
    return value.to(dtype)


def _evaluate(output: str, function: Function) -> Array:
    """The value of a const, or of a constexpr and those that it reads."""
    op = function.producers[output]
    if op.type == "const":
        assert op.value is not None
        return op.value.array()
    arguments = {
        key: (_evaluate(item, function) if isinstance(item, str) else item.array())
        for key, (item, *_) in op.inputs.items()
    }
    result = CONSTEXPRS[op.type](arguments)
    return result[list(op.outputs).index(output)] if isinstance(result, tuple) else result


def _tensor(array: Array) -> Tensor:
    """Floats as float32, 16-bit unsigned integers as int32, which torch can compute with."""
    if array.dtype in (np.float16, np.float64):
        array = array.astype(np.float32)
    elif array.dtype in (np.uint16, np.uint32, np.int64):
        array = array.astype(np.int32)
    return torch.from_numpy(np.array(array))


def _mark_lifetimes(steps: list[Step], kept: set[str]) -> None:
    """Let each step free the values that no later step reads."""
    last: dict[str, int] = {}
    for index, step in enumerate(steps):
        for name, _ in step.outputs:
            last[name] = index
        for item in step.arguments.values():
            for value in item if isinstance(item, list) else [item]:
                if isinstance(value, Value):
                    last[str(value)] = index
    for index, step in enumerate(steps):
        step.frees = tuple(name for name, at in last.items() if at == index and name not in kept)


def _mark_in_place(steps: list[Step]) -> None:
    """A slice_update of a state may write into it if the very next use of that state stores the result there.

    Whether something else still looks at the old content is asked at run time.
    """
    holds: dict[str, str] = {}  # value -> the state whose memory it is
    for index, step in enumerate(steps):
        if step.type == "read_state":
            holds[step.outputs[0][0]] = step.state
        if step.type != "slice_update":
            continue
        state = holds.get(str(step.arguments["x"]))
        following = next((s for s in steps[index + 1 :] if s.state == state), None)
        step.in_place = (
            state is not None
            and following is not None
            and following.type == "write_state"
            and following.arguments["data"] == step.outputs[0][0]
        )
