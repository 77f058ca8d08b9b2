"""Reference interpreter: executes the MIL program of an .mlpackage in torch, on any machine.

It answers whether a package computes the same as its checkpoint. It cannot answer that for a compute unit of
a device: kernels, placement, speed and memory are Core ML's own.

Mode `fp16` rounds every result to its declared dtype, with float32 accumulation inside an operator, as a
device would. Mode `fp32` keeps floats wide, which isolates the cost of weight quantization. Both modes hold
float16 values as float32 tensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from edgellama.errors import BundleError, UsageError
from edgellama.formats.mlpackage import Array, Constant, Feature, Function, Operation, read_mlpackage
from edgellama.runtimes.mil.elementwise import ELEMENTWISE
from edgellama.runtimes.mil.inputs import (
    DTYPES,
    check_input,
    check_names,
    check_state,
    enumerated_shapes,
    state_shape,
)
from edgellama.runtimes.mil.tensors import TENSORS, update_slice
from edgellama.runtimes.mil.weights import CONSTEXPRS, Weight

Mode = Literal["fp16", "fp32"]
OPERATORS = ELEMENTWISE | TENSORS
STATE_OPERATORS = ("read_state", "write_state")
# Operators that only move values: their results need no rounding and no observation.
_MOVES = frozenset(
    (
        *("identity", "reshape", "transpose", "expand_dims", "squeeze", "tile", "concat", "stack", "split"),
        *("slice_by_index", "slice_by_size", "slice_update", "reverse", "shape", "read_state", "write_state"),
        *("gather", "gather_along_axis", "gather_nd"),
    )
)
# Operators that take part of a table. A table kept as float16 is widened after them, not before.
_TAKES = frozenset(("gather", "gather_along_axis", "gather_nd", "slice_by_index", "slice_by_size"))
# Arguments that are tensors even if constant. All other constants become plain Python values.
_TENSOR_ARGUMENTS = frozenset(
    (
        *("x", "y", "a", "b", "cond", "data", "update", "updates", "indices", "input", "values"),
        *("weight", "bias", "gamma", "beta", "mean", "variance", "ref_tensor"),
        *("query", "key", "value", "attn_mask"),
    )
)
_SCALAR_FIRST = {"fill": {"value"}, "fill_like": {"value"}}  # operators for which such a name is a number
# Limit, in bytes of float32, for keeping all weights as float32. A model of 1B parameters then runs in 12 GB.
# Above the limit, weights are kept as float16 and widened at each use. Weights that float16 would round are
# dequantized at each use.
FLOAT32_BUDGET = 2 * 2**30
LARGE = 4096  # elements; smaller constants stay plain tensors

State = dict[str, Tensor]
FLOAT16_MAX = 65504.0


@dataclass
class Range:
    """Observed range of an operator's results.

    largest: the largest finite magnitude.
    nonfinite: number of results that were not finite although all inputs were.
    """

    largest: float = 0.0
    nonfinite: int = 0


class _Step:
    """One operator, with everything resolved that is known before it runs."""

    __slots__ = ("arguments", "floats", "frees", "in_place", "name", "outputs", "run", "state", "type")

    def __init__(self, op: Operation) -> None:
        self.type, self.name = op.type, op.name
        self.run: Callable[[Mapping[str, Any]], Any] | None = OPERATORS.get(op.type)
        self.arguments: dict[str, Any] = {}
        self.outputs = [(name, DTYPES[dtype]) for name, (dtype, _) in op.outputs.items()]
        self.frees: tuple[str, ...] = ()
        self.floats = op.type not in _MOVES
        self.in_place = False
        self.state = ""


class _Value(str):
    """Name of a value that is computed at run time."""


class MilModel:
    """The functions of a saved package.

    kept: names of values that `predict` returns with the outputs, by function.

    Raises BundleError that names each operator or dtype which the interpreter does not support.
    """

    def __init__(
        self,
        path: Path,
        *,
        mode: Mode = "fp16",
        observe: bool = False,
        kept: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        self.path, self.mode, self.observe = path, mode, observe
        self._kept = {name: tuple(values) for name, values in (kept or {}).items()}
        package = read_mlpackage(path)
        self.functions = {f.name: f for f in package.functions}
        self._listed = enumerated_shapes(path)
        self.default_function = package.default_function
        self.ranges: dict[str, Range] = {}
        self._weights: dict[Any, Weight] = {}
        self._steps = {name: self._compile(function) for name, function in self.functions.items()}
        self._decide_precision()

    def make_state(self) -> State:
        """Returns the package's states as zeros, for use by every function of the package."""
        features = {s.name: s for f in self.functions.values() for s in f.states}
        return {name: torch.zeros(state_shape(feature)) for name, feature in features.items()}

    @torch.inference_mode()
    def predict(
        self, inputs: Mapping[str, Tensor], function: str | None = None, state: State | None = None
    ) -> dict[str, Tensor]:
        """Runs one function (None: the default one) and updates `state` in place.

        Returns the outputs in their declared dtypes (mode `fp32`: floats as float32). Raises UsageError for
        inputs that Core ML would refuse: wrong names, wrong dtypes, and shapes that the package does not
        declare. Raises BundleError for an operator that cannot be computed.
        """
        name = function or self.default_function
        if name not in self.functions:
            raise UsageError(
                f"{self.path} has no function {name!r}",
                remedy=f"It has: {', '.join(sorted(self.functions))}.",
            )
        declared = self.functions[name]
        values = self._checked(inputs, declared)
        check_state(state, declared)
        for step in self._steps[name]:
            results = self._execute(step, values, state or {})
            for (output, dtype), result in zip(step.outputs, results, strict=True):
                values[output] = self._rounded(result, dtype) if step.floats else _carried(result)
            if self.observe and step.floats:
                self._observe(step, values)
                if step.type == "scaled_dot_product_attention":
                    self._observe_scores(step, values)
            for dead in step.frees:
                values.pop(dead, None)
        outputs = {o.name: self._returned(values[o.name], o) for o in declared.outputs}
        return outputs | {value: values[value] for value in self._kept.get(name, ())}

    def _execute(self, step: _Step, values: dict[str, Tensor], state: State) -> tuple[Any, ...] | list[Any]:
        widen = step.type not in _TAKES
        arguments = {key: _resolve(item, values, widen=widen) for key, item in step.arguments.items()}
        if step.type == "read_state":
            return (state[step.state],)
        if step.type == "write_state":
            if arguments["data"] is not state[step.state]:
                state[step.state] = arguments["data"].clone(memory_format=torch.contiguous_format)
            return ()
        assert step.run is not None
        try:
            if step.in_place and self._alone(arguments["x"], step, values):
                return (update_slice(arguments["x"], arguments),)
            result = step.run(arguments)
        except (RuntimeError, IndexError, ValueError, KeyError, TypeError) as error:
            raise BundleError(
                f"{self.path}: operator {step.name!r} ({step.type}) cannot be computed: {error}",
                remedy="The package is wrong, or this input drives it outside its shapes; export it again.",
            ) from error
        return result if isinstance(result, (tuple, list)) else (result,)

    def _alone(self, x: Tensor, step: _Step, values: Mapping[str, Tensor]) -> bool:
        """Returns True if no other value that is still needed uses the memory of `x`."""
        storage, own_name = x.untyped_storage().data_ptr(), str(step.arguments["x"])
        if own_name not in step.frees:
            return False
        return not any(
            value.untyped_storage().data_ptr() == storage
            for name, value in values.items()
            if name != own_name
        )

    def _rounded(self, value: Tensor, dtype: torch.dtype) -> Tensor:
        if dtype == torch.float16:
            value = value.float()
            return value.half().float() if self.mode == "fp16" else value
        return value.to(dtype)

    def _returned(self, value: Tensor, output: Feature) -> Tensor:
        dtype = DTYPES[output.dtype]
        return value.half() if dtype == torch.float16 and self.mode == "fp16" else value.clone()

    def _observe(self, step: _Step, values: Mapping[str, Tensor]) -> None:
        for name, _ in step.outputs:
            value = values[name]
            if not value.is_floating_point() or not value.numel():
                continue
            seen = self.ranges.setdefault(name, Range())
            finite = value.isfinite()
            if not finite.all():
                if all(_finite(_resolve(item, values)) for item in step.arguments.values()):
                    seen.nonfinite += int((~finite).sum())
                value = value.where(finite, 0)
            seen.largest = max(seen.largest, float(value.abs().max()))

    def _observe_scores(self, step: _Step, values: Mapping[str, Tensor]) -> None:
        """Records overflows in fused attention, which has no output for its scores.

        It multiplies before it scales, in float16 on a device.
        """
        q, k = (_resolve(step.arguments[name], values) for name in ("query", "key"))
        if float(q.norm(dim=-1).max() * k.norm(dim=-1).max()) <= FLOAT16_MAX:
            return
        scores, seen = (q @ k.transpose(-1, -2)).abs(), self.ranges.setdefault(f"{step.name}.scores", Range())
        seen.largest = max(seen.largest, float(scores.max()))
        seen.nonfinite += int((scores > FLOAT16_MAX).sum())

    def _checked(self, inputs: Mapping[str, Tensor], function: Function) -> dict[str, Tensor]:
        check_names(inputs, function, self.path)
        values = {}
        for feature in function.inputs:
            value = inputs[feature.name]
            check_input(value, feature, self._listed.get((function.name, feature.name)))
            values[feature.name] = _carried(value)
        return values

    def _compile(self, function: Function) -> list[_Step]:
        self._refuse_unknown(function)
        states = {s.name for s in function.states}
        steps = []
        for op in function.operations:
            if op.type == "const" or op.type.startswith("constexpr"):
                continue
            step = _Step(op)
            for key, items in op.inputs.items():
                resolved = [self._argument(op, key, item, function) for item in items]
                if resolved == [None]:
                    continue
                step.arguments[key] = resolved if key == "values" else resolved[0]
                if isinstance(items[0], str) and items[0] in states:
                    step.state = str(step.arguments.pop(key))
            steps.append(step)
        _mark_lifetimes(steps, {o.name for o in function.outputs} | {*self._kept.get(function.name, ())})
        _mark_in_place(steps)
        return steps

    def _argument(self, op: Operation, key: str, item: str | Constant, function: Function) -> Any:
        """Returns a `_Value` to look up at run time, a `Weight`, a tensor, or a plain Python value."""
        if isinstance(item, str):
            producer = function.producers.get(item)
            if producer is None or not (producer.type == "const" or producer.type.startswith("constexpr")):
                return _Value(item)
            if producer.type != "const":
                return self._constexpr(producer, item, function)
            assert producer.value is not None
            item = producer.value
        if key in _TENSOR_ARGUMENTS and key not in _SCALAR_FIRST.get(op.type, ()):
            if isinstance(item.data, str):
                return item.data
            if int(np.prod(item.shape)) >= LARGE and item.dtype.startswith("float"):
                half = item.dtype == "float16"
                weight = Weight(item.shape, lambda: _tensor(item.array()), half=half)
                return self._weights.setdefault(_identity(item, function), weight)
            return _tensor(item.array()) if item.data is not None or item.offset is not None else None
        return (
            item.data
            if isinstance(item.data, str) or (item.data is None and item.offset is None)
            else (item.array().tolist())
        )

    def _constexpr(self, op: Operation, output: str, function: Function) -> Weight:
        dtype, dims = op.outputs[output]

        def produce() -> Tensor:
            return self._rounded(_tensor(_evaluate(output, function)), DTYPES[dtype])

        shape = tuple(int(n or 0) for n in dims)
        half = dtype == "float16" and self.mode == "fp16"  # mode fp32 does not round to float16
        return self._weights.setdefault(_identity(output, function), Weight(shape, produce, half=half))

    def _decide_precision(self) -> None:
        total = sum(weight.float32_bytes for weight in self._weights.values())
        for weight in self._weights.values():
            if total <= FLOAT32_BUDGET:
                weight.keep(torch.float32)
            elif weight.half:
                weight.keep(torch.float16)

    def _refuse_unknown(self, function: Function) -> None:
        supported = {*OPERATORS, *CONSTEXPRS, *STATE_OPERATORS, "const"}
        unknown = {op.type: op.name for op in function.operations if op.type not in supported}
        dtypes = {
            dtype: op.name
            for op in function.operations
            if op.type != "const" and not op.type.startswith("constexpr")
            for dtype, _ in op.outputs.values()
            if dtype not in DTYPES
        }
        if unknown or dtypes:
            unsupported = [f"operator {t} ({n!r})" for t, n in sorted(unknown.items())]
            unsupported += [f"dtype {t} ({n!r})" for t, n in sorted(dtypes.items())]
            raise BundleError(
                f"{self.path}: the reference interpreter does not know {', '.join(unsupported)}",
                remedy="Add it to runtimes/mil/tensors.py or elementwise.py, or use Core ML on macOS.",
            )


def _resolve(item: Any, values: Mapping[str, Tensor], *, widen: bool = True) -> Any:
    if isinstance(item, _Value):
        return values[item]
    if isinstance(item, Weight):
        return item.tensor() if widen else item.held()
    return [_resolve(x, values, widen=widen) for x in item] if isinstance(item, list) else item


def _carried(value: Tensor) -> Tensor:
    """Returns a value as held between operators: float16 numbers in float32."""
    return value.float() if value.dtype == torch.float16 else value


def _finite(argument: Any) -> bool:
    """Returns True if an argument (a tensor, a number or a list of either) has no infinity or NaN."""
    if isinstance(argument, list):
        return all(_finite(x) for x in argument)
    if isinstance(argument, Tensor):
        return not argument.is_floating_point() or bool(argument.isfinite().all())
    return not isinstance(argument, float) or math.isfinite(argument)


def _identity(item: str | Constant, function: Function) -> Any:
    """Returns a key that is equal for constants of equal content, in any function.

    It holds the offset in weight.bin or the inline data, and for a constexpr the keys of its inputs.
    """
    if isinstance(item, Constant):
        inline = item.data.tobytes() if isinstance(item.data, np.ndarray) else item.data
        return item.dtype, item.shape, item.offset, inline
    op = function.producers[item]
    if op.value is not None:
        return _identity(op.value, function)
    parts = sorted((key, tuple(_identity(x, function) for x in items)) for key, items in op.inputs.items())
    return op.type, list(op.outputs).index(item), tuple(parts)


def _evaluate(output: str, function: Function) -> Array:
    """Returns the value of a const, or of a constexpr and those that it reads."""
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
    """Returns a tensor: floats as float32; uint16, uint32 and int64 as int32 for torch."""
    if array.dtype in (np.float16, np.float64):
        array = array.astype(np.float32)
    elif array.dtype in (np.uint16, np.uint32, np.int64):
        array = array.astype(np.int32)
    return torch.from_numpy(array if array.flags.writeable else array.copy())


def _mark_lifetimes(steps: list[_Step], kept: set[str]) -> None:
    """Lets each step free the values that no later step reads."""
    last: dict[str, int] = {}
    for index, step in enumerate(steps):
        for name, _ in step.outputs:
            last[name] = index
        for item in step.arguments.values():
            for value in item if isinstance(item, list) else [item]:
                if isinstance(value, _Value):
                    last[str(value)] = index
    for index, step in enumerate(steps):
        step.frees = tuple(name for name, at in last.items() if at == index and name not in kept)


def _mark_in_place(steps: list[_Step]) -> None:
    """Lets a slice_update write into a state if the next use of that state stores the result there.

    `_alone` checks at run time that nothing else still needs the old content.
    """
    holds: dict[str, str] = {}  # value -> state whose memory it uses
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
