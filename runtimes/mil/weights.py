"""MIL operators `constexpr_*`: decompress weights to float32, once or at each use.

Semantics: coremltools 9.0, converters/mil/mil/ops/defs/iOS16/constexpr_ops.py and iOS18/compression.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Array = npt.NDArray[Any]
Args = Mapping[str, Any]


class Weight:
    """A large constant. `tensor()` returns its float32 value; `keep` sets the form in which it is held.

    half: every value is a float16 number.
    """

    def __init__(self, shape: tuple[int, ...], produce: Callable[[], Tensor], *, half: bool) -> None:
        self.shape, self.half = shape, half
        self._produce: Callable[[], Tensor] | None = produce
        self._kept: Tensor | None = None

    @property
    def float32_bytes(self) -> int:
        return 4 * int(np.prod(self.shape))

    def keep(self, dtype: torch.dtype) -> None:
        """Dequantizes now and holds the result as `dtype`. Frees the compressed form."""
        if self._produce is not None:
            self._kept, self._produce = self._produce().to(dtype), None

    def held(self) -> Tensor:
        """Returns [shape] in the kept dtype, float32 or float16. Float32 if nothing is kept."""
        return self.tensor() if self._kept is None else self._kept

    def tensor(self) -> Tensor:
        """Returns float32 [shape]."""
        if self._kept is not None:
            return self._kept.float()
        assert self._produce is not None
        return self._produce()


def _widen(values: Array) -> Array:
    """Returns a float32 copy in C order."""
    return values.astype(np.float32, order="C")


def blockwise_shift_scale(args: Args) -> Array:
    """Returns (data - offset) * scale. Each parameter has one entry per block."""
    values, shape = _widen(args["data"]), np.asarray(args["scale"]).shape
    # Each axis becomes [blocks, block size]. Parameters are broadcast, not repeated: a model's largest table
    # fills gigabytes.
    blocks = values.reshape(
        [n for count, size in zip(shape, values.shape, strict=True) for n in (count, size // count)]
    )
    spread = [n for count in shape for n in (count, 1)]
    if args.get("offset") is not None:
        blocks -= _widen(np.asarray(args["offset"])).reshape(spread)
    blocks *= _widen(np.asarray(args["scale"])).reshape(spread)
    return values


def affine_dequantize(args: Args) -> Array:
    """Dequantizes the iOS 16 form: one scale and zero point, or one per index of `axis`."""
    data = args["quantized_data"]
    shape = [1] * data.ndim
    shape[int(args["axis"])] = -1

    def along(value: Any) -> Array:
        array = _widen(np.asarray(value))
        return array if array.ndim == 0 else array.reshape(shape)

    return (_widen(data) - along(args["zero_point"])) * along(args["scale"])


def lut_to_dense(args: Args) -> Array:
    """Returns the table entries at the indices.

    iOS 18: a table of vectors per block of indices. iOS 16: one table, packed indices, and a separate shape.
    """
    if "shape" in args:
        return _lut_to_dense_ios16(args)
    indices, table = args["indices"].astype(np.int64), _widen(args["lut"])
    rank = indices.ndim
    blocks = [
        np.arange(size) // (size // count)
        for size, count in zip(indices.shape, table.shape[:rank], strict=True)
    ]
    values: Array = table[(*np.ix_(*blocks), indices)]  # [*indices.shape, vector]
    if values.shape[-1] == 1:
        return values[..., 0]
    axis = int(args["vector_axis"]) % rank
    moved = np.moveaxis(values, -1, axis + 1)
    return moved.reshape([n * values.shape[-1] if i == axis else n for i, n in enumerate(indices.shape)])


def _lut_to_dense_ios16(args: Args) -> Array:
    table, shape = _widen(args["lut"]), tuple(int(n) for n in args["shape"])
    bits = int(np.log2(len(table)))
    indices = _unpack(args["indices"], bits, int(np.prod(shape)))
    values: Array = table[indices]
    return values.reshape(shape)


def _unpack(packed: Array, bits: int, count: int) -> Array:
    """Returns `count` integers of `bits` bits. The lowest bits of the first byte come first."""
    stream = np.unpackbits(packed.view(np.uint8), bitorder="little")[: count * bits].reshape(count, bits)
    weights: Array = stream.astype(np.int64) @ (1 << np.arange(bits))
    return weights


def sparse_to_dense(args: Args) -> Array:
    """Returns the nonzero values at the mask and zeros elsewhere.

    iOS 16: the mask is packed bits, with a separate shape.
    """
    if "shape" in args:
        shape = tuple(int(n) for n in args["shape"])
        mask = _unpack(args["mask"], 1, int(np.prod(shape))).astype(bool).reshape(shape)
    else:
        mask = args["mask"].astype(bool)
    values = np.zeros(mask.shape, np.float32)
    values[mask] = _widen(np.asarray(args["nonzero_data"]))
    return values


def sparse_blockwise_shift_scale(args: Args) -> tuple[Array, Array]:
    """Returns (mask, nonzero values): the data at the mask, shifted and scaled by block."""
    mask = args["data_mask"].astype(bool)
    data = np.zeros(mask.shape, np.float32)
    data[mask] = _widen(args["nonzero_data"])
    dense = blockwise_shift_scale({"data": data, "scale": args["scale"], "offset": args.get("offset")})
    return args["data_mask"], dense[mask]


def lut_to_sparse(args: Args) -> tuple[Array, Array]:
    """Returns (mask, nonzero values): the table's entries at the mask."""
    mask = args["indices_mask"].astype(bool)
    indices = np.zeros(mask.shape, np.int64)
    indices[mask] = args["indices_nonzero_data"].astype(np.int64)
    dense = lut_to_dense({"indices": indices, "lut": args["lut"], "vector_axis": args.get("vector_axis")})
    axis, size = int(args.get("vector_axis") or 0) % mask.ndim, np.asarray(args["lut"]).shape[-1]
    wide = np.repeat(mask, size, axis=axis) if size > 1 else mask
    return wide.astype(np.uint8), dense[wide]


def cast(args: Args) -> Array:
    return _widen(args["source_val"])


CONSTEXPRS: dict[str, Callable[[Args], Array | tuple[Array, Array]]] = {
    "constexpr_affine_dequantize": affine_dequantize,
    "constexpr_blockwise_shift_scale": blockwise_shift_scale,
    "constexpr_cast": cast,
    "constexpr_lut_to_dense": lut_to_dense,
    "constexpr_lut_to_sparse": lut_to_sparse,
    "constexpr_sparse_blockwise_shift_scale": sparse_blockwise_shift_scale,
    "constexpr_sparse_to_dense": sparse_to_dense,
}
