"""Operators of MIL that multiply matrices or slide windows. Arguments by MIL's names; floats are float32."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from edgellama.runtimes.mil_elementwise import Args, Operator, ints


def _matmul(args: Args) -> Any:
    x, y = args["x"], args["y"]
    if args.get("transpose_x"):
        x = x.transpose(-1, -2)
    if args.get("transpose_y"):
        y = y.transpose(-1, -2)
    return x @ y


def _attention(args: Args) -> Any:
    """softmax(query keyᵀ / sqrt(width) + mask) value, batch dimensions broadcast."""
    q, k, v, mask = args["query"], args["key"], args["value"], args.get("attn_mask")
    if mask is not None and mask.dim() == 1:
        mask = mask[None]
    batch = torch.broadcast_shapes(q.shape[:-2], k.shape[:-2], v.shape[:-2])
    q, k, v = (t.expand(*batch, *t.shape[-2:]) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def _padded(args: Args, kernel: list[int], fill: float = 0.0) -> Any:
    """x padded as `pad_type` says: for convolutions and pools."""
    x, kind, count = args["x"], args.get("pad_type") or "valid", len(kernel)
    strides = ints(args["strides"]) if args.get("strides") is not None else [1] * count
    dilations = ints(args["dilations"]) if args.get("dilations") is not None else [1] * count
    if kind == "valid":
        return x
    pairs = [[0, 0] for _ in range(count)]
    if kind == "custom":
        pad = ints(args["pad"])
        pairs = [pad[2 * i : 2 * i + 2] for i in range(count)]
    else:
        for i, size in enumerate(x.shape[-count:]):
            reach = dilations[i] * (kernel[i] - 1) + 1
            total = max(0, (-(-size // strides[i]) - 1) * strides[i] + reach - size)
            small, large = total // 2, total - total // 2
            pairs[i] = [large, small] if kind == "same_lower" else [small, large]
    return F.pad(x, [n for pair in reversed(pairs) for n in pair], value=fill)


def _conv(args: Args) -> Any:
    weight = args["weight"]
    x = _padded(args, list(weight.shape[2:]))
    function = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}[weight.dim()]
    count = weight.dim() - 2
    y: Tensor = function(
        x,
        weight,
        args.get("bias"),
        stride=ints(args["strides"]) if args.get("strides") is not None else [1] * count,
        dilation=ints(args["dilations"]) if args.get("dilations") is not None else [1] * count,
        groups=int(args.get("groups") or 1),
    )
    return y


def _pool(args: Args, functions: tuple[Any, ...], fill: float, **options: Any) -> Any:
    kernel = ints(args["kernel_sizes"])
    function = functions[len(kernel) - 1]
    strides = ints(args["strides"]) if args.get("strides") is not None else [1] * len(kernel)
    if not args.get("ceil_mode"):
        return function(_padded(args, kernel, fill), kernel, strides, **options)
    # The last window may then pass the end, which torch allows for its own padding only. MIL wants it symmetric here.
    pad = ints(args["pad"])[::2] if args.get("pad_type") == "custom" else [0] * len(kernel)
    return function(args["x"], kernel, strides, pad, ceil_mode=True, **options)


def _max_pool(args: Args) -> Any:
    return _pool(args, (F.max_pool1d, F.max_pool2d, F.max_pool3d), -math.inf)


def _avg_pool(args: Args) -> Any:
    """The mean of each window, padding counted as zeros or, where asked for, left out."""
    functions = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)
    means = _pool(args, functions, 0.0)
    if not args.get("exclude_padding_from_average"):
        return means
    return means / _pool({**args, "x": torch.ones_like(args["x"])}, functions, 0.0)


PRODUCTS: dict[str, Operator] = {
    "linear": lambda a: F.linear(a["x"], a["weight"], a.get("bias")),
    "matmul": _matmul,
    "einsum": lambda a: torch.einsum(a["equation"], *a["values"]),
    "scaled_dot_product_attention": _attention,
    "conv": _conv,
    "max_pool": _max_pool,
    "avg_pool": _avg_pool,
}
