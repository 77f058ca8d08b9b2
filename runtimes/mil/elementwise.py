"""MIL operators that work element by element or reduce along axes.

Arguments have MIL's names. Floats are float32. Semantics and defaults: coremltools 9.0,
converters/mil/mil/ops/defs/iOS15 to iOS18.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Args = Mapping[str, Any]
Operator = Callable[[Args], Any]


def number(args: Args, name: str, default: float) -> float:
    """Returns the argument `name` as a float, or `default` if it is absent."""
    value = args.get(name)
    return default if value is None else float(value)


def ints(value: Any) -> list[int]:
    """Returns the integers of a constant, or of a tensor computed at run time."""
    if isinstance(value, Tensor):
        return [int(x) for x in value.reshape(-1).tolist()]
    return [int(x) for x in value] if isinstance(value, (list, tuple)) else [int(value)]


def _binary(function: Callable[[Tensor, Tensor], Tensor]) -> Operator:
    return lambda args: function(args["x"], args["y"])


def _unary(function: Callable[[Tensor], Tensor]) -> Operator:
    return lambda args: function(args["x"])


def _real_div(x: Tensor, y: Tensor) -> Tensor:
    """Divides. Integers are rounded towards minus infinity, as in coremltools' constant folding."""
    return torch.div(x, y) if x.is_floating_point() else torch.floor_divide(x, y)


def _axes(args: Args) -> list[int]:
    axes = args.get("axes")
    return list(range(args["x"].dim())) if axes is None else ints(axes)


def _reduce(function: Callable[[Tensor, list[int], bool], Tensor]) -> Operator:
    return lambda args: function(args["x"], _axes(args), bool(args.get("keep_dims")))


def _mean(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    if x.is_floating_point():
        return x.mean(axes, keepdim=keep)
    return x.double().mean(axes, keepdim=keep).to(x.dtype)  # truncated, as in coremltools' constant folding


def _prod(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    for axis in sorted((a % x.dim() for a in axes), reverse=True):
        x = x.prod(axis, keepdim=keep)
    return x


def _arg(function: Callable[..., Tensor]) -> Operator:
    def run(args: Args) -> Any:
        axis = args.get("axis")
        result = function(args["x"], -1 if axis is None else int(axis), keepdim=bool(args.get("keep_dims")))
        return result.int()

    return run


def _gelu(args: Args) -> Any:
    x, mode = args["x"], args.get("mode") or "EXACT"
    if mode == "SIGMOID_APPROXIMATION":
        return x * torch.sigmoid(1.702 * x)
    return F.gelu(x, approximate="none" if mode == "EXACT" else "tanh")


def _cumsum(args: Args) -> Any:
    x, axis = args["x"], int(args.get("axis") or 0)
    if args.get("reverse"):
        x = x.flip(axis)
    y = x.cumsum(axis)
    if args.get("exclusive"):
        y = torch.cat([torch.zeros_like(y.narrow(axis, 0, 1)), y.narrow(axis, 0, y.shape[axis] - 1)], axis)
    return y.flip(axis) if args.get("reverse") else y


def _l2_norm_of(args: Args) -> Any:
    """Operator l2_norm: normalizes the last three axes together."""
    x = args["x"]
    total = x.square().sum((-3, -2, -1), keepdim=True)
    return x / torch.sqrt(total + number(args, "epsilon", 1e-6))


def _layer_norm(args: Args) -> Any:
    x, axes = args["x"], _axes(args)
    mean = x.mean(axes, keepdim=True)
    variance = (x - mean).square().mean(axes, keepdim=True)
    y = (x - mean) / torch.sqrt(variance + number(args, "epsilon", 1e-5))
    normalized = {axis % x.dim() for axis in axes}
    shape = [size if axis in normalized else 1 for axis, size in enumerate(x.shape)]
    if args.get("gamma") is not None:
        y = y * args["gamma"].reshape(shape)
    return y + args["beta"].reshape(shape) if args.get("beta") is not None else y


def _channels(values: Tensor, x: Tensor) -> Tensor:
    return values.reshape(1, -1, *[1] * (x.dim() - 2))


def _normalized(args: Args, mean: Tensor, variance: Tensor) -> Any:
    x = args["x"]
    y = (x - mean) / torch.sqrt(variance + number(args, "epsilon", 1e-5))
    if args.get("gamma") is not None:
        y = y * _channels(args["gamma"], x)
    return y + _channels(args["beta"], x) if args.get("beta") is not None else y


def _batch_norm(args: Args) -> Any:
    x = args["x"]
    return _normalized(args, _channels(args["mean"], x), _channels(args["variance"], x))


def _instance_norm(args: Args) -> Any:
    x = args["x"]
    axes = list(range(2, x.dim()))
    mean = x.mean(axes, keepdim=True)
    return _normalized(args, mean, (x - mean).square().mean(axes, keepdim=True))


def _quantize(args: Args) -> Any:
    """Returns round(x / scale) + zero point, clamped to the output's integer range."""
    low, high = (0, 255) if args["output_dtype"] == "uint8" else (-128, 127)
    scale, zero = _along(args, "scale", "input"), _along(args, "zero_point", "input")
    return (torch.round(args["input"] / scale) + zero).clamp(low, high).int()


def _dequantize(args: Args) -> Any:
    return (args["input"].float() - _along(args, "zero_point", "input")) * _along(args, "scale", "input")


def _along(args: Args, name: str, of: str) -> Any:
    """Returns a parameter, broadcast along `axis` if it has one entry per index. Zero if absent."""
    value = args.get(name)
    if value is None:
        return torch.zeros(())
    value = torch.as_tensor(value).float()
    shape = [1] * args[of].dim()
    if value.dim():
        shape[int(args["axis"])] = -1
        value = value.reshape(shape)
    return value


ELEMENTWISE: dict[str, Operator] = {
    "add": _binary(torch.add),
    "sub": _binary(torch.sub),
    "mul": _binary(torch.mul),
    "real_div": _binary(_real_div),
    "floor_div": _binary(torch.floor_divide),
    "mod": _binary(torch.remainder),
    "pow": _binary(torch.pow),
    "maximum": _binary(torch.maximum),
    "minimum": _binary(torch.minimum),
    "equal": _binary(torch.eq),
    "not_equal": _binary(torch.ne),
    "less": _binary(torch.lt),
    "less_equal": _binary(torch.le),
    "greater": _binary(torch.gt),
    "greater_equal": _binary(torch.ge),
    "logical_and": _binary(torch.logical_and),
    "logical_or": _binary(torch.logical_or),
    "logical_xor": _binary(torch.logical_xor),
    "logical_not": _unary(torch.logical_not),
    "abs": _unary(torch.abs),
    "ceil": _unary(torch.ceil),
    "floor": _unary(torch.floor),
    "round": _unary(torch.round),
    "sign": _unary(torch.sign),
    "exp": _unary(torch.exp),
    "exp2": _unary(torch.exp2),
    "sqrt": _unary(torch.sqrt),
    "square": _unary(torch.square),
    "sin": _unary(torch.sin),
    "cos": _unary(torch.cos),
    "tan": _unary(torch.tan),
    "atan": _unary(torch.atan),
    "tanh": _unary(torch.tanh),
    "erf": _unary(torch.erf),
    "sigmoid": _unary(torch.sigmoid),
    "silu": _unary(F.silu),
    "relu": _unary(F.relu),
    "relu6": _unary(F.relu6),
    "softplus": _unary(F.softplus),
    "softsign": _unary(F.softsign),
    "leaky_relu": lambda a: F.leaky_relu(a["x"], number(a, "alpha", 0.01)),
    "elu": lambda a: F.elu(a["x"], number(a, "alpha", 1.0)),
    "sigmoid_hard": lambda a: (a["x"] * number(a, "alpha", 0.2) + number(a, "beta", 0.5)).clamp(0, 1),
    "linear_activation": lambda a: a["x"] * number(a, "alpha", 1.0) + number(a, "beta", 0.0),
    "clip": lambda a: a["x"].clamp(number(a, "alpha", -math.inf), number(a, "beta", math.inf)),
    "threshold": lambda a: a["x"].clamp_min(number(a, "alpha", 0.0)),
    "gelu": _gelu,
    # These three operators add epsilon to x.
    "log": lambda a: torch.log(a["x"] + number(a, "epsilon", 1e-45)),
    "rsqrt": lambda a: torch.rsqrt(a["x"] + number(a, "epsilon", 1e-12)),
    "inverse": lambda a: 1 / (a["x"] + number(a, "epsilon", 1e-4)),
    "select": lambda a: torch.where(a["cond"].bool(), a["a"], a["b"]),
    "softmax": lambda a: torch.softmax(a["x"], int(-1 if a.get("axis") is None else a["axis"])),
    "cumsum": _cumsum,
    "reduce_sum": _reduce(lambda x, axes, keep: x.sum(axes, keepdim=keep)),
    "reduce_mean": _reduce(_mean),
    "reduce_max": _reduce(lambda x, axes, keep: x.amax(axes, keepdim=keep)),
    "reduce_min": _reduce(lambda x, axes, keep: x.amin(axes, keepdim=keep)),
    "reduce_prod": _reduce(_prod),
    "reduce_sum_square": _reduce(lambda x, axes, keep: x.square().sum(axes, keepdim=keep)),
    "reduce_l1_norm": _reduce(lambda x, axes, keep: x.abs().sum(axes, keepdim=keep)),
    "reduce_l2_norm": _reduce(lambda x, axes, keep: x.square().sum(axes, keepdim=keep).sqrt()),
    "reduce_log_sum": _reduce(lambda x, axes, keep: x.sum(axes, keepdim=keep).log()),
    "reduce_log_sum_exp": _reduce(lambda x, axes, keep: x.logsumexp(axes, keepdim=keep)),
    "reduce_argmax": _arg(torch.argmax),
    "reduce_argmin": _arg(torch.argmin),
    "layer_norm": _layer_norm,
    "batch_norm": _batch_norm,
    "instance_norm": _instance_norm,
    "l2_norm": _l2_norm_of,
    "quantize": _quantize,
    "dequantize": _dequantize,
}
