"""The reference interpreter: executes the MIL program of an .mlpackage in torch, on any machine.

It answers whether a package computes what its checkpoint computes. It cannot answer whether a compute unit of a
device does: kernels, placement, speed and memory are Core ML's own.

In mode `fp16` every result is rounded to its declared dtype, with float32 accumulation inside an operator, as a
device would; in mode `fp32` floats stay wide, which isolates what weight quantization costs. Either way float16
values are held as float32 tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from edgellama.errors import BundleError, UsageError
from edgellama.mlpackage_file import Feature, Function, read_mlpackage
from edgellama.runtimes.mil_program import DTYPES, Mode, Preparation, Step, Value, rounded
from edgellama.runtimes.mil_tensors import slices
from edgellama.runtimes.mil_weights import Weight

State = dict[str, Tensor]
FLOAT16_MAX = 65504.0


@dataclass
class Range:
    """What was seen of an operator's results: the largest finite magnitude, and how many were not finite although
    all inputs were."""

    largest: float = 0.0
    nonfinite: int = 0


class MilModel:
    """The functions of a saved package. Raises BundleError for operators or dtypes that it does not know, by name."""

    def __init__(self, path: Path, *, mode: Mode = "fp16", observe: bool = False) -> None:
        self.path, self.mode, self.observe = path, mode, observe
        package = read_mlpackage(path)
        self.functions = {f.name: f for f in package.functions}
        self.default_function = package.default_function
        self.ranges: dict[str, Range] = {}
        preparation = Preparation(path, mode)
        self._steps = {name: preparation.prepare(function) for name, function in self.functions.items()}
        preparation.decide_precision()
        self._weights = preparation.weights

    def make_state(self) -> State:
        """The package's states, zero. Every function of the package may use them."""
        features = {s.name: s for f in self.functions.values() for s in f.states}
        return {name: torch.zeros(_fixed(feature)) for name, feature in features.items()}

    @torch.inference_mode()
    def predict(
        self, inputs: Mapping[str, Tensor], function: str | None = None, state: State | None = None
    ) -> dict[str, Tensor]:
        """Run one function (None: the default one). `state` is updated in place.

        Returns the outputs in their declared dtypes (mode fp32: floats as float32). Raises UsageError for inputs
        that Core ML would refuse: names, dtypes, and shapes outside what the package declares.
        """
        name = function or self.default_function
        if name not in self.functions:
            raise UsageError(
                f"{self.path} has no function {name!r}",
                remedy=f"It has: {', '.join(sorted(self.functions))}.",
            )
        declared = self.functions[name]
        values = self._checked(inputs, declared)
        if declared.states and state is None:
            raise UsageError(f"function {name!r} keeps a state", remedy="Pass one that make_state() made.")
        for step in self._steps[name]:
            results = self._execute(step, values, state or {})
            for (output, dtype), result in zip(step.outputs, results, strict=True):
                values[output] = rounded(result, dtype, self.mode) if step.floats else result
            if self.observe and step.floats:
                self._observe(step, values)
                if step.type == "scaled_dot_product_attention":
                    self._observe_scores(step, values)
            for dead in step.frees:
                values.pop(dead, None)
        return {o.name: self._returned(values[o.name], o) for o in declared.outputs}

    def _execute(self, step: Step, values: dict[str, Tensor], state: State) -> tuple[Any, ...] | list[Any]:
        arguments = {key: _resolve(item, values) for key, item in step.arguments.items()}
        if step.type == "read_state":
            return (state[step.state],)
        if step.type == "write_state":
            value, old = arguments["data"], state[step.state]
            if value.untyped_storage().data_ptr() != old.untyped_storage().data_ptr():
                state[step.state] = value.clone()
            return ()
        if step.in_place and self._alone(arguments["x"], step, values):
            x = arguments["x"]
            x[slices(arguments, tuple(x.shape))] = arguments["update"]
            return (x,)
        assert step.run is not None
        try:
            result = step.run(arguments)
        except (RuntimeError, IndexError, ValueError) as error:
            raise BundleError(
                f"{self.path}: operator {step.name!r} ({step.type}) cannot be computed: {error}",
                remedy="The package is wrong, or this input drives it outside its shapes; export it again.",
            ) from error
        return result if isinstance(result, (tuple, list)) else (result,)

    def _alone(self, x: Tensor, step: Step, values: Mapping[str, Tensor]) -> bool:
        """Nothing that is still needed looks at the memory of `x`."""
        storage, own = x.untyped_storage().data_ptr(), str(step.arguments["x"])
        if own not in step.frees:
            return False
        return not any(
            value.untyped_storage().data_ptr() == storage for name, value in values.items() if name != own
        )

    def _returned(self, value: Tensor, output: Feature) -> Tensor:
        dtype = DTYPES[output.dtype]
        return value.half() if dtype == torch.float16 and self.mode == "fp16" else value.clone()

    def _observe(self, step: Step, values: Mapping[str, Tensor]) -> None:
        for name, _ in step.outputs:
            value = values[name]
            if not value.is_floating_point() or not value.numel():
                continue
            seen = self.ranges.setdefault(name, Range())
            largest = float(value.abs().max())
            if np.isfinite(largest):
                seen.largest = max(seen.largest, largest)
                continue
            inputs = [_resolve(item, values) for item in step.arguments.values()]
            flat = [t for x in inputs for t in (x if isinstance(x, list) else [x])]
            if all(t.isfinite().all() for t in flat if isinstance(t, Tensor) and t.is_floating_point()):
                seen.nonfinite += int((~value.isfinite()).sum())

    def _observe_scores(self, step: Step, values: Mapping[str, Tensor]) -> None:
        """Fused attention multiplies before it scales, in float16 on a device, and shows no result of that."""
        q, k = (_resolve(step.arguments[name], values) for name in ("query", "key"))
        if float(q.norm(dim=-1).max() * k.norm(dim=-1).max()) <= FLOAT16_MAX:
            return
        scores, seen = (q @ k.transpose(-1, -2)).abs(), self.ranges.setdefault(f"{step.name}.scores", Range())
        seen.largest = max(seen.largest, float(scores.max()))
        seen.nonfinite += int((scores > FLOAT16_MAX).sum())

    def _checked(self, inputs: Mapping[str, Tensor], function: Function) -> dict[str, Tensor]:
        declared = {feature.name: feature for feature in function.inputs}
        for name in (*sorted(set(declared) - set(inputs)), *sorted(set(inputs) - set(declared))):
            what = "is missing" if name in declared else "is not declared"
            raise UsageError(
                f"{self.path}, function {function.name!r}: input {name!r} {what}",
                remedy=f"It takes: {', '.join(declared)}.",
            )
        values = {}
        for name, feature in declared.items():
            _check_input(inputs[name], feature)
            value = inputs[name]
            values[name] = value.float() if value.dtype == torch.float16 else value
        return values


def _resolve(item: Any, values: Mapping[str, Tensor]) -> Any:
    if isinstance(item, Value):
        return values[item]
    if isinstance(item, Weight):
        return item.tensor()
    return [_resolve(x, values) for x in item] if isinstance(item, list) else item


def _fixed(feature: Feature) -> tuple[int, ...]:
    if not all(isinstance(n, int) for n in feature.shape):
        raise BundleError(
            f"state {feature.name!r} has no fixed shape", remedy="Core ML keeps states of fixed shapes only."
        )
    return tuple(n for n in feature.shape if isinstance(n, int))


def _check_input(value: Tensor, feature: Feature) -> None:
    ranges = [(n, n) if isinstance(n, int) else n for n in feature.shape]
    shape = tuple(value.shape)
    if len(shape) != len(ranges) or not all(
        low <= n and (n <= high or high < 0) for n, (low, high) in zip(shape, ranges, strict=False)
    ):
        declared = ", ".join(str(low) if low == high else f"{low}..{high}" for low, high in ranges)
        raise UsageError(
            f"input {feature.name!r} has the shape {list(shape)}, the package declares [{declared}]",
            remedy="Feed what the package declares, or export it with other shapes.",
        )
    if value.dtype != DTYPES.get(feature.dtype):
        raise UsageError(
            f"input {feature.name!r} is {value.dtype}, the package declares {feature.dtype}",
            remedy="Convert it first; Core ML does not.",
        )
