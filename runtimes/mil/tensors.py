"""MIL operators that move, index and multiply. Arguments have MIL's names; floats are float32."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from edgellama.runtimes.mil.elementwise import Args, Operator, ints

_CAST = {
    "fp16": torch.float16,
    "fp32": torch.float32,
    "int32": torch.int32,
    "int16": torch.int16,
    "uint16": torch.int32,
    "int8": torch.int8,
    "uint8": torch.uint8,
    "bool": torch.bool,
}


def _flags(value: Any, count: int) -> list[bool]:
    return [False] * count if value is None else [bool(x) for x in value]


def slices(args: Args, shape: tuple[int, ...]) -> tuple[Any, ...]:
    """Returns the index of a slice_by_index or slice_update.

    A mask that is set for an axis overrides `begin` or `end`. A squeezed axis has an integer, an axis of
    negative stride a list of positions.
    """
    rank = len(shape)
    begin, end = ints(args["begin"]), ints(args["end"])
    stride = [1] * rank if args.get("stride") is None else ints(args["stride"])
    from_start, to_end = _flags(args.get("begin_mask"), rank), _flags(args.get("end_mask"), rank)
    squeeze = _flags(args.get("squeeze_mask"), rank)
    index: list[Any] = []
    for axis, size in enumerate(shape):
        if squeeze[axis]:
            index.append(begin[axis])
        elif stride[axis] > 0:
            start, stop = None if from_start[axis] else begin[axis], None if to_end[axis] else end[axis]
            index.append(slice(start, stop, stride[axis]))
        else:  # torch has no negative strides
            start, stop = None if from_start[axis] else begin[axis], None if to_end[axis] else end[axis]
            positions = range(size)[slice(start, stop, stride[axis])]
            index.append(list(positions))
    return tuple(index)


def _slice_by_index(args: Args) -> Any:
    x: Tensor = args["x"]
    lists = [i for i in slices(args, tuple(x.shape)) if isinstance(i, list)]
    if not lists:
        return x[slices(args, tuple(x.shape))]
    # One axis at a time, because torch pairs two lists in one index.
    squeezed = 0
    for axis, index in enumerate(slices(args, tuple(x.shape))):
        at = axis - squeezed
        if isinstance(index, list):
            x = x.index_select(at, torch.tensor(index, dtype=torch.int64))
        else:
            x = x[(slice(None),) * at + (index,)]
            squeezed += isinstance(index, int)
    return x


def _slice_by_size(args: Args) -> Any:
    begin, size = ints(args["begin"]), ints(args["size"])
    return args["x"][tuple(slice(b, None if n == -1 else b + n) for b, n in zip(begin, size, strict=True))]


def update_slice(x: Tensor, args: Args) -> Tensor:
    """Replaces in place the part of `x` that `args` names. Returns `x`.

    Raises ValueError if the update has another shape than that part.
    """
    index, update = slices(args, tuple(x.shape)), args["update"]
    # torch would broadcast another shape, or drop the update past the end.
    if (part := tuple(x[index].shape)) != tuple(update.shape):
        raise ValueError(f"an update of shape {list(update.shape)} for a slice of shape {list(part)}")
    x[index] = update
    return x


def _expand_dims(args: Args) -> Any:
    x, axes = args["x"], ints(args["axes"])
    for axis in sorted(a % (x.dim() + len(axes)) for a in axes):
        x = x.unsqueeze(axis)
    return x


def _squeeze(args: Args) -> Any:
    x, axes = args["x"], args.get("axes")
    return x.squeeze() if axes is None else x.squeeze(tuple(ints(axes)))


def _reshape(args: Args) -> Any:
    x = args["x"]
    return x.reshape([x.shape[i] if n == 0 else n for i, n in enumerate(ints(args["shape"]))])


def _split(args: Args) -> tuple[Tensor, ...]:
    x, axis, sizes = args["x"], int(args["axis"]), args.get("split_sizes")
    if sizes is not None:
        return torch.split(x, ints(sizes), axis)
    return torch.split(x, x.shape[axis] // int(args["num_splits"]), axis)


def _concat(args: Args) -> Any:
    values, axis = args["values"], int(args["axis"])
    values = [v.reshape(-1) if v.dim() == 0 else v for v in values]
    if not args.get("interleave"):
        return torch.cat(values, axis)
    stacked = torch.stack(values, axis % values[0].dim() + 1)
    return stacked.flatten(axis % values[0].dim(), axis % values[0].dim() + 1)


def _pad(args: Args) -> Any:
    x, pad, mode = args["x"], ints(args["pad"]), args.get("mode") or "constant"
    count = len(pad) // 2  # number of padded axes, the last ones
    reversed_pairs = [n for i in reversed(range(count)) for n in pad[2 * i : 2 * i + 2]]
    if mode == "constant":
        return F.pad(x, reversed_pairs, value=float(args.get("constant_val") or 0.0))
    while reversed_pairs[-2:] == [0, 0] and len(reversed_pairs) > 2:
        reversed_pairs = reversed_pairs[:-2]
    rank = len(reversed_pairs) // 2 + 2
    flat = x.reshape(-1, *[1] * max(0, rank - 1 - x.dim()), *x.shape[-(rank - 1) :])
    y = F.pad(flat, reversed_pairs, mode="replicate" if mode == "replicate" else "reflect")
    return y.reshape(*x.shape[: x.dim() - (rank - 2)], *y.shape[-(rank - 2) :])


def _indices(args: Args, size: int) -> Any:
    i = args["indices"].long()
    return torch.where(i < 0, i + size, i)


def _gather(args: Args) -> Any:
    x, batch = args["x"], int(args.get("batch_dims") or 0)
    axis = int(args.get("axis") or 0) % x.dim()
    i = _indices(args, x.shape[axis])
    if batch == 0:
        rows = torch.index_select(x, axis, i.reshape(-1))
        return rows.reshape(x.shape[:axis] + i.shape + x.shape[axis + 1 :])
    flat_x, flat_i = x.flatten(0, batch - 1), i.flatten(0, batch - 1)
    inner = [
        _gather({"x": a, "indices": b, "axis": axis - batch}) for a, b in zip(flat_x, flat_i, strict=True)
    ]
    return torch.stack(inner).reshape(*x.shape[:batch], *inner[0].shape)


def _gather_along_axis(args: Args) -> Any:
    axis = int(args.get("axis") or 0)
    return torch.gather(args["x"], axis, _indices(args, args["x"].shape[axis]))


def _gather_nd(args: Args) -> Any:
    x, i, batch = args["x"], args["indices"].long(), int(args.get("batch_dims") or 0)
    if batch:
        inner = [
            _gather_nd({"x": a, "indices": b, "batch_dims": batch - 1}) for a, b in zip(x, i, strict=True)
        ]
        return torch.stack(inner)
    sizes = torch.tensor(x.shape[: i.shape[-1]])
    i = torch.where(i < 0, i + sizes, i)
    return x[tuple(i.unbind(-1))]


_SCATTER = {"add": "sum", "sub": "sum", "mul": "prod", "min": "amin", "max": "amax"}


def _scatter_into(data: Tensor, axis: int, i: Tensor, updates: Tensor, mode: str) -> Tensor:
    if mode == "update":
        return data.scatter(axis, i, updates)
    if mode == "div":
        mode, updates = "mul", 1 / updates
    if mode == "sub":
        updates = -updates
    return data.scatter_reduce(axis, i, updates, _SCATTER[mode])


def _scatter_along_axis(args: Args) -> Any:
    axis = int(args.get("axis") or 0)
    i = _indices(args, args["data"].shape[axis])
    return _scatter_into(args["data"], axis, i, args["updates"], args.get("mode") or "add")


def _scatter(args: Args) -> Any:
    """Operator scatter. updates: shape of `data` with `axis` replaced by the shape of the indices."""
    data, axis = args["data"], int(args.get("axis") or 0) % args["data"].dim()
    i = _indices(args, data.shape[axis])
    updates = args["updates"].flatten(axis, axis + i.dim() - 1) if i.dim() > 1 else args["updates"]
    shape = [1] * data.dim()
    shape[axis] = -1
    return _scatter_into(data, axis, i.reshape(shape).expand_as(updates), updates, args.get("mode") or "add")


def _scatter_nd(args: Args) -> Any:
    data, i, updates = args["data"], args["indices"].long(), args["updates"]
    depth = i.shape[-1]
    sizes = data.shape[:depth]
    strides = torch.tensor([math.prod(sizes[k + 1 :]) for k in range(depth)])
    i = torch.where(i < 0, i + torch.tensor(sizes), i)
    flat = (i * strides).sum(-1).reshape(-1)
    rows = data.reshape(math.prod(sizes), -1)
    updated = _scatter_into(
        rows,
        0,
        flat[:, None].expand(-1, rows.shape[1]),
        updates.reshape(flat.shape[0], -1),
        args.get("mode") or "add",
    )
    return updated.reshape(data.shape)


def _matmul(args: Args) -> Any:
    x, y = args["x"], args["y"]
    if args.get("transpose_x"):
        x = x.transpose(-1, -2)
    if args.get("transpose_y"):
        y = y.transpose(-1, -2)
    return x @ y


def _attention(args: Args) -> Any:
    """Returns softmax(query keyᵀ / sqrt(width) + mask) value. Batch dimensions are broadcast."""
    q, k, v, mask = args["query"], args["key"], args["value"], args.get("attn_mask")
    batch = torch.broadcast_shapes(q.shape[:-2], k.shape[:-2], v.shape[:-2])
    q, k, v = (t.expand(*batch, *t.shape[-2:]) for t in (q, k, v))
    if mask is not None and mask.dim() == 1:
        mask = mask[None]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def _padded(args: Args, kernel: list[int], fill: float = 0.0) -> Any:
    """Pads `x` for a convolution or a pool, as `pad_type` says."""
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
    # In ceil mode the last window may pass the end, which torch allows for its own padding only. MIL requires
    # symmetric padding here.
    pad = ints(args["pad"])[::2] if args.get("pad_type") == "custom" else [0] * len(kernel)
    return function(args["x"], kernel, strides, pad, ceil_mode=True, **options)


def _max_pool(args: Args) -> Any:
    return _pool(args, (F.max_pool1d, F.max_pool2d, F.max_pool3d), -math.inf)


def _avg_pool(args: Args) -> Any:
    """Returns the mean of each window. Padding counts as zeros or, on request, is left out."""
    functions = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)
    means = _pool(args, functions, 0.0)
    if not args.get("exclude_padding_from_average"):
        return means
    return means / _pool({**args, "x": torch.ones_like(args["x"])}, functions, 0.0)


def _one_hot(args: Args) -> Any:
    i, size, axis = args["indices"].long(), int(args["one_hot_vector_size"]), args.get("axis")
    on, off = args.get("on_value"), args.get("off_value")
    inside = (i >= 0) & (i < size)
    hot = F.one_hot(i.clamp(0, size - 1), size).bool() & inside[..., None]
    y = torch.where(hot, torch.as_tensor(1 if on is None else on), torch.as_tensor(0 if off is None else off))
    return y.movedim(-1, -1 if axis is None else int(axis))


def _band_part(args: Args) -> Any:
    x, lower, upper = args["x"], args.get("lower"), args.get("upper")
    if lower is not None and int(lower) >= 0:
        x = x.triu(-int(lower))
    return x.tril(int(upper)) if upper is not None and int(upper) >= 0 else x


def _topk(args: Args) -> Any:
    axis = args.get("axis")
    values, indices = args["x"].topk(
        int(args.get("k") or 1), -1 if axis is None else int(axis), largest=not args.get("ascending")
    )
    return (values,) if args.get("return_indices") is False else (values, indices.int())


def _argsort(args: Args) -> Any:
    axis = args.get("axis")
    descending = not args.get("ascending")
    return torch.argsort(
        args["x"], dim=-1 if axis is None else int(axis), descending=descending, stable=True
    ).int()


TENSORS: dict[str, Operator] = {
    "identity": lambda a: a["x"],
    "cast": lambda a: a["x"].to(_CAST[a["dtype"]]),
    "shape": lambda a: torch.tensor(a["x"].shape, dtype=torch.int32),
    "reshape": _reshape,
    "transpose": lambda a: a["x"].permute(ints(a["perm"])),
    "expand_dims": _expand_dims,
    "squeeze": _squeeze,
    "tile": lambda a: a["x"].repeat(ints(a["reps"])),
    "concat": _concat,
    "stack": lambda a: torch.stack(a["values"], int(a["axis"])),
    "split": _split,
    "slice_by_index": _slice_by_index,
    "slice_by_size": _slice_by_size,
    # The interpreter updates in place if nothing else needs the memory of x.
    "slice_update": lambda a: update_slice(a["x"].clone(), a),
    "pad": _pad,
    "reverse": lambda a: a["x"].flip(
        ints(a["axes"]) if a.get("axes") is not None else list(range(a["x"].dim()))
    ),
    "gather": _gather,
    "gather_along_axis": _gather_along_axis,
    "gather_nd": _gather_nd,
    "scatter": _scatter,
    "scatter_along_axis": _scatter_along_axis,
    "scatter_nd": _scatter_nd,
    "fill": lambda a: torch.full(ints(a["shape"]), a["value"]),
    "fill_like": lambda a: torch.full(list(a["ref_tensor"].shape), a["value"]),
    "range_1d": lambda a: torch.arange(a["start"], a["end"], a["step"]),
    "one_hot": _one_hot,
    "band_part": _band_part,
    "topk": _topk,
    "argsort": _argsort,
    "linear": lambda a: F.linear(a["x"], a["weight"], a.get("bias")),
    "matmul": _matmul,
    "einsum": lambda a: torch.einsum(a["equation"], *a["values"]),
    "scaled_dot_product_attention": _attention,
    "conv": _conv,
    "max_pool": _max_pool,
    "avg_pool": _avg_pool,
}
