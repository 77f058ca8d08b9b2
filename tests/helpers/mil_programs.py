"""Small MIL programs for tests of the interpreter: one case for each way to call an operator."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import coremltools as ct
import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from coremltools.converters.mil import Builder as mb
from coremltools.converters.mil.mil import Function, Program, types
from torch import Tensor

from edgellama.host.log_filters import coremltools_quiet

Array = npt.NDArray[Any]
_TYPES = {"float16": types.fp16, "int32": types.int32}


@dataclass(frozen=True)
class Case:
    """Call of `operator` with tensors and attributes. `expected` computes the same from the tensors in torch."""

    operator: str
    tensors: Mapping[str, Array | list[Array]]
    attributes: Mapping[str, Any]
    expected: Callable[..., Any] = field(repr=False)

    def call(self, values: Mapping[str, Any], **name: str) -> Any:
        return getattr(mb, self.operator)(**values, **self.attributes, **name)


def save(function: Function, path: Path) -> Path:
    """Writes a package with one function. No pass folds or fuses operators."""
    program = Program()
    program.add_function("main", function)
    with coremltools_quiet():
        model = ct.convert(
            program,
            convert_to="mlprogram",
            minimum_deployment_target=ct.target.iOS18,
            compute_precision=ct.precision.FLOAT32,
            pass_pipeline=ct.PassPipeline.EMPTY,
            skip_model_load=True,
        )
        model.save(str(path))
    return path


def program_of(cases: Mapping[str, Case]) -> Function:
    """One function that calls every case. Inputs are named CASE_ARGUMENT_NUMBER, outputs CASE_out_NUMBER."""
    specs = {
        f"{case}_{name}_{i}": mb.TensorSpec(array.shape or (1,), _TYPES.get(str(array.dtype), types.fp32))
        for case, c in cases.items()
        for name, arrays in c.tensors.items()
        for i, array in enumerate(arrays if isinstance(arrays, list) else [arrays])
    }
    with Function(specs, ct.target.iOS18) as function:

        def argument(name: str, array: Array) -> Any:
            """Converts an input to the case's type: inputs of Core ML are neither booleans nor scalars."""
            value = function.inputs[name]
            value = mb.cast(x=value, dtype="bool") if array.dtype == bool else value
            return value if array.ndim else mb.squeeze(x=value, axes=[0])

        outputs = []
        for case, c in cases.items():
            values = {
                name: [argument(f"{case}_{name}_{i}", array) for i, array in enumerate(arrays)]
                if isinstance(arrays, list)
                else argument(f"{case}_{name}_0", arrays)
                for name, arrays in c.tensors.items()
            }
            result = c.call(values)
            for i, var in enumerate(result if isinstance(result, (list, tuple)) else [result]):
                var.name = f"{case}_out_{i}"
                outputs.append(var)
        function.set_outputs(outputs)
    return function


_RANDOM = np.random.default_rng(7)


def normal(*shape: int) -> Array:
    return _RANDOM.normal(size=shape).astype(np.float32)


def integers(low: int, high: int, *shape: int) -> Array:
    return _RANDOM.integers(low, high, shape).astype(np.int32)


def _unary(operator: str, function: Any, x: Array | None = None, **attributes: Any) -> Case:
    return Case(operator, {"x": normal(2, 3, 5) if x is None else x}, attributes, function)


def _binary(operator: str, function: Any, x: Array, y: Array) -> Case:
    return Case(operator, {"x": x, "y": y}, {}, function)


def _instance(x: Tensor, **parameters: Tensor) -> Tensor:
    return F.instance_norm(x, weight=parameters["gamma"], bias=parameters["beta"], eps=1e-3)


def _batch(x: Tensor) -> Tensor:
    mean, variance, gamma, beta = (torch.tensor(POSITIVE[i, j]) for i, j in ((0, 0), (0, 1), (0, 2), (1, 0)))
    return F.batch_norm(x, mean, variance, gamma, beta, eps=1e-3)


POSITIVE = np.abs(normal(2, 3, 5)) + 0.5
UPDATES = normal(2, 3)
WIDE = normal(6, 4, 3)

CASES: list[Case] = [
    *(
        _binary(name, function, normal(2, 3, 4), normal(3, 1))
        for name, function in {
            "add": torch.add,
            "sub": torch.sub,
            "mul": torch.mul,
            "real_div": torch.div,
            "maximum": torch.maximum,
            "minimum": torch.minimum,
            "less": torch.lt,
            "less_equal": torch.le,
            "greater": torch.gt,
            "greater_equal": torch.ge,
        }.items()
    ),
    _binary("pow", torch.pow, POSITIVE, normal(5)),
    _binary("equal", torch.eq, integers(0, 3, 4, 5), integers(0, 3, 4, 5)),
    _binary("not_equal", torch.ne, integers(0, 3, 4, 5), integers(0, 3, 4, 5)),
    _binary("add", torch.add, integers(-9, 9, 4), integers(-9, 9, 4)),
    _binary("floor_div", torch.floor_divide, integers(-9, 9, 20), integers(1, 5, 20)),
    _binary("real_div", torch.floor_divide, integers(0, 40, 20), integers(1, 5, 20)),
    _binary("mod", torch.remainder, integers(-9, 9, 20), integers(1, 5, 20)),
    _binary("logical_and", torch.logical_and, normal(9) > 0, normal(9) > 0),
    _binary("logical_or", torch.logical_or, normal(9) > 0, normal(9) > 0),
    _binary("logical_xor", torch.logical_xor, normal(9) > 0, normal(9) > 0),
    _unary("logical_not", torch.logical_not, normal(9) > 0),
    *(
        _unary(name, function)
        for name, function in {
            "abs": torch.abs,
            "ceil": torch.ceil,
            "floor": torch.floor,
            "round": torch.round,
            "sign": torch.sign,
            "exp": torch.exp,
            "exp2": torch.exp2,
            "square": torch.square,
            "sin": torch.sin,
            "cos": torch.cos,
            "tan": torch.tan,
            "atan": torch.atan,
            "tanh": torch.tanh,
            "erf": torch.erf,
            "sigmoid": torch.sigmoid,
            "silu": F.silu,
            "relu": F.relu,
            "relu6": F.relu6,
            "softplus": F.softplus,
            "softsign": F.softsign,
            "identity": torch.clone,
        }.items()
    ),
    _unary("sqrt", torch.sqrt, POSITIVE),
    _unary("log", torch.log, POSITIVE),
    _unary("log", lambda x: torch.log(x + 0.25), POSITIVE, epsilon=0.25),
    _unary("rsqrt", torch.rsqrt, POSITIVE),
    _unary("rsqrt", lambda x: torch.rsqrt(x + 0.5), POSITIVE, epsilon=0.5),
    _unary("inverse", lambda x: 1 / (x + 1e-4), POSITIVE),
    _unary("inverse", lambda x: 1 / (x + 2), POSITIVE, epsilon=2.0),
    _unary("leaky_relu", lambda x: F.leaky_relu(x, 0.2), alpha=0.2),
    _unary("elu", lambda x: F.elu(x, 0.7), alpha=0.7),
    _unary("sigmoid_hard", lambda x: (0.3 * x + 0.4).clamp(0, 1), alpha=0.3, beta=0.4),
    _unary("linear_activation", lambda x: 3 * x - 1, alpha=3.0, beta=-1.0),
    _unary("clip", lambda x: x.clamp(-0.5, 0.8), alpha=-0.5, beta=0.8),
    _unary("threshold", lambda x: x.clamp_min(0.1), alpha=0.1),
    _unary("gelu", F.gelu, mode="EXACT"),
    _unary("gelu", lambda x: F.gelu(x, approximate="tanh"), mode="TANH_APPROXIMATION"),
    _unary("gelu", lambda x: x * torch.sigmoid(1.702 * x), mode="SIGMOID_APPROXIMATION"),
    _unary("softmax", lambda x: torch.softmax(x, 1), axis=1),
    _unary("cumsum", lambda x: x.cumsum(1), axis=1),
    _unary("cumsum", lambda x: x.cumsum(2) - x, axis=2, exclusive=True),
    _unary("cumsum", lambda x: torch.tensor([0, 1, 1e9]), np.array([1, 1e9, 1], np.float32), axis=0, exclusive=True),
    _unary("cumsum", lambda x: x.flip(2).cumsum(2).flip(2), axis=2, reverse=True),
    *(
        _unary(f"reduce_{name}", function, POSITIVE, axes=[0, -1], keep_dims=keep)
        for keep in (True, False)
        for name, function in {
            "sum": lambda x, k=keep: x.sum((0, -1), keepdim=k),
            "mean": lambda x, k=keep: x.mean((0, -1), keepdim=k),
            "max": lambda x, k=keep: x.amax((0, -1), keepdim=k),
            "min": lambda x, k=keep: x.amin((0, -1), keepdim=k),
            "prod": lambda x, k=keep: x.prod(-1, keepdim=True).prod(0, keepdim=True)
            if k
            else x.prod(-1).prod(0),
            "sum_square": lambda x, k=keep: x.square().sum((0, -1), keepdim=k),
            "l1_norm": lambda x, k=keep: x.abs().sum((0, -1), keepdim=k),
            "l2_norm": lambda x, k=keep: x.square().sum((0, -1), keepdim=k).sqrt(),
            "log_sum": lambda x, k=keep: x.sum((0, -1), keepdim=k).log(),
            "log_sum_exp": lambda x, k=keep: x.logsumexp((0, -1), keepdim=k),
        }.items()
    ),
    _unary("reduce_sum", torch.sum),
    _unary("reduce_mean", lambda x: x.double().mean(1).int(), integers(0, 9, 3, 4), axes=[1]),
    _unary("reduce_argmax", lambda x: x.argmax(1, keepdim=True), axis=1, keep_dims=True),
    _unary("reduce_argmin", lambda x: x.argmin(2), axis=2, keep_dims=False),
    _unary("transpose", lambda x: x.permute(2, 0, 1), perm=[2, 0, 1]),
    _unary("reshape", lambda x: x.reshape(2, 1, 15), shape=[0, 1, -1]),
    _unary("expand_dims", lambda x: x[:, None, :, :, None], axes=[1, -1]),
    _unary("squeeze", lambda x: x.squeeze(1), normal(2, 1, 3, 1), axes=[1]),
    _unary("squeeze", torch.squeeze, normal(2, 1, 3, 1)),
    _unary("tile", lambda x: x.repeat(1, 3, 2), reps=[1, 3, 2]),
    _unary("reverse", lambda x: x.flip(0, 2), axes=[0, 2]),
    _unary("reverse", lambda x: x.flip(0, 1, 2)),
    _unary("shape", lambda x: torch.tensor(x.shape)),
    _unary("cast", lambda x: x.int(), dtype="int32"),
    _unary("cast", lambda x: x.half().float(), dtype="fp16"),
    _unary("cast", lambda x: x.bool(), integers(0, 2, 5), dtype="bool"),
    _unary("split", lambda x: torch.split(x, [1, 4], -1), split_sizes=[1, 4], axis=-1),
    _unary("split", lambda x: torch.chunk(x, 3, 1), num_splits=3, axis=1),
    _unary("slice_by_index", lambda x: x[:, 1:3, ::2], begin=[0, 1, 0], end=[2, 3, 5], stride=[1, 1, 2]),
    _unary(
        "slice_by_index",
        lambda x: x[1, :, -2:],
        begin=[1, 0, -2],
        end=[0, 0, 0],
        begin_mask=[False, True, False],
        end_mask=[False, True, True],
        squeeze_mask=[True, False, False],
    ),
    _unary(
        "slice_by_index",
        lambda x: x.flip(2)[:, :, ::2],
        begin=[0, 0, 0],
        end=[2, 3, 0],
        stride=[1, 1, -2],
        begin_mask=[False, False, True],
        end_mask=[False, False, True],
    ),
    _unary("slice_by_size", lambda x: x[:, 1:3, 2:], begin=[0, 1, 2], size=[2, 2, -1]),
    _unary("pad", lambda x: F.pad(x, (1, 2, 0, 3), value=0.5), pad=[0, 3, 1, 2], mode="constant", constant_val=0.5),
    _unary("pad", lambda x: F.pad(x, (1, 2), mode="reflect"), pad=[1, 2], mode="reflect"),
    _unary("pad", lambda x: F.pad(x, (1, 2), mode="replicate"), pad=[1, 2], mode="replicate"),
    _unary("band_part", lambda x: x.triu(-1).tril(2), normal(6, 6), lower=1, upper=2),
    _unary("topk", lambda x: tuple(x.topk(2, -1)), k=2, axis=-1),
    _unary("topk", lambda x: x.topk(2, 1, largest=False)[0], k=2, axis=1, ascending=True, return_indices=False),
    _unary("argsort", lambda x: torch.argsort(x, -1), axis=-1, ascending=True),
    Case("concat", {"values": [normal(2, 3), normal(2, 5)]}, {"axis": 1}, lambda values: torch.cat(values, 1)),
    Case(
        "concat",
        {"values": [normal(2, 3), normal(2, 3)]},
        {"axis": 1, "interleave": True},
        lambda values: torch.stack(values, 2).flatten(1),
    ),
    Case("stack", {"values": [normal(2, 3), normal(2, 3)]}, {"axis": 1}, lambda values: torch.stack(values, 1)),
    Case(
        "select",
        {"cond": normal(4, 5) > 0, "a": normal(4, 5), "b": normal(4, 5)},
        {},
        lambda cond, a, b: torch.where(cond, a, b),
    ),
    Case(
        "gather",
        {"x": normal(4, 5, 2), "indices": integers(-5, 5, 3, 2)},
        {"axis": 1},
        lambda x, indices: x[:, indices.long()],
    ),
    Case(
        "gather",
        {"x": normal(3, 5, 2), "indices": integers(0, 5, 3, 4)},
        {"axis": 1, "batch_dims": 1},
        lambda x, indices: torch.stack([a[i.long()] for a, i in zip(x, indices, strict=True)]),
    ),
    Case(
        "gather_along_axis",
        {"x": normal(4, 5), "indices": integers(0, 4, 3, 5)},
        {"axis": 0},
        lambda x, indices: torch.gather(x, 0, indices.long()),
    ),
    Case(
        "gather_nd",
        {"x": normal(4, 5, 2), "indices": integers(0, 4, 3, 2)},
        {},
        lambda x, indices: x[indices[:, 0].long(), indices[:, 1].long()],
    ),
    *(
        Case(
            "scatter_along_axis",
            {"data": normal(4, 5), "indices": np.array([[0, 1, 2, 3, 0], [2, 2, 0, 1, 1]], np.int32), "updates": POSITIVE[0, :2]},
            {"axis": 0, "mode": mode},
            lambda data, indices, updates, reduce=reduce: data.scatter_reduce(0, indices.long(), updates, reduce),
        )
        for mode, reduce in {"add": "sum", "mul": "prod", "min": "amin", "max": "amax"}.items()
    ),
    Case(
        "scatter",
        {"data": normal(4, 3), "indices": np.array([2, 0], np.int32), "updates": UPDATES},
        {"axis": 0, "mode": "update"},
        lambda data, indices, updates: data.index_copy(0, indices.long(), updates),
    ),
    Case(
        "scatter",
        {"data": normal(4, 3), "indices": np.array([1, 1], np.int32), "updates": UPDATES},
        {"axis": 0, "mode": "add"},
        lambda data, indices, updates: data.index_add(0, indices.long(), updates),
    ),
    Case(
        "scatter_nd",
        {"data": normal(4, 3), "indices": np.array([[3], [1]], np.int32), "updates": UPDATES},
        {"mode": "sub"},
        lambda data, indices, updates: data.index_add(0, indices[:, 0].long(), -updates),
    ),
    Case(
        "slice_update",
        {"x": normal(4, 5), "update": normal(2, 3)},
        {"begin": [1, 1], "end": [3, 4]},
        lambda x, update: torch.cat([x[:1], torch.cat([x[1:3, :1], update, x[1:3, 4:]], 1), x[3:]]),
    ),
    Case(
        "one_hot",
        {"indices": np.array([1, 0, 3], np.int32)},
        {"one_hot_vector_size": 4, "on_value": 2.0, "off_value": -1.0},
        lambda indices: torch.where(F.one_hot(indices.long(), 4).bool(), 2.0, -1.0),
    ),
    Case("fill_like", {"ref_tensor": normal(2, 3)}, {"value": 1.5}, lambda ref_tensor: torch.full((2, 3), 1.5)),
    Case("fill", {"shape": np.array([2, 3], np.int32)}, {"value": -2.5}, lambda shape: torch.full((2, 3), -2.5)),
    Case("range_1d", {"end": np.array(9, np.int32)}, {"start": 1, "step": 2}, lambda end: torch.arange(1, 9, 2)),
    Case("linear", {"x": normal(2, 3, 5)}, {"weight": POSITIVE[0, :3], "bias": POSITIVE[0, 0, :3]}, lambda x: F.linear(x, torch.tensor(POSITIVE[0, :3]), torch.tensor(POSITIVE[0, 0, :3]))),
    Case("matmul", {"x": normal(2, 3, 5), "y": normal(2, 5, 4)}, {}, torch.matmul),
    Case(
        "matmul",
        {"x": normal(2, 5, 3), "y": normal(4, 5)},
        {"transpose_x": True, "transpose_y": True},
        lambda x, y: x.mT @ y.mT,
    ),
    Case(
        "einsum",
        {"values": [normal(2, 3, 4, 5), normal(2, 5, 4, 6)]},
        {"equation": "abcd,adce->abce"},
        lambda values: torch.einsum("abcd,adce->abce", *values),
    ),
    Case(
        "scaled_dot_product_attention",
        {"query": normal(1, 4, 3, 8), "key": normal(1, 4, 6, 8), "value": normal(1, 4, 6, 8)},
        {},
        F.scaled_dot_product_attention,
    ),
    Case(
        "scaled_dot_product_attention",
        {
            "query": normal(1, 4, 3, 8),
            "key": normal(1, 4, 6, 8),
            "value": normal(1, 4, 6, 8),
            "attn_mask": np.where(np.tri(3, 6, 3), 0, -np.inf).astype(np.float32)[None, None],
        },
        {},
        lambda query, key, value, attn_mask: F.scaled_dot_product_attention(query, key, value, attn_mask),
    ),
    Case(
        "scaled_dot_product_attention",
        {
            "query": normal(1, 4, 3, 8),
            "key": normal(1, 4, 6, 8),
            "value": normal(1, 4, 6, 8),
            "attn_mask": np.tri(3, 6, 3).astype(bool)[None, None],
        },
        {},
        lambda query, key, value, attn_mask: F.scaled_dot_product_attention(query, key, value, attn_mask),
    ),
    Case(
        "scaled_dot_product_attention",
        {"query": normal(1, 3, 8), "key": normal(1, 6, 8), "value": normal(1, 6, 8), "attn_mask": normal(6)},
        {},
        lambda query, key, value, attn_mask: torch.softmax(query @ key.mT / 8**0.5 + attn_mask, -1) @ value,
    ),
    Case(
        "layer_norm",
        {"x": normal(2, 5, 3)},
        {"axes": [1], "gamma": POSITIVE[0, 0], "beta": POSITIVE[0, 1], "epsilon": 1e-3},
        lambda x: F.layer_norm(x.mT, (5,), torch.tensor(POSITIVE[0, 0]), torch.tensor(POSITIVE[0, 1]), 1e-3).mT,
    ),
    Case(
        "layer_norm",
        {"x": normal(2, 3, 5)},
        {"axes": [-1], "gamma": POSITIVE[0, 0], "beta": POSITIVE[0, 1], "epsilon": 1e-3},
        lambda x: F.layer_norm(x, (5,), torch.tensor(POSITIVE[0, 0]), torch.tensor(POSITIVE[0, 1]), 1e-3),
    ),
    Case(
        "batch_norm",
        {"x": normal(2, 5, 4, 3)},
        {"mean": POSITIVE[0, 0], "variance": POSITIVE[0, 1], "gamma": POSITIVE[0, 2], "beta": POSITIVE[1, 0], "epsilon": 1e-3},
        _batch,
    ),
    Case(
        "instance_norm",
        {"x": normal(2, 5, 4, 3)},
        {"gamma": POSITIVE[0, 2], "beta": POSITIVE[1, 0], "epsilon": 1e-3},
        lambda x: _instance(x, gamma=torch.tensor(POSITIVE[0, 2]), beta=torch.tensor(POSITIVE[1, 0])),
    ),
    Case(
        "l2_norm",
        {"x": normal(2, 5, 4, 3)},
        {"epsilon": 1e-4},
        lambda x: x / torch.sqrt(x.square().sum((1, 2, 3), keepdim=True) + 1e-4),
    ),
    *(
        Case(
            "conv",
            {"x": normal(1, 4, 9, 8)},
            {"weight": weight, "strides": [2, 1], "groups": groups, **padding},
            lambda x, w=weight, g=groups, p=pad: F.conv2d(F.pad(x, p), torch.tensor(w), stride=(2, 1), groups=g),
        )
        for weight, groups, padding, pad in (
            (normal(6, 4, 3, 2), 1, {"pad_type": "valid"}, (0, 0, 0, 0)),
            (normal(6, 2, 3, 2), 2, {"pad_type": "custom", "pad": [1, 0, 2, 1]}, (2, 1, 1, 0)),
            (normal(6, 4, 3, 2), 1, {"pad_type": "same"}, (0, 1, 1, 1)),
            (normal(6, 4, 3, 2), 1, {"pad_type": "same_lower"}, (1, 0, 1, 1)),
        )
    ),
    Case(
        "conv",
        {"x": normal(1, 4, 9)},
        {"weight": WIDE, "dilations": [2], "pad_type": "valid"},
        lambda x: F.conv1d(x, torch.tensor(WIDE), dilation=2),
    ),
    Case(
        "max_pool",
        {"x": normal(1, 2, 8, 7)},
        {"kernel_sizes": [2, 3], "strides": [2, 2], "pad_type": "valid"},
        lambda x: F.max_pool2d(x, (2, 3), (2, 2)),
    ),
    Case(
        "max_pool",
        {"x": normal(1, 2, 7, 6)},
        {"kernel_sizes": [2, 3], "strides": [2, 2], "pad_type": "valid", "ceil_mode": True},
        lambda x: F.max_pool2d(x, (2, 3), (2, 2), ceil_mode=True),
    ),
    Case(
        "avg_pool",
        {"x": normal(1, 2, 8)},
        {"kernel_sizes": [3], "strides": [2], "pad_type": "custom", "pad": [1, 1], "ceil_mode": True, "exclude_padding_from_average": True},
        lambda x: F.avg_pool1d(x, 3, 2, 1, ceil_mode=True, count_include_pad=False),
    ),
    Case(
        "avg_pool",
        {"x": normal(1, 2, 8, 7)},
        {"kernel_sizes": [2, 2], "strides": [2, 2], "pad_type": "custom", "pad": [1, 1, 0, 1], "exclude_padding_from_average": True},
        lambda x: F.avg_pool2d(F.pad(x, (0, 1, 1, 1)), 2, 2) / F.avg_pool2d(F.pad(torch.ones_like(x), (0, 1, 1, 1)), 2, 2),
    ),
]  # fmt: skip

NAMES = {f"{case.operator}_{i}": case for i, case in enumerate(CASES)}
